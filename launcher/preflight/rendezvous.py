"""Do the nodes meet where the ranks will, and how fast is the network between them?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.preflight import rendezvous_probe
from launcher.preflight.asking import Answers, Talk, Talks, with_each
from launcher.preflight.findings import Finding
from launcher.preflight.machine_checks import gpus_of, has_gpus
from launcher.preflight.wanted import Wanted, python_path
from launcher.starting.nodes import Start, master_of
from launcher.starting.reach import reach_of

# Importing torch from a network file system, in bad luck, and a few exchanges.
_SECONDS = 60.0
# Enough that latency does not matter; what gloo moves over 1 Gbit/s in a tenth of a second.
_NCCL_BYTES, _GLOO_BYTES = 64 * 2**20, 8 * 2**20


@dataclass(kw_only=True)
class Came:
    """How far the process of a node came."""

    # Of launcher.preflight.rendezvous_probe; empty: it said nothing.
    stage: str = ""
    # Nodes that it waited for in vain.
    missing: Sequence[str] = field(default_factory=list)
    bus_bytes_per_second: float | None = None
    # What it, or ssh, said of its end.
    error: str = ""


def meet(wanted: Wanted, answers: Answers) -> dict[str, Came]:
    """Start a process on every node that has answered, and have them meet; nothing where there is only one."""
    nodes = [node for node in wanted.nodes if node.name in answers.facts]
    if len(nodes) < 2:
        return {}
    interfaces = {name: facts["network"].get("interfaces", {}) for name, facts in answers.facts.items()}
    start = Start(nodes=tuple(nodes), restarts=0, record="", addresses=interfaces)
    nccl = has_gpus(wanted, answers) and all(gpus_of(answers.facts[node.name]) for node in nodes)
    asked = {
        "names": [node.name for node in nodes],
        "address": master_of(wanted.config.cluster, wanted.nodes[0], start),
        "port": wanted.master_port,
        "backend": "nccl" if nccl else "gloo",
        "num_bytes": _NCCL_BYTES if nccl else _GLOO_BYTES,
        "environment": dict(wanted.environment),
        "python_path": python_path(wanted.config),
        "seconds": _SECONDS,
    }
    reach, deadline = reach_of(wanted.config.cluster), time.monotonic() + _SECONDS
    with Talks() as talks:
        for rank, node in enumerate(nodes):
            talks.start(node, reach, Path(rendezvous_probe.__file__), {**asked, "rank": rank})

        def follow(talk: Talk) -> Came:
            came = Came()
            while (line := talk.answer(deadline)) is not None:
                came.stage = line.get("stage", came.stage)
                came.missing = line.get("missing", came.missing)
                came.error = line.get("error", came.error)
                came.bus_bytes_per_second = line.get("bus_bytes_per_second")
            if came.stage != "done" and not came.error:
                said = talk.why()[1].splitlines()
                came.error = said[-1].strip() if said else ""
            return came

        return dict(zip([node.name for node in nodes], with_each(talks.all, follow), strict=True))


def check_network(wanted: Wanted, came: Mapping[str, Came]) -> list[Finding]:
    """Which nodes did not come, how far the others did, and how fast they exchanged."""
    found = []
    first = next(iter(came), "")
    absent = [node for node, each in came.items() if each.stage in ("", "started")]
    for node, each in came.items():
        told = f" ({each.error})" if each.error else ""
        status, what, remedy = "fail", "", ""
        if each.stage == "done":
            speed = each.bus_bytes_per_second or 0.0
            what, status = f"{speed / 1e9:.3g} GB/s between {len(came)} nodes", "ok"
        elif each.stage == "":
            what = f"its process did not start{told}"
            remedy = "see whether torch can be imported there within a minute"
        elif each.stage == "started":
            what = f"it did not reach {first} at port {wanted.master_port}{told}"
            remedy = (
                f"let a firewall pass that port (and those above 1024, for the ranks' own connections) to {first}, or "
                "set cluster.master_address to an address of it in the nodes' network"
            )
            if node == first:
                remedy = "end what listens there, or set another cluster.master_port"
        elif absent:
            what = f"it met the others, but {', '.join(absent)} did not come"
            remedy = f"see what is said of {', '.join(absent)}"
        else:
            what = f"it met the others, but could not exchange with them{told}"
            remedy = (
                "set cluster.network_interface to the one between the nodes, and let a firewall pass all ports there"
            )
        found.append(_finding(node, status, what, remedy))
    return found


def _finding(node: str, status: Any, what: str, remedy: str) -> Finding:
    return Finding(node=node, check="network", status=status, what=what, remedy=remedy)
