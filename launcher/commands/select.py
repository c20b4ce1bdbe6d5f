"""`sparse-zero select`: calibrate and choose the regions, without training."""

import argparse
from pathlib import Path

from launcher.commands.common import Parser, add_command, read_run
from launcher.run_folder import check_out_file
from sparse_zero.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "select",
        "choose what would be trained, write it to a file, and stop",
        """
sparse-zero select --config run.yaml
sparse-zero select --config run.yaml --selection.budget.fraction=0.01 --out one-percent.safetensors
sparse-zero inspect one-percent.safetensors
""",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the selection file; default: selection.safetensors in output.folder"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args)
    out = Path(args.out) if args.out else Path(config.output.folder) / "selection.safetensors"
    if not args.out and out.exists():
        raise InputError(f"{out} belongs to the run in output.folder: name another file with --out")
    check_out_file(out, "--out" if args.out else "the selection file in output.folder")
    from launcher import train  # heavy: torch and DeepSpeed

    return train.select_only(config, out)
