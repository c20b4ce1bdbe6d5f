"""Do the checks find in the facts of nodes what keeps a run from starting, and nothing else?"""

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.config import parse_config
from launcher.preflight.asking import Answers, Clock, Facts, Silence
from launcher.preflight.before_launch import as_of_launch
from launcher.preflight.building import build_missing
from launcher.preflight.examining import findings_of
from launcher.preflight.findings import CHECKS, Finding, Status, has_failed
from launcher.preflight.memory_check import Need, check_memory
from launcher.preflight.node_probe import (
    content_digest,
    data_facts,
    folder_facts,
    model_facts,
    parse_gpus,
    tokenizer_facts,
)
from launcher.preflight.reach_checks import explain_silence
from launcher.preflight.rendezvous import Came, check_network
from launcher.preflight.table import as_json, problem_lines, result_tables, verdict
from launcher.preflight.wanted import Wanted, operators_of
from launcher.starting.nodes import Node
from tests.launcher.test_bad_input import run_mapping
from tests.models.tiny import write_tiny_llama

GIB = 2**30
NODES = ("a", "b", "c")


def gpu(index: int, **changes: Any) -> dict[str, Any]:
    usual = {"index": index, "driver": "550.1", "total_bytes": 80 * GIB, "used_bytes": GIB // 4, "name": "H100"}
    return {**usual, **changes}


def facts_of(number: int) -> dict[str, Any]:
    names = {name: [f"10.0.0.{each}"] for each, name in enumerate(NODES)}
    return {
        "versions": {"python": "3.11.2", "torch": "2.13", "deepspeed": "0.19", "transformers": "5", "safetensors": "1", "numpy": "2"},
        "code": {"digest": "d" * 64, "where": {name: f"/code/{name}" for name in ("launcher", "models", "sparse_zero")}},
        "gpus": [gpu(0), gpu(1)],
        "memory": {"total_bytes": 64 * GIB, "available_bytes": 60 * GIB},
        "shared_memory": {"total_bytes": 8 * GIB, "free_bytes": 8 * GIB},
        "open_files": {"soft": 65536, "hard": 65536},
        "network": {"host": NODES[number], "interfaces": {"eth0": f"10.0.0.{number}"}, "addresses": ["127.0.0.1", f"10.0.0.{number}"]},
        "names": names,
        "port": {},
        "model": {"digest": "m", "bytes": 10},
        "data.train": {"digest": "t", "bytes": 10},
        "output": {"existing": "/runs", "free_bytes": 100 * GIB, "total_bytes": 200 * GIB},
        "build_cache": {"folder": "/cache", "is_writable": True, "locks": [], "missing": [], "no_tools": []},
    }  # fmt: skip


def wanted(**changes: Any) -> Wanted:
    mapping = run_mapping()
    for name, value in changes.pop("config", {}).items():
        section, key = name.split(".")
        mapping.setdefault(section, {})[key] = value
    usual: dict[str, Any] = {
        "config": parse_config(mapping),
        "nodes": tuple(Node(name, 2) for name in NODES),
        "world_size": 6,
        "master_address": None,
        "master_port": 29500,
        "cpu_operators": ("deepspeed_shm_comm",),
    }
    return Wanted(**{**usual, **changes})


def answers(**changes: Any) -> Answers:
    """Of three nodes in order; changes by node."""
    facts: dict[str, Facts] = {name: {**facts_of(number), **changes.get(name, {})} for number, name in enumerate(NODES)}
    clocks = {name: Clock(ahead_seconds=0.0, within_seconds=0.001) for name in NODES}
    return Answers(facts=facts, clocks=clocks, folders=dict.fromkeys(NODES, "a"))


def bad(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.node, finding.check, finding.status) for finding in findings if finding.status != "ok"]


def test_nodes_in_order_have_no_finding() -> None:
    found = findings_of(wanted(), answers())
    assert bad(found) == []
    told = {finding.check for finding in found}
    assert told == set(CHECKS) - {"memory", "network"}
    assert {finding.node for finding in found} == set(NODES)
    # Nothing of them depends on there being several.
    alone = findings_of(wanted(nodes=(Node("a", 2),)), Answers(facts={"a": facts_of(0)}, folders={"a": "a"}))
    assert bad(alone) == []


LOCK = {"operator": "deepspeed_shm_comm", "path": "/cache/shm/lock", "age_seconds": 700.0, "identity": "1 2", "holder": "", "is_sure": True}  # fmt: skip
NO_GPUS: dict[str, Any] = {name: {"gpus": []} for name in NODES}


def without_gpus(**changes: Any) -> dict[str, Any]:
    return {name: {"gpus": [], **changes.get(name, {})} for name in NODES}


def with_lock(**changes: Any) -> dict[str, Any]:
    return {"build_cache": {**facts_of(0)["build_cache"], "locks": [{**LOCK, **changes}]}}


# What differs on nodes, what follows, and words of it.
CASES: dict[str, tuple[dict[str, Any], list[tuple[str, str, str]], str]] = {
    "a library": ({"b": {"versions": {**facts_of(0)["versions"], "torch": "2.12"}}}, [("b", "versions", "fail")], "torch 2.12, where a, c has 2.13"),
    "no library": ({"b": {"versions": {**facts_of(0)["versions"], "numpy": None}}}, [("b", "versions", "fail")], "numpy not installed"),
    "a driver": ({"c": {"gpus": [gpu(0, driver="535"), gpu(1, driver="535")]}}, [("c", "versions", "warn")], "driver 535, where a, b has 550.1"),
    "a patch of Python": ({"b": {"versions": {**facts_of(0)["versions"], "python": "3.11.9"}}}, [("b", "versions", "warn")], "python 3.11.9, where a, c has 3.11.2"),
    "another Python": ({"b": {"versions": {**facts_of(0)["versions"], "python": "3.12.2"}}}, [("b", "versions", "fail")], "python 3.12.2"),
    "code": ({"a": {"code": {**facts_of(0)["code"], "digest": "e" * 64}}}, [("a", "code", "fail")], "are not those of b, c"),
    "no code": ({"a": {"code": {"digest": "e", "where": {"launcher": "/x", "models": None}}}}, [("a", "code", "fail")], "models cannot be imported"),
    "a model": ({"b": {"model": {"digest": "n", "bytes": 9}}}, [("b", "model", "fail")], "model.name_or_path model-folder is not the same as on a, c"),
    "unreadable model": ({"b": {"model": {"error": "PermissionError: x"}}}, [("b", "model", "fail")], "cannot be read: PermissionError"),
    "no data": ({"b": {"data.train": {"missing": True}}}, [("b", "data", "fail")], "data.train train.json is not there"),
    "other data": ({"b": {"data.train": {"digest": "u", "bytes": 9}}}, [("b", "data", "fail")], "is not the same as on a, c"),
    "not writable": ({"c": {"output": {"existing": "/", "problem": "Permission denied"}}}, [("c", "output", "fail")], "a file cannot be made in /"),
    "full disk": ({"c": {"output": {**facts_of(0)["output"], "free_bytes": 10**6}}}, [("c", "disk", "fail")], "free in /runs: a checkpoint may not fit"),
    "small disk": ({"c": {"output": {**facts_of(0)["output"], "free_bytes": 10**8}}}, [("c", "disk", "warn")], "may not fit"),
    "few GPUs": ({"b": {"gpus": [gpu(0)]}}, [("b", "gpus", "fail")], "1 GPUs for 2 ranks"),
    "broken driver": ({"b": {"gpus": {"error": "no devices"}}}, [("b", "gpus", "fail")], "nvidia-smi fails: no devices"),
    "small GPU": ({"b": {"gpus": [gpu(0), gpu(1, total_bytes=40 * GIB)]}}, [("b", "gpus", "warn")], "GPU 1 has 40.0 GiB, others 80.0 GiB"),
    "busy GPU": ({"b": {"gpus": [gpu(0), gpu(1, used_bytes=20 * GIB)]}}, [("b", "gpus", "warn")], "GPU 1 has 20.0 GiB of 80.0 GiB in use"),
    "shared GPU": ({"b": {"gpus": [gpu(0), gpu(1, used_bytes=2 * GIB)]}}, [("b", "gpus", "warn")], "in use"),
    "a GPU more than ranks": ({"b": {"gpus": [gpu(0), gpu(1), gpu(2, used_bytes=20 * GIB)]}}, [], ""),
    "shared memory": ({"b": {"shared_memory": {"total_bytes": 2**26, "free_bytes": 2**26}}}, [("b", "shared memory", "warn")], "2 ranks may take 128 MiB"),
    "no shared memory": ({"b": {"shared_memory": {"total_bytes": 2**26, "free_bytes": 2**10}}}, [("b", "shared memory", "fail")], "--shm-size"),
    "open files": ({"b": {"open_files": {"soft": 128, "hard": 4096}}}, [("b", "open files", "fail")], "at most 4096"),
    "some open files": ({"b": {"open_files": {"soft": 300, "hard": 4096}}}, [("b", "open files", "warn")], "6 ranks may need 560"),
    "port": ({"a": {"port": {"problem": "Address already in use", "listener": "python, process 7"}}}, [("a", "port", "fail")], "port 29500, where ranks would meet, cannot be had (address already in use by python, process 7)"),
    "port of another node": ({"b": {"port": {"problem": "Address already in use", "listener": ""}}}, [], ""),
    "stale lock": (without_gpus(b=with_lock()), [("b", "build cache", "fail")], "rm /cache/shm/lock"),
    "young lock": (without_gpus(b=with_lock(age_seconds=590.0)), [("b", "build cache", "warn")], "who holds it is not to be seen"),
    "lock of another user": (without_gpus(b=with_lock(is_sure=False)), [("b", "build cache", "warn")], "if no build is running elsewhere, on b: rm /cache/shm/lock"),
    "lock of another operator": (without_gpus(b=with_lock(operator="cpu_adam")), [], ""),
    "lock that GPUs do not need": ({"b": with_lock()}, [], ""),
    "build on another node": (
        without_gpus(b=with_lock(), c=with_lock(holder="python, process 7")),
        [("b", "build cache", "warn"), ("c", "build cache", "warn")], "is held by python, process 7 on c",
    ),
    "not built": (without_gpus(b={"build_cache": {**facts_of(0)["build_cache"], "missing": ["deepspeed_shm_comm", "fused_adam"]}}), [("b", "build cache", "warn")], "deepspeed_shm_comm not built yet in /cache"),
    "no compiler": (without_gpus(b={"build_cache": {**facts_of(0)["build_cache"], "missing": ["deepspeed_shm_comm"], "no_tools": ["ninja"]}}), [("b", "build cache", "fail")], "and ninja missing there"),
    "read-only cache": (without_gpus(b={"build_cache": {**facts_of(0)["build_cache"], "missing": ["deepspeed_shm_comm"], "is_writable": False}}), [("b", "build cache", "fail")], "which is not writable"),
    "not built, not needed": ({"b": {"build_cache": {**facts_of(0)["build_cache"], "missing": ["deepspeed_shm_comm"]}}}, [], ""),
    "unknown name": ({"b": {"names": {**facts_of(1)["names"], "c": {"error": "gaierror"}}}}, [("b", "names", "warn")], "c has no address there (gaierror)"),
    "another's address": ({"b": {"names": {**facts_of(1)["names"], "c": ["10.0.0.0"]}}}, [("b", "names", "fail")], "by c (10.0.0.0) it means a"),
    "loopback": ({"b": {"names": {**facts_of(1)["names"], "c": ["127.0.1.1"]}}}, [("b", "names", "fail")], "by c (127.0.1.1) it means itself"),
    "own loopback": ({"b": {"names": {**facts_of(1)["names"], "b": ["127.0.0.1"]}}}, [], ""),
    "Debian's own name": ({"b": {"names": {**facts_of(1)["names"], "b": ["127.0.1.1"]}}}, [("b", "names", "warn")], "by its own name b it means 127.0.1.1"),
    "translated address": ({"b": {"names": {**facts_of(1)["names"], "c": ["1.2.3.4"]}}}, [("b", "names", "warn")], "by c it means 1.2.3.4, which c does not have"),
    "a section that hangs": ({"b": {"names": {"error": "no answer within 6 seconds"}}}, [("b", "names", "warn")], "no answer within 6"),
    "a disk that hangs": ({"b": {"output": {"error": "no answer within 6 seconds"}}}, [("b", "output", "fail")], "could not be found out"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_differs_is_found(name: str) -> None:
    changes, expected, words = CASES[name]
    found = findings_of(wanted(), answers(**changes))
    assert sorted(bad(found)) == sorted(expected)
    lines = "\n".join(problem_lines(found))
    assert words in lines
    # Whatever must be mended says how.
    assert lines.count(" -> ") == sum(line[:4] in ("FAIL", "warn") for line in lines.splitlines())


def test_a_minority_is_what_differs() -> None:
    """Of two nodes, the second one differs; of three, the one that is alone."""
    other = {"code": {**facts_of(0)["code"], "digest": "e" * 64}}
    assert bad(findings_of(wanted(), answers(a=other))) == [("a", "code", "fail")]
    two = answers(b=other)
    del two.facts["c"], two.clocks["c"]
    assert bad(findings_of(wanted(nodes=(Node("a", 2), Node("b", 2))), two)) == [("b", "code", "fail")]


def test_the_machine_that_reads_the_config_has_the_nodes_code() -> None:
    assert bad(findings_of(wanted(code_digest="d" * 64), answers())) == []
    assert bad(findings_of(wanted(code_digest="e" * 64), answers())) == [(name, "code", "warn") for name in NODES]


@pytest.mark.parametrize(
    ("address", "resolved", "status"),
    [("a", ["10.0.0.0"], None), ("head", {"error": "unknown"}, "fail"), ("head", ["9.9.9.9"], "fail"), ("head", ["127.0.0.1"], "fail")],
)  # fmt: skip
def test_where_ranks_meet_must_be_known_everywhere(address: str, resolved: Any, status: str | None) -> None:
    names = {name: {"names": {**facts_of(0)["names"], "head": ["10.0.0.0"]}} for name in NODES}
    names["c"]["names"][address] = resolved
    found = findings_of(wanted(master_address=address), answers(**names))
    assert bad(found) == ([] if status is None else [("c", "names", status)])


def test_the_interface_between_nodes_must_be_there() -> None:
    found = findings_of(wanted(config={"cluster.network_interface": "ib0"}), answers())
    assert bad(found) == [(name, "names", "fail") for name in NODES]
    assert "it has no interface ib0 with an address (it has eth0)" in problem_lines(found)[0]


@pytest.mark.parametrize(
    ("ahead", "within", "status"),
    [(0.9, 0.001, "ok"), (-1.1, 0.001, "warn"), (1.1, 0.2, "ok"), (29.0, 0.1, "warn"), (31.0, 0.1, "fail"), (-3600.0, 0.5, "fail")],
)  # fmt: skip
def test_clocks(ahead: float, within: float, status: str) -> None:
    found = answers()
    found.clocks["b"] = Clock(ahead_seconds=ahead, within_seconds=within)
    assert bad(findings_of(wanted(), found)) == ([] if status == "ok" else [("b", "clock", status)])


@pytest.mark.parametrize(("address", "resolved"), [("a", ["127.0.1.1"]), ("head", ["127.0.1.1", "::1"])])
def test_the_first_nodes_own_loopback_is_itself(address: str, resolved: list[str]) -> None:
    """Debian's installer writes 127.0.1.1 for a machine's name; ranks go by the address of its interface."""
    names = {name: {"names": {**facts_of(0)["names"], "head": ["10.0.0.0"]}} for name in NODES}
    names["a"]["names"][address] = resolved
    assert bad(findings_of(wanted(master_address=address), answers(**names))) == [("a", "names", "warn")]
    # On any other node it is that one.
    names["b"]["names"][address] = resolved
    assert ("b", "names", "fail") in bad(findings_of(wanted(master_address=address), answers(**names)))


def test_a_run_on_the_cpu_has_no_gpus_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tools and drivers say that no rank uses."""
    broken = {"gpus": {"error": "no driver"}}
    alone = {"nodes": (Node("a", 2),), "master_port": None}
    for changes in ({"gpus": [gpu(0)]}, broken):
        facts = Answers(facts={"a": {**facts_of(0), **changes}}, folders={"a": "a"})
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert bad(findings_of(wanted(devices=(), **alone), facts)) == [("a", "gpus", "warn")]
        assert bad(findings_of(wanted(devices=(), config={"batch.gpus_per_rank": 0}, **alone), facts)) == []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert bad(findings_of(wanted(devices=(), **alone), facts)) == []
        assert bad(findings_of(wanted(devices=None, **alone), facts)) == [("a", "gpus", "fail")]
    # A job that asks for none.
    config = {"batch.gpus_per_rank": 0}
    found = findings_of(wanted(config=config), answers(**dict.fromkeys(NODES, broken)))
    assert bad(found) == [(name, "gpus", "warn") for name in NODES]


@pytest.mark.parametrize(("shared", "status"), [(True, "fail"), ("auto", "warn"), (False, "ok")])
def test_folders_of_their_own(shared: Any, status: str) -> None:
    found = answers()
    found.folders["c"] = "c"
    expected = [] if status == "ok" else [("c", "output", status)]
    assert bad(findings_of(wanted(config={"output.shared": shared}), found)) == expected


def test_a_disk_must_hold_what_is_forecast() -> None:
    facts = {"b": {"output": {**facts_of(0)["output"], "free_bytes": 3 * GIB}}}
    assert bad(findings_of(wanted(output_bytes=4 * GIB), answers(**facts))) == [("b", "disk", "fail")]
    assert bad(findings_of(wanted(output_bytes=2 * GIB), answers(**facts))) == [("b", "disk", "warn")]
    assert bad(findings_of(wanted(output_bytes=GIB), answers(**facts))) == []
    # What is there is replaced.
    held = {"b": {"output": {**facts["b"]["output"], "held_bytes": 2 * GIB}}}
    assert bad(findings_of(wanted(output_bytes=4 * GIB), answers(**held))) == [("b", "disk", "warn")]
    held["b"]["output"]["free_bytes"] = 2**20
    assert bad(findings_of(wanted(output_bytes=2**20), answers(**held))) == [("b", "disk", "fail")]
    # A merged model is as large as the base.
    facts["b"]["model"] = {"digest": "m", "bytes": 13 * GIB}
    merged = wanted(output_bytes=GIB, config={"output.merged": True})
    assert ("b", "disk", "fail") in bad(findings_of(merged, answers(**facts)))


@pytest.mark.parametrize(
    ("code", "said", "what", "remedy"),
    [
        (255, "ssh: Could not resolve hostname x: Name or service not known", "its name is not known here", "DNS"),
        (255, "ssh: connect to host x port 22: Connection timed out", "no way to it (connection timed out)", "firewall"),
        (255, "ssh: connect to host x port 22: No route to host", "no way to it (no route to host)", "firewall"),
        (255, "Connection timed out during banner exchange", "no way to it", "firewall"),
        (255, "ssh: connect to host x port 22: Connection refused", "connection refused", "sshd"),
        (255, "@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n@@@\nHost key verification failed.", "another host key", "ssh-keygen -R x"),
        (255, "No ED25519 host key is known for x and you have requested strict checking.\nHost key verification failed.", "is not known to ssh", "connect once by hand (ssh me@x)"),
        (255, "me@x: Permission denied (publickey,password).", "permission denied", "ssh-copy-id me@x"),
        (127, "bash: line 1: exec: /py: not found", "the interpreter /py cannot be started", "same path"),
        (2, "/py: can't open file '/c/launcher/preflight/node_probe.py': [Errno 2] No such file or directory", "not at the same place", "as it is here"),
        (1, "ModuleNotFoundError: No module named 'psutil'", "psutil is missing", "same environment"),
        (None, "", "no answer within 8 seconds", "cluster.node_timeout"),
        (3, "what is this?", "(code 3): what is this?", "ssh me@x /py --version"),
    ],
)  # fmt: skip
def test_why_a_node_is_silent(code: int | None, said: str, what: str, remedy: str) -> None:
    found = explain_silence("me@x", Silence(code=code, said=said, seconds=8.0), python="/py")
    assert (found.status, found.check) == ("fail", "reachable")
    assert what in found.what
    assert remedy in found.remedy


def test_a_launch_leaves_to_the_supervisor_who_does_not_answer() -> None:
    found = answers(b={"data.train": {"missing": True}}, a={"data.train": {"missing": True}})
    del found.facts["c"], found.clocks["c"]
    found.silent["c"] = Silence(code=255, said="x: Connection refused", seconds=1.0)
    every = findings_of(wanted(), found)
    # b stands by.
    judged = as_of_launch(every, starting=["a", "c"])
    assert bad(judged) == [("c", "reachable", "warn"), ("a", "data", "fail"), ("b", "data", "warn")]


def test_a_launch_warns_of_what_may_mend_itself() -> None:
    """A lock that a node outside of the run may hold, a name that a job's network has yet to get."""
    names = {**facts_of(0)["names"], "head": ["10.0.0.0"]}
    changes = without_gpus(b=with_lock())
    for each in changes.values():
        each["names"] = names
    changes["c"]["names"] = {**names, "head": {"error": "gaierror"}}
    every = findings_of(wanted(master_address="head"), answers(**changes))
    assert bad(every) == [("c", "names", "fail"), ("b", "build cache", "fail")]
    assert bad(as_of_launch(every, NODES)) == [("c", "names", "warn"), ("b", "build cache", "warn")]


@pytest.mark.parametrize("name", CASES)
def test_what_a_launch_refuses_the_doctor_refuses(name: str) -> None:
    """The launch has no forecast of what is written."""
    found = answers(**CASES[name][0])
    at_launch = as_of_launch(findings_of(wanted(), found), NODES)
    for output_bytes in (0, GIB, 1000 * GIB):
        by_doctor = findings_of(wanted(output_bytes=output_bytes), found)
        assert {each for each in bad(at_launch) if each[2] == "fail"} <= set(bad(by_doctor))


@pytest.mark.parametrize(
    ("need", "gpus", "expected"),
    [
        (Need(gpu_bytes=70 * GIB), True, []),
        (Need(gpu_bytes=79 * GIB), True, ["fail"]),
        (Need(gpu_bytes=GIB, host_bytes=40 * GIB), True, ["fail"]),
        (Need(gpu_bytes=GIB, host_bytes=31 * GIB), True, ["warn"]),
        (Need(tensor_bytes=GIB), False, []),
        (Need(tensor_bytes=20 * GIB, host_bytes=12 * GIB), False, ["fail"]),
        (Need(problem="no closed form"), False, ["warn"]),
    ],
)
def test_memory(need: Need, gpus: bool, expected: list[str]) -> None:
    found = check_memory(wanted(), answers(**({} if gpus else NO_GPUS)), need)
    assert bad(found) == [(name, "memory", status) for name in NODES for status in expected]


def test_who_did_not_come() -> None:
    done = Came(stage="done", bus_bytes_per_second=2e9)
    assert bad(check_network(wanted(), dict.fromkeys(NODES, done))) == []
    found = check_network(wanted(), {"a": Came(stage="met", missing=["c"]), "b": Came(stage="met", missing=["c"]), "c": Came(stage="started", error="timeout")})  # fmt: skip
    assert bad(found) == [(name, "network", "fail") for name in NODES]
    told = {finding.node: f"{finding.what} -> {finding.remedy}" for finding in found}
    assert "but c did not come" in told["a"]
    assert "it did not reach a at port 29500 (timeout)" in told["c"]
    assert "firewall" in told["c"]
    found = check_network(wanted(), dict.fromkeys(NODES, Came(stage="met", error="Connection closed by peer")))
    assert "could not exchange with them (Connection closed by peer)" in found[0].what
    assert "cluster.network_interface" in found[0].remedy


@pytest.mark.parametrize(
    ("optimizer", "offload", "on_cpus", "on_gpus"),
    [
        ("adamw", "none", ["deepspeed_shm_comm"], []),
        ("adamw", "cpu", ["deepspeed_shm_comm"], []),
        ("deepspeed_adamw", "none", ["deepspeed_shm_comm", "cpu_adam"], ["fused_adam"]),
        ("deepspeed_adamw", "cpu", ["deepspeed_shm_comm", "cpu_adam"], ["cpu_adam"]),
        ("lion", "none", ["deepspeed_shm_comm", "cpu_lion"], ["fused_lion"]),
    ],
)
def test_operators_that_are_compiled(optimizer: str, offload: str, on_cpus: list[str], on_gpus: list[str]) -> None:
    config = wanted(config={"training.optimizer": optimizer, "zero.offload_optimizer": offload, "zero.stage": 2}).config
    assert list(operators_of(config, has_gpus=False)) == on_cpus
    assert list(operators_of(config, has_gpus=True)) == on_gpus


@pytest.mark.parametrize("age", [7.0, 700.0])
def test_nothing_is_built_beside_a_lock_that_nobody_is_seen_to_hold(age: float) -> None:
    """It would wait for ever."""
    cache = {**facts_of(0)["build_cache"], "locks": [{**LOCK, "age_seconds": age}], "missing": ["deepspeed_shm_comm"]}
    found = answers(**without_gpus(**{name: {"build_cache": cache} for name in NODES}))
    before = findings_of(wanted(), found)
    assert build_missing(wanted(), found, before) == before


def test_many_nodes_fit_a_terminal() -> None:
    names = [f"a-rather-long-name-of-a-node-{number:03d}.cluster.example" for number in range(64)]
    # Ten kinds of nodes.
    statuses: tuple[Status, ...] = ("ok", "warn", "fail")
    found = [
        Finding(
            node=name, check=check, status=statuses[row % 3 if row == number % 10 else 0], what="[red]x" * 9, remedy="y"
        )
        for number, name in enumerate(names)
        for row, check in enumerate(CHECKS[:13])
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    for table in result_tables(names, found):
        console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    # Nodes of the same results share a column: eight are left, four beside each other, and every cell is whole.
    groups = {tuple(each.status for each in found if each.node == name) for name in names}
    assert sum("reachable" in line for line in lines) == -(-len(groups) // 4) == 2
    words = " ".join(lines).split()
    assert (words.count("FAIL"), words.count("warn")) == (3, 3)
    odd = [Finding(node="a", check="data", status="fail", what="a\nb\x1b[2J", remedy="c\td")]
    assert problem_lines(odd) == ["FAIL a: data: a b?[2J", "     -> c d"]
    assert "[red]" in "\n".join(problem_lines(found))


def test_what_is_said_of_many_nodes_is_said_once() -> None:
    found = [
        Finding(node=name, check="data", status="fail", what="it is not there", remedy="copy it") for name in NODES
    ]
    found.append(Finding(node="a", check="disk", status="warn", what="little"))
    assert problem_lines(found) == ["FAIL a, b, c: data: it is not there", "     -> copy it", "warn a: disk: little"]
    assert "3 failed, 1 warning" in verdict(found, 1.0)
    told = as_json(NODES, found, [], 1.0)
    assert not told["ok"]
    assert as_json(NODES, found[3:], [], 1.0)["ok"]
    assert has_failed(found)
    assert not has_failed([finding.as_warning() for finding in found])
    assert dataclasses.asdict(found[0]) == {**told["findings"][0], "lets_launch": False}


def test_gpus_as_nvidia_smi_lists_them() -> None:
    text = "0, 550.54.15, 81559, 4, NVIDIA H100 80GB HBM3\n1, 550.54.15, [N/A], [N/A], NVIDIA GH200, 480GB\nrubbish\n"
    first, second = parse_gpus(text)
    assert first == {"index": 0, "driver": "550.54.15", "total_bytes": 81559 * 2**20, "used_bytes": 4 * 2**20, "name": "NVIDIA H100 80GB HBM3"}  # fmt: skip
    assert (second["total_bytes"], second["name"]) == (None, "NVIDIA GH200, 480GB")


def test_digests_of_files(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write_tiny_llama(folder)
    before = model_facts(str(folder), None, None)
    assert before["bytes"] == (folder / "model.safetensors").stat().st_size
    assert model_facts(str(folder), None, None) == before
    for name in ("config.json", "tokenizer.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + b" ")
        assert model_facts(str(folder), None, None)["digest"] != before["digest"]
        (folder / name).write_bytes(kept)
    (folder / "model.safetensors").write_bytes(b"x")
    assert model_facts(str(folder), None, None)["digest"] != before["digest"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        model_facts(str(folder), None, None)
    assert model_facts(str(tmp_path / "none"), None, None) == {"missing": True}
    # What is missing of it, ranks would miss.
    write_tiny_llama(folder)
    tokenizer = tokenizer_facts(str(folder))
    for path in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        model_facts(str(folder), None, None)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        tokenizer_facts(str(folder))
    model_facts(str(folder), None, "/words")
    assert tokenizer["bytes"] > 0
    assert tokenizer_facts(str(tmp_path / "none")) == {"missing": True}
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        model_facts(str(folder), None, "/words")
    (folder / "all.gguf").write_bytes(b"x")
    assert model_facts(str(folder), "all.gguf", None)["bytes"] == 1

    # Of a large file, the beginning and the end.
    monkeypatch.setattr("launcher.preflight.node_probe._HASHED_BYTES", 8)
    path = tmp_path / "train.json"
    digests = set()
    for content in (b"0123456789abcdef", b"x123456789abcdef", b"0123456789abcdex", b"0123456789abcde"):
        path.write_bytes(content)
        digests.add(content_digest(path))
        assert data_facts(str(path), "train")["digest"] == data_facts(str(tmp_path), "train")["digest"]
    assert len(digests) == 4
    assert data_facts(str(tmp_path), "test") == {"missing": True, "split": "test"}


def test_names_of_the_hub_are_not_looked_for() -> None:
    missing = {name: {"model": {"missing": True}, "data.train": {"missing": True}} for name in NODES}
    config = {"model.name_or_path": "owner/model", "data.train": "owner/records:main"}
    found = findings_of(wanted(config=config), answers(**missing))
    assert bad(found) == []
    assert {each.what for each in found if each.check == "model"} == {"owner/model, a name of the hub: not looked at"}
    # What would be read as a file is none of the hub's names, though it looks like one.
    for train in ("data/train.json", "data/train.JSONL"):
        found = findings_of(wanted(config={"data.train": train}), answers(**missing))
        assert {each for each in bad(found) if each[1] == "data"} == {(name, "data", "fail") for name in NODES}
    # A folder that one node has and another lacks.
    assert bad(findings_of(wanted(config=config), answers(b={"model": {"missing": True}}))) == [("b", "model", "fail")]


def test_a_tokenizer_of_its_own_is_looked_for_like_a_model() -> None:
    config = {"model.tokenizer": "/words"}
    same = {name: {"tokenizer": {"digest": "w", "bytes": 3}} for name in NODES}
    assert bad(findings_of(wanted(config=config), answers(**same))) == []
    for changed in ({"missing": True}, {"error": "FileNotFoundError: no"}, {"digest": "v", "bytes": 3}):
        found = findings_of(wanted(config=config), answers(**{**same, "b": {"tokenizer": changed}}))
        assert bad(found) == [("b", "model", "fail")]
        assert "model.tokenizer /words" in "\n".join(problem_lines(found))
    hub = {name: {"tokenizer": {"missing": True}} for name in NODES}
    assert bad(findings_of(wanted(config={"model.tokenizer": "owner/words"}), answers(**hub))) == []


def test_folders_for_what_is_put_aside_must_be_there(tmp_path: Path) -> None:
    config = {"zero.nvme_path": "/nvme", "selection.accumulator_folder": "/sums"}
    there: dict[str, Any] = {"zero.nvme_path": {}, "selection.accumulator_folder": {}}
    assert bad(findings_of(wanted(config=config), answers(**dict.fromkeys(NODES, there)))) == []
    changed = {name: dict(there) for name in NODES}
    changed["b"]["zero.nvme_path"] = {"problem": "it is not there"}
    found = findings_of(wanted(config=config), answers(**changed))
    assert bad(found) == [("b", "output", "fail")]
    assert "zero.nvme_path is /nvme: it is not there" in problem_lines(found)[0]
    (tmp_path / "file").touch()
    assert folder_facts(str(tmp_path)) == {}
    assert folder_facts(str(tmp_path / "none")) == {"problem": "it is not there"}
    assert folder_facts(str(tmp_path / "file")) == {"problem": "it is a file"}


def test_facts_are_not_changed_by_checks() -> None:
    found = answers(b={"model": {"missing": True}})
    before = copy.deepcopy(found)
    findings_of(wanted(), found)
    assert found == before
