"""Are DeepSpeed's operators that a run needs built on every node, before a rank has to wait for it?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.preflight import build_probe
from launcher.preflight.asking import Answers, Talk, Talks, with_each
from launcher.preflight.findings import Finding
from launcher.preflight.machine_checks import BUILD_SECONDS, has_gpus, nodes_with_lone_locks
from launcher.preflight.wanted import OPERATORS, Wanted, python_path
from launcher.starting.reach import reach_of

# Two minutes each on two slow cores; CUDA's take longer.
_SECONDS = BUILD_SECONDS


def build_missing(wanted: Wanted, answers: Answers, findings: Sequence[Finding]) -> list[Finding]:
    """Build what is missing, on all nodes at once, and hold the findings about it against what came of it.

    A node whose cache cannot be written, or has a lock that nobody is seen to hold, is left as it is.

    Args:
        wanted: of the run.
        answers: of the nodes.
        findings: of all checks.
    """
    needed = wanted.gpu_operators if has_gpus(wanted, answers) else wanted.cpu_operators
    failed = {found.node for found in findings if (found.check, found.status) == ("build cache", "fail")}
    failed |= nodes_with_lone_locks(answers, needed)
    missing: dict[str, list[str]] = {}
    for each, facts in answers.facts.items():
        names = [name for name in needed if name in facts["build_cache"].get("missing", ())]
        if names and each not in failed:
            missing[each] = names
    if not missing:
        return list(findings)
    reach, deadline = reach_of(wanted.config.cluster), time.monotonic() + _SECONDS + 10.0
    asked = {
        "environment": dict(wanted.environment),
        "python_path": python_path(wanted.config),
        "seconds": _SECONDS,
    }
    nodes = [node for node in wanted.nodes if node.name in missing]
    with Talks() as talks:
        for node in nodes:
            operators = [OPERATORS[name] for name in missing[node.name]]
            talks.start(node, reach, Path(build_probe.__file__), {**asked, "operators": operators})

        def told(talk: Talk) -> list[Mapping[str, Any]]:
            lines: list[Mapping[str, Any]] = []
            while (line := talk.answer(deadline)) is not None:
                lines.append(line)
            return lines

        answered = with_each(talks.all, told)
    built = [_finding(node.name, missing[node.name], lines) for node, lines in zip(nodes, answered, strict=True)]
    # A build that another process had begun has ended, too: this one has waited for it.
    return [*(found for found in findings if found.check != "build cache" or found.node not in missing), *built]


def _finding(node: str, names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> Finding:
    by_class = {OPERATORS[name]: name for name in names}
    results = {by_class[line["operator"]]: line for line in lines if line.get("operator") in by_class}
    wrong = [name for name in names if name not in results or "error" in results[name]]
    if wrong:
        why = results[wrong[0]]["error"] if wrong[0] in results else f"not within {_SECONDS:.0f} seconds"
        return Finding(
            node=node,
            check="build cache",
            status="fail",
            what=f"{', '.join(wrong)} could not be built: {why}",
            remedy=f"see what the compiler says: python -c 'from deepspeed.ops.op_builder import {OPERATORS[wrong[0]]} "
            f"as b; b().load()' on {node}",
        )
    seconds = sum(line["seconds"] for line in results.values())
    return Finding(node=node, check="build cache", what=f"built {', '.join(names)} in {seconds:.0f} s")
