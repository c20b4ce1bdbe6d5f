"""`sparse-zero evaluate`: answer the test problems with the base or with an adapter."""

import argparse
from pathlib import Path

from launcher.commands.common import Parser, add_command, check_keeps_inputs, inputs_of, read_run
from launcher.run_folder import check_out_file
from sparse_zero.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "evaluate",
        "answer the problems of data.test and count the exact answers",
        """
sparse-zero evaluate --config run.yaml                                     the base model
sparse-zero evaluate --config run.yaml --adapter runs/mine/adapter
sparse-zero evaluate --config run.yaml --adapter runs/mine/adapter --data.test=boolq.json --out boolq-mine.json
""",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter; without it the base model answers")
    parser.add_argument("--out", metavar="FILE", help="every prediction; default: a file in output.folder/evaluation")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args, trains=False)
    if config.data.test is None:
        raise InputError("data.test is missing: name the test data in the config or with --data.test=FILE")
    adapter = existing_adapter(args.adapter) if args.adapter else None
    out = Path(args.out) if args.out else None
    if out is not None:
        check_out_file(out)
        check_keeps_inputs(out, "--out", inputs_of(args, config))
    from launcher import evaluating  # heavy: torch and transformers

    return evaluating.evaluate_run(config, adapter, out)


def existing_adapter(name: str) -> Path:
    """The adapter folder ``name``, or :class:`InputError` when it is none."""
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"--adapter is {name}, which is no folder: name the adapter folder of a run")
    return folder
