"""`sparse-zero export`: fold an adapter into the base and write a plain model folder."""

import argparse
from pathlib import Path

from launcher.commands.common import Parser, add_command, read_run
from launcher.commands.evaluate import existing_adapter
from launcher.run_folder import check_can_write_in
from sparse_zero.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "export",
        "fold an adapter into the base model and write a plain Hugging Face folder",
        """
sparse-zero export --config run.yaml                                       output.folder/adapter to .../merged
sparse-zero export --config run.yaml --adapter runs/mine/adapter --out my-model
""",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter; default: adapter in output.folder")
    parser.add_argument("--out", metavar="FOLDER", help="the model folder; default: merged in output.folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args)
    folder = Path(config.output.folder)
    adapter = existing_adapter(args.adapter or str(folder / "adapter"))
    out = Path(args.out) if args.out else folder / "merged"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out is {out}, which exists already: remove it, or name another folder")
    check_can_write_in(out.parent, f"--out is {out}")
    from launcher import exporting  # heavy: torch and transformers

    return exporting.export(config, adapter, out)
