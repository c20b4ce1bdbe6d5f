"""Do all nodes have the same software, model, data and run folder?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.preflight.asking import Answers
from launcher.preflight.findings import Finding, Status
from launcher.preflight.wanted import Wanted, keeps_weights
from launcher.summary import format_bytes
from models.records import is_hub_name
from models.source import HUB_NAME


def untold(node: str, check: str, section: Mapping[str, Any], *, status: Status = "warn") -> Finding | None:
    """The finding about a section that hangs or failed; None where it holds facts."""
    if "error" not in section:
        return None
    return Finding(
        node=node,
        check=check,
        status=status,
        what=f"this could not be found out: {section['error']}",
        remedy="see whether its file systems and name servers answer, and ask again",
    )


def _usual(values: Mapping[str, Any]) -> Any:
    """The value that most nodes have; of equally many, the first node's."""
    counted = Counter(map(repr, values.values()))
    most = max(counted.values())
    return next(value for value in values.values() if counted[repr(value)] == most)


def _others(values: Mapping[str, Any], wanted: Any) -> str:
    """Which nodes have the usual value, in words."""
    names = [node for node, value in values.items() if value == wanted]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_versions(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Python, libraries and driver: there, and as on the other nodes."""
    facts = {node: each["versions"] for node, each in answers.facts.items()}
    found = [finding for node, each in facts.items() if (finding := untold(node, "versions", each)) is not None]
    told = {node: dict(each) for node, each in facts.items() if "error" not in each}
    for node, each in told.items():
        gpus = answers.facts[node]["gpus"]
        drivers = sorted({gpu["driver"] for gpu in gpus}) if isinstance(gpus, list) else []
        if drivers:
            each["driver"] = ", ".join(drivers)
    names = list(dict.fromkeys(name for each in told.values() for name in each))
    # A node without a driver is told of by the check of its GPUs.
    having = {name: {node: each[name] for node, each in told.items() if each.get(name)} for name in names}
    usual = {name: _usual(has) for name, has in having.items() if has}
    for node, each in told.items():
        missing = [name for name in names if each.get(name) is None and name != "driver"]
        differing = [name for name, has in having.items() if node in has and has[node] != usual[name]]
        if missing:
            found.append(
                Finding(
                    node=node,
                    check="versions",
                    status="fail",
                    what=f"{', '.join(missing)} not installed there",
                    remedy="install the same environment at the same path on every node",
                )
            )
        for name in differing:
            found.append(
                Finding(
                    node=node,
                    check="versions",
                    status=_severity(name, each[name], usual[name]),
                    what=f"{name} {each[name]}, where {_others(having[name], usual[name])} has {usual[name]}",
                    remedy="install the same environment on every node (constraints.txt names tested versions)"
                    if name != "driver"
                    else "install the same NVIDIA driver on every node",
                )
            )
        if not missing and not differing:
            shown = [name for name in ("python", "torch", "deepspeed", "driver") if each.get(name)]
            what = ", ".join(f"{name} {each[name]}" for name in shown)
            found.append(Finding(node=node, check="versions", what=what))
    return found


def _severity(name: str, version: str, usual: str) -> Status:
    """Of another version: drivers of the same GPUs and patches of one Python work together."""
    is_patch = name == "python" and version.split(".")[:2] == usual.split(".")[:2]
    return "warn" if name == "driver" or is_patch else "fail"


def check_code(wanted: Wanted, answers: Answers) -> list[Finding]:
    """This package: importable, and the same lines everywhere."""
    found, digests = [], {}
    for node, facts in answers.facts.items():
        code = facts["code"]
        problem = untold(node, "code", code, status="fail")
        missing = [] if problem else [name for name, where in code["where"].items() if where is None]
        if missing:
            problem = Finding(
                node=node,
                check="code",
                status="fail",
                what=f"{', '.join(missing)} cannot be imported there",
                remedy="install this package there, or put its folder into PYTHONPATH",
            )
        if problem:
            found.append(problem)
        else:
            digests[node] = code["digest"]
    usual = _usual(digests) if digests else None
    for node, digest in digests.items():
        where = answers.facts[node]["code"]["where"]["launcher"]
        if digest == usual and wanted.code_digest not in (None, digest):
            found.append(
                Finding(
                    node=node,
                    check="code",
                    status="warn",
                    what=f"its modules ({digest[:12]}) are not those of this machine, which reads the config",
                    remedy="start the run with the version that the nodes have: ranks may not know all settings",
                )
            )
        elif digest == usual:
            found.append(Finding(node=node, check="code", what=f"{digest[:12]} in {Path(where).parent}"))
        else:
            found.append(
                Finding(
                    node=node,
                    check="code",
                    status="fail",
                    what=f"its modules in {Path(where).parent} ({digest[:12]}) are not those of "
                    f"{_others(digests, usual)} ({usual[:12] if usual else ''})",
                    remedy="install the same version of this package there, and the same changes to it",
                )
            )
    return found


def _check_files(answers: Answers, check: str, field: str, value: str, *, of_hub: bool, key: str) -> list[Finding]:
    """Of one setting that names files: there, readable, the same."""
    found, digests = [], {}
    # A folder may be named like a model of the hub: it is one where any node has it.
    of_hub = of_hub and all(facts[key].get("missing") for facts in answers.facts.values())
    for node, facts in answers.facts.items():
        each = facts[key]
        if each.get("missing") and of_hub:
            found.append(Finding(node=node, check=check, what=f"{value}, a name of the hub: not looked at"))
        elif each.get("missing"):
            split = f" for the split {each['split']}" if each.get("split") else ""
            found.append(
                Finding(
                    node=node,
                    check=check,
                    status="fail",
                    what=f"{field} {value} is not there{split}",
                    remedy="copy it there, to the same path, or share it",
                )
            )
        elif "error" in each:
            found.append(
                Finding(
                    node=node,
                    check=check,
                    status="fail",
                    what=f"{field} {value} cannot be read: {each['error']}",
                    remedy="give this user the right to read it, or copy what is missing of it",
                )
            )
        else:
            digests[node] = each["digest"]
    usual = _usual(digests) if digests else None
    for node, digest in digests.items():
        if digest == usual:
            size = format_bytes(answers.facts[node][key]["bytes"])
            found.append(Finding(node=node, check=check, what=f"{field}: {size}"))
        else:
            found.append(
                Finding(
                    node=node,
                    check=check,
                    status="fail",
                    what=f"{field} {value} is not the same as on {_others(digests, usual)}",
                    remedy="copy the same files to every node, or share them",
                )
            )
    return found


def check_model(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Its config, tokenizer, and names and sizes of weight files; contents of weights are compared by the ranks."""
    model = wanted.config.model
    found = []
    named = {"model": ("model.name_or_path", model.name_or_path), "tokenizer": ("model.tokenizer", model.tokenizer)}
    for key, (field, value) in named.items():
        if value is not None:
            of_hub = HUB_NAME.fullmatch(value) is not None
            found += _check_files(answers, "model", field, value, of_hub=of_hub, key=key)
    return found


def check_data(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Every file of records, and the selection's where it is given."""
    data = wanted.config.data
    values = {
        "data.train": data.train,
        "data.validation": data.validation,
        "data.test": data.test,
        "data.calibration": data.calibration,
        "data.forgetting": data.forgetting,
        "selection.file": wanted.config.selection.file,
        "zero.config": str(wanted.config.zero.config),  # Asked for only where it names a file.
    }
    asked = {field for facts in answers.facts.values() for field in facts}
    found = []
    for field, value in values.items():
        if value is not None and field in asked:
            of_hub = field.startswith("data.") and is_hub_name(value, data.format)
            found += _check_files(answers, "data", field, value, of_hub=of_hub, key=field)
    return found


def check_output(wanted: Wanted, answers: Answers) -> list[Finding]:
    """The run folder: files can be made there, and nodes share it or may have their own."""
    output, found = wanted.config.output, _check_folders(wanted, answers)
    first = next((node.name for node in wanted.nodes if node.name in answers.folders), None)
    for node, facts in answers.facts.items():
        each = facts["output"]
        problem = untold(node, "output", each, status="fail")
        if problem is None and "problem" in each:
            problem = Finding(
                node=node,
                check="output",
                status="fail",
                what=f"a file cannot be made in {each['existing']} (output.folder {output.folder}): {each['problem']}",
                remedy="name another output.folder, or give this user the right to write there",
            )
        if problem is not None:
            found.append(problem)
        elif first is None or answers.folders.get(node, first) == first:
            found.append(Finding(node=node, check="output", what=f"files can be made in {each['existing']}"))
        else:
            found.append(_own_folder(wanted, node, first))
    return found


def _check_folders(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Of settings that name folders for what a run puts aside: they must be there."""
    found = []
    for field, folder in wanted.folders.items():
        for node, facts in answers.facts.items():
            each = facts.get(field, {})
            problem = untold(node, "output", each)
            if "problem" in each:
                problem = Finding(
                    node=node,
                    check="output",
                    status="fail",
                    what=f"{field} is {folder}: {each['problem']}",
                    remedy="create it there, or name another folder",
                )
            found += [problem] if problem is not None else []
    return found


def _own_folder(wanted: Wanted, node: str, first: str) -> Finding:
    what = f"its output.folder {wanted.config.output.folder} is not that of {first}"
    share = "put it on a file system that all nodes share"
    if wanted.config.output.shared is True:
        return Finding(
            node=node,
            check="output",
            status="fail",
            what=f"{what}, and output.shared is true",
            remedy=f"{share}, or set output.shared to auto, which keeps a copy of the checkpoints on each node",
        )
    if keeps_weights(wanted.config):
        return Finding(
            node=node,
            check="output",
            status="fail",
            what=f"{what}, and only one node would have selection.full_calibration.keep_weights_in",
            remedy=f"{share}, or select first and name selection.file",
        )
    if wanted.config.output.shared == "auto":
        return Finding(
            node=node,
            check="output",
            status="warn",
            what=f"{what}: each node will keep a copy of the checkpoints",
            remedy=f"set output.shared to false if that is meant, or {share}",
        )
    return Finding(node=node, check="output", what=f"{what}, as output.shared: false says")


SAME_CHECKS: tuple[Callable[[Wanted, Answers], list[Finding]], ...] = (
    check_versions,
    check_code,
    check_model,
    check_data,
    check_output,
)
