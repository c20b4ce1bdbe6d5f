"""`sparse-zero plan`: how much memory each rank of a run will hold, before anything is loaded."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from launcher.commands.common import Parser, add_command, read_run
from launcher.run_folder import check_out_file
from launcher.summary import format_bytes
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json

# A run that needs more of a GPU than this share is at the mercy of fragments in the allocator.
_SAFE_SHARE = 0.95
# What a process takes on a GPU before its first tensor, kernels loaded (about, for CUDA 12).
_CONTEXT_BYTES = 500 * 2**20


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "plan",
        "simulate a step of the run on one rank, and tell how much memory it takes",
        """
sparse-zero plan --config configs/runs/llama-2-7b-smt-1x8.yaml --ranks 8 --gpu-memory 24
sparse-zero plan --config run.yaml --ranks 64 --zero.stage=3 --training.micro_batch_size=2

The model's folder needs its config.json, and no weights.
""",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks of the job; default: those of the cluster section"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each GPU: does the run fit?")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to this file")
    return parser


def _ranks(args: argparse.Namespace, num_nodes: int, ranks_per_node: int | None) -> int:
    if args.ranks is not None:
        if args.ranks < 1:
            raise InputError(f"--ranks is {args.ranks}: a job needs at least one")
        return int(args.ranks)
    if ranks_per_node is None:
        raise InputError("--ranks is missing, and cluster.ranks_per_node does not say it: give one of them")
    return num_nodes * ranks_per_node


def run(args: argparse.Namespace) -> int:
    """Carry the command out; 1 if the run does not fit into ``--gpu-memory``."""
    config = read_run(args)
    ranks = _ranks(args, config.cluster.num_nodes, config.cluster.ranks_per_node)
    if args.gpu_memory is not None and not 0 < args.gpu_memory < math.inf:
        raise InputError(f"--gpu-memory is {args.gpu_memory:g}: it must be a number above 0")
    if args.json is not None:
        check_out_file(Path(args.json), "--json")
    from launcher.planning import simulate_run  # heavy: torch

    found = simulate_run(config, ranks)
    if args.json is not None:
        atomic_write_json(Path(args.json), found)
    _print(found)
    return 0 if args.gpu_memory is None else _judge(found["peak_bytes"], args.gpu_memory)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Memory of one of {found['world_size']} ranks, stage {found['stage']}, {found['placement']}, "
        f"{found['precision']}, micro-batch {' x '.join(map(str, found['micro_batch']))}",
        caption=f"{found['trained']:,} of {found['parameters']:,} parameters trained; tensors only",
    )
    for heading in ("part of the run", "peak", "left at its end"):
        table.add_column(heading, justify="left" if heading == "part of the run" else "right")
    table.add_column("of the peak")
    for phase, row in found["phases"].items():
        kinds = sorted(row["by_kind"].items(), key=lambda each: -each[1])
        shown = [
            f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in kinds if num_bytes >= 0.01 * row["peak_bytes"]
        ]
        table.add_row(phase, format_bytes(row["peak_bytes"]), format_bytes(row["end_bytes"]), ", ".join(shown))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _judge(peak_bytes: int, gpu_gib: float) -> int:
    """Say whether a rank fits on its GPU; the exit code."""
    needed, there = peak_bytes + _CONTEXT_BYTES, int(gpu_gib * 2**30)
    fits = needed <= _SAFE_SHARE * there
    verdict = "fits" if fits else "does not fit"
    print(
        f"{format_bytes(peak_bytes)} and about {format_bytes(_CONTEXT_BYTES)} of the CUDA context: it {verdict} into "
        f"{_SAFE_SHARE:.0%} of {gpu_gib:g} GiB"
    )
    return 0 if fits else 1
