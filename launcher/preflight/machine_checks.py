"""Has each node the devices, the room and the limits that the run's ranks need?"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.preflight.asking import Answers, Facts
from launcher.preflight.findings import Finding, Status
from launcher.preflight.same_checks import untold
from launcher.preflight.wanted import Wanted
from launcher.summary import format_bytes

# What a driver or a desktop takes stays below both.
_BUSY_BYTES, _BUSY_FRACTION = 2**30, 0.1
# GPUs of one name differ by little; less than this much of the largest is another GPU.
_EQUAL_FRACTION = 0.95
# Logs and metrics alone take the one. Where no forecast says how much a run writes, a checkpoint may take the other.
_DISK_FAIL_BYTES, _DISK_WARN_BYTES = 4 * 2**20, 256 * 2**20
# A lock that nobody is seen to hold may be of a node or container that is not asked, as long as a build may take.
BUILD_SECONDS = 600.0
# NCCL's buffers between two ranks of a node take some 10 MiB, DeepSpeed's on a CPU 64 MiB; containers get 64 MiB in all
# unless told otherwise.
_SHARED_PER_RANK_BYTES, _SHARED_FAIL_BYTES = 64 * 2**20, 4 * 2**20
# Libraries, files and threads of a rank take some 200; gloo and NCCL have sockets to each other rank in each group.
_FILES_BASE, _FILES_PER_RANK, _FILES_FAIL = 512, 8, 256


def gpus_of(facts: Facts, devices: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The GPUs of a node that ranks may use.

    Args:
        facts: of the node.
        devices: ids that the environment allows; other words than numbers choose none out.
    """
    found = facts["gpus"]
    gpus = found if isinstance(found, list) else []
    if devices is None or not all(device.isdecimal() for device in devices):
        return gpus
    return [gpu for gpu in gpus if str(gpu["index"]) in devices]


def has_gpus(wanted: Wanted, answers: Answers) -> bool:
    """Whether ranks compute on GPUs: some node has them."""
    return any(gpus_of(facts, wanted.devices) for facts in answers.facts.values())


def check_gpus(wanted: Wanted, answers: Answers) -> list[Finding]:
    """As many as ranks, as large as the others', and not in use; a cluster without any computes on CPUs."""
    gpus = {node: gpus_of(facts, wanted.devices) for node, facts in answers.facts.items()}
    found: list[Finding] = []
    if wanted.devices is not None and not wanted.devices:
        # Drivers and tools that no rank uses may be as they are.
        return [_without_gpus(wanted, node, facts) for node, facts in answers.facts.items()]
    slots = {node.name: node.slots for node in wanted.nodes}
    largest = max((gpu["total_bytes"] or 0 for each in gpus.values() for gpu in each), default=0)
    for node, facts in answers.facts.items():
        if not isinstance(facts["gpus"], list):
            error = facts["gpus"]["error"]
            remedy = "have the driver mended there (nvidia-smi must list the GPUs)"
            what = f"nvidia-smi fails: {error}"
            status: Status = "fail" if wanted.config.batch.gpus_per_rank else "warn"
            found.append(Finding(node=node, check="gpus", status=status, what=what, remedy=remedy))
        elif not any(gpus.values()):
            found.append(Finding(node=node, check="gpus", what="none anywhere: ranks compute on CPUs"))
        elif len(gpus[node]) < slots[node]:
            found.append(
                Finding(
                    node=node,
                    check="gpus",
                    status="fail",
                    what=f"{len(gpus[node])} GPUs for {slots[node]} ranks",
                    remedy="lower its slots in the hostfile or cluster.ranks_per_node, or see why GPUs are missing",
                )
            )
        else:
            found += _gpu_problems(node, gpus[node][: slots[node]], largest) or [
                Finding(node=node, check="gpus", what=_gpu_names(gpus[node]))
            ]
    return found


def _without_gpus(wanted: Wanted, node: str, facts: Facts) -> Finding:
    """Of a node on which torch has no GPU: a warning where that is hardly meant."""
    what = "torch has no GPU here: ranks compute on the CPU"
    is_meant = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not wanted.config.batch.gpus_per_rank
    if is_meant or not facts["gpus"]:
        return Finding(node=node, check="gpus", what=what)
    says = "lists some" if isinstance(facts["gpus"], list) else f"fails: {facts['gpus']['error']}"
    return Finding(
        node=node,
        check="gpus",
        status="warn",
        what=f"{what}, where nvidia-smi {says}",
        remedy="if it is to use GPUs, have the driver mended or a torch for CUDA installed; if not, set "
        "CUDA_VISIBLE_DEVICES to nothing",
    )


def _gpu_names(gpus: Sequence[Mapping[str, Any]]) -> str:
    counted = Counter(gpu["name"] for gpu in gpus)
    return ", ".join(f"{number} x {name}" for name, number in counted.items())


def _gpu_problems(node: str, gpus: Sequence[Mapping[str, Any]], largest: int) -> list[Finding]:
    found = []
    for gpu in gpus:
        total, used = gpu["total_bytes"], gpu["used_bytes"]
        if total is None:  # A GPU that shares the host's memory does not tell.
            continue
        if total < _EQUAL_FRACTION * largest:
            found.append(
                Finding(
                    node=node,
                    check="gpus",
                    status="warn",
                    what=f"GPU {gpu['index']} has {format_bytes(total)}, others {format_bytes(largest)}",
                    remedy="the smallest one decides what fits: leave this node out, or plan for it",
                )
            )
        if used is not None and used > min(_BUSY_BYTES, _BUSY_FRACTION * total):
            found.append(
                Finding(
                    node=node,
                    check="gpus",
                    status="warn",  # How much of it ranks need, the check of memory says.
                    what=f"GPU {gpu['index']} has {format_bytes(used)} of {format_bytes(total)} in use",
                    remedy="end what uses it (nvidia-smi lists the processes), or leave it out",
                )
            )
    return found


def check_disk(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Room where the run folder is or will be."""
    found = []
    for node, facts in answers.facts.items():
        output = facts["output"]
        if "free_bytes" not in output:
            continue  # Said by the check of the folder.
        free, place = output["free_bytes"], f"{format_bytes(output['free_bytes'])} free in {output['existing']}"
        merged = facts["model"].get("bytes", 0) if wanted.config.output.merged else 0
        # What the folder holds is replaced as the run goes on.
        held = output.get("held_bytes", 0)
        if wanted.output_bytes is None:
            fail, warn, why = _DISK_FAIL_BYTES, merged + _DISK_WARN_BYTES - held, "a checkpoint may not fit"
        else:
            needed = merged + wanted.output_bytes
            fail, warn = max(_DISK_FAIL_BYTES, needed - held), 2 * needed - held
            why = f"the run writes about {format_bytes(needed)}"
            why += f", of which output.folder holds {format_bytes(held)}" if held else ""
        if free >= max(fail, warn):
            found.append(Finding(node=node, check="disk", what=place))
            continue
        found.append(
            Finding(
                node=node,
                check="disk",
                status="fail" if free < fail else "warn",
                what=f"{place}: {why}",
                remedy="make room, name another output.folder, or lower checkpoint.keep",
            )
        )
    return found


def check_shared_memory(wanted: Wanted, answers: Answers) -> list[Finding]:
    """/dev/shm, through which ranks of one node exchange."""
    found = []
    slots = {node.name: node.slots for node in wanted.nodes}
    for node, facts in answers.facts.items():
        shared = facts["shared_memory"]
        problem = untold(node, "shared memory", shared)
        needed = _SHARED_PER_RANK_BYTES * slots[node]
        what = "" if problem else f"{format_bytes(shared['free_bytes'])} free in /dev/shm"
        if problem is None and slots[node] > 1 and shared["free_bytes"] < needed:
            problem = Finding(
                node=node,
                check="shared memory",
                status="fail" if shared["free_bytes"] < _SHARED_FAIL_BYTES else "warn",
                what=f"{what}, and {slots[node]} ranks may take {format_bytes(needed)}",
                remedy="remove what earlier runs left in it, or make it larger (docker run --shm-size=8g)",
            )
        found.append(problem or Finding(node=node, check="shared memory", what=what))
    return found


def check_open_files(wanted: Wanted, answers: Answers) -> list[Finding]:
    """The limit of open files, which sockets count against."""
    found = []
    needed = _FILES_BASE + _FILES_PER_RANK * wanted.world_size
    for node, facts in answers.facts.items():
        limits = facts["open_files"]
        problem = untold(node, "open files", limits)
        if problem is None and limits["soft"] < needed:
            problem = Finding(
                node=node,
                check="open files",
                status="fail" if limits["soft"] < _FILES_FAIL else "warn",
                what=f"{limits['soft']} may be open in one process, and {wanted.world_size} ranks may need {needed}",
                remedy=f"raise it: ulimit -n, or nofile in limits.conf (at most {limits['hard']} now)",
            )
        found.append(problem or Finding(node=node, check="open files", what=f"{limits['soft']} may be open"))
    return found


def _is_master(wanted: Wanted, facts: Facts) -> bool:
    """Whether ranks meet on this node, by the addresses of ``cluster.master_address``."""
    resolved = facts["names"].get(wanted.master_address, ())
    return isinstance(resolved, list) and bool(set(resolved) & set(facts["network"].get("addresses", ())))


def check_port(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Where ranks meet, nobody else listens."""
    found = []
    for node, facts in answers.facts.items():
        port = facts["port"]
        if wanted.master_port is None or wanted.master not in (None, node):
            continue
        if not wanted.is_whole and not _is_master(wanted, facts):
            continue
        problem = untold(node, "port", port)
        if problem is None and "problem" in port:
            why = f"{port['problem'].lower()}{' by ' + port['listener'] if port['listener'] else ''}"
            problem = Finding(
                node=node,
                check="port",
                status="fail",
                what=f"port {wanted.master_port}, where ranks would meet, cannot be had ({why})",
                remedy="end what listens there (an earlier run?), or set another cluster.master_port",
            )
        found.append(problem or Finding(node=node, check="port", what=f"{wanted.master_port} is free"))
    return found


def check_build_cache(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Where DeepSpeed's operators are compiled: no build that was killed, what is missing can be built."""
    found = []
    operators = wanted.gpu_operators if has_gpus(wanted, answers) else wanted.cpu_operators
    locks, holders = _locks(answers, operators)
    for node, facts in answers.facts.items():
        cache = facts["build_cache"]
        problem = untold(node, "build cache", cache)
        if problem is not None:
            found.append(problem)
            continue
        problems = [_lock_problem(node, lock, holders.get(lock["identity"], "")) for lock in locks[node]]
        missing = [name for name in operators if name in cache["missing"]]
        problems += _missing_problem(node, cache, missing) if missing else []
        found += problems or [
            Finding(node=node, check="build cache", what=f"nothing is to be built ({cache['folder']})")
        ]
    return found


def _locks(answers: Answers, operators: Sequence[str]) -> tuple[dict[str, list[Mapping[str, Any]]], dict[str, str]]:
    """The locks of those operators, by node, and of each lock that is held, by its identity, who holds it."""
    locks = {
        node: [lock for lock in facts["build_cache"].get("locks", ()) if lock["operator"] in operators]
        for node, facts in answers.facts.items()
    }
    holders = {
        lock["identity"]: f"{lock['holder']} on {node}"
        for node, each in locks.items()
        for lock in each
        if lock["holder"]
    }
    return locks, holders


def nodes_with_lone_locks(answers: Answers, operators: Sequence[str]) -> set[str]:
    """Nodes on which nobody is seen to hold a lock of one of those operators: a build there may wait for ever."""
    locks, holders = _locks(answers, operators)
    return {node for node, each in locks.items() if any(lock["identity"] not in holders for lock in each)}


def _lock_problem(node: str, lock: Mapping[str, Any], holder: str) -> Finding:
    if holder:
        return Finding(
            node=node,
            check="build cache",
            status="warn",
            what=f"{lock['path']} is held by {holder}: an operator is being built",
            remedy="ranks will wait for it",
        )
    remedy = f"if no build is running elsewhere, on {node}: rm {shlex.quote(lock['path'])}"
    age = f"{lock['age_seconds']:.0f} s old"
    if lock["age_seconds"] < BUILD_SECONDS or not lock["is_sure"]:
        return Finding(
            node=node,
            check="build cache",
            status="warn",
            what=f"{lock['path']} is {age}, and who holds it is not to be seen: ranks wait for it",
            remedy=remedy,
        )
    return Finding(
        node=node,
        check="build cache",
        status="fail",
        what=f"{lock['path']} is {age} and nobody holds it, as a build that was killed leaves it: ranks wait for ever",
        remedy=remedy,
        lets_launch=True,  # A node that is not asked may see the same folder.
    )


def _missing_problem(node: str, cache: Mapping[str, Any], missing: Sequence[str]) -> list[Finding]:
    what = f"{', '.join(missing)} not built yet in {cache['folder']}"
    if not cache["is_writable"]:
        remedy = "give this user the right to write there, or set TORCH_EXTENSIONS_DIR"
        what = f"{what}, which is not writable"
    elif cache["no_tools"]:
        remedy = "install a C++ compiler (apt-get install g++) and ninja (pip install ninja)"
        what = f"{what}, and {' and '.join(cache['no_tools'])} missing there"
    else:
        remedy = "sparse-zero doctor builds it; else the first start does, which takes a minute or two"
        return [Finding(node=node, check="build cache", status="warn", what=what, remedy=remedy)]
    return [Finding(node=node, check="build cache", status="fail", what=what, remedy=remedy)]


MACHINE_CHECKS: tuple[Callable[[Wanted, Answers], list[Finding]], ...] = (
    check_gpus,
    check_disk,
    check_shared_memory,
    check_open_files,
    check_port,
    check_build_cache,
)
