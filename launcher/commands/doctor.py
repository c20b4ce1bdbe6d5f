"""`sparse-zero doctor`: will a run start on these nodes, and if not, what is to be mended?"""

import argparse
import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from launcher.commands.common import Parser, add_command, read_run
from launcher.commands.launch import master_port_of, nodes_of, ranks_of
from launcher.starting.nodes import choose_nodes, limits_of, standing_by
from launcher.starting.start_files import exported_variables
from launcher.stopping import EXIT_INPUT

if TYPE_CHECKING:
    from launcher.config import RunConfig
    from launcher.preflight.wanted import Wanted


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "doctor",
        "check every node of the cluster section before a run starts there",
        """
sparse-zero doctor --config run.yaml                   all checks, on all nodes of the cluster section
sparse-zero doctor --config run.yaml --no-network      without the ranks that meet and measure the network
sparse-zero doctor --config run.yaml --no-build        without building DeepSpeed's operators
sparse-zero doctor --config run.yaml --json            for programs

Exit code: 0 nothing is to be mended (there may be warnings), 2 something is.
""",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    parser.add_argument(
        "--no-network", action="store_true", help="leave out that one process a node meets the others and measures"
    )
    parser.add_argument("--no-build", action="store_true", help="only say which operators are not built yet")
    return parser


def _wanted(config: "RunConfig") -> "tuple[Wanted, str | None]":
    """What the run needs, as `sparse-zero launch` would start it, and what is said of nodes that it does not use."""
    from launcher.preflight.wanted import wanted_of

    per_node, devices = ranks_of(config)
    nodes = nodes_of(config.cluster, per_node)
    limits = limits_of(config.cluster, nodes) if nodes else None
    chosen = choose_nodes(nodes, limits) if limits else ()
    wanted = wanted_of(
        config,
        nodes,
        ranks_here=per_node,
        world_size=sum(node.slots for node in chosen) or (per_node or 1) * config.cluster.num_nodes,
        master_port=master_port_of(config),
        environment=exported_variables(config.cluster, os.environ),
        devices=devices,
    )
    return wanted, standing_by(config.cluster, nodes, chosen)


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    from launcher.preflight.building import build_missing
    from launcher.preflight.examining import ask, findings_of, in_order
    from launcher.preflight.findings import has_failed
    from launcher.preflight.memory_check import check_memory, forecast_need
    from launcher.preflight.rendezvous import check_network, meet
    from launcher.preflight.run_folder_check import check_run_folder
    from launcher.preflight.table import as_json, show
    from sparse_zero.files import to_json

    started = time.monotonic()
    config = read_run(args)
    wanted, left = _wanted(config)
    with ThreadPoolExecutor(1) as pool:
        # Importing what it needs takes as long as the nodes do.
        forecast = pool.submit(forecast_need, config, wanted.world_size)
        answers = ask(wanted, seconds=config.cluster.node_timeout, waits_for_all=True)
        need = forecast.result()
    findings = findings_of(dataclasses.replace(wanted, output_bytes=need.output_bytes), answers)
    findings += [*check_run_folder(wanted), *check_memory(wanted, answers, need)]
    if not args.no_build:
        findings = build_missing(wanted, answers, findings)
    # Where somebody else listens, nobody can meet: that is said already.
    if not args.no_network and not any(each.check == "port" and each.status == "fail" for each in findings):
        findings += check_network(wanted, meet(wanted, answers))
    findings = in_order(wanted, findings)
    notes = [] if left is None else [f"note: {left}"]
    if not wanted.is_whole:
        notes.append(
            "note: with cluster.launcher torchrun each of the nodes runs its own command: this is about this one only, "
            "run it on the others as well"
        )
    names, seconds = [node.name for node in wanted.nodes], time.monotonic() - started
    if args.json:
        print(to_json(as_json(names, findings, notes, seconds), indent=2))
    else:
        show(names, findings, notes, seconds)
    return EXIT_INPUT if has_failed(findings) else 0
