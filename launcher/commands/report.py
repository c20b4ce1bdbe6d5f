"""`sparse-zero report`: draw what a run did."""

import argparse
from pathlib import Path

from launcher.commands.common import Parser, add_command
from sparse_zero.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "report",
        "draw a run's loss, learning rate and selection, and write one HTML page",
        """
sparse-zero report runs/quickstart
""",
        config=False,
    )
    parser.add_argument("folder", metavar="RUN", help="the run folder (output.folder of its config)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise InputError(f"RUN is {folder}, which is no folder: name the output.folder of a run")
    from launcher.report import write_report  # heavy: matplotlib

    print(write_report(folder))
    return 0
