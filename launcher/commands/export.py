"""`sparse-zero export`: write a plain model folder with an adapter folded in, or the adapter as one to upload."""

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
        "fold an adapter into the base model and write a plain Hugging Face folder, or write the adapter to upload it",
        """
sparse-zero export --config run.yaml                                       output.folder/adapter to .../merged
sparse-zero export --config run.yaml --adapter runs/mine/adapter --out my-model
sparse-zero export --config run.yaml --as adapter --out my-adapter         for the hub, with a model card
""",
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("model", "adapter"),
        default="model",
        help="model: base and adapter in one; adapter: the adapter alone, with a model card, without local paths",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter; default: adapter in output.folder")
    parser.add_argument(
        "--out", metavar="FOLDER", help="the new folder; default: merged, or adapter-upload, in output.folder"
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="with --as adapter: the base's name on the hub, if model.name_or_path is none",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args, trains=False)
    folder = Path(config.output.folder)
    adapter = existing_adapter(args.adapter or str(folder / "adapter"))
    is_model = args.form == "model"
    if args.base_model is not None and is_model:
        raise InputError(f"--base-model is {args.base_model}, and a model is exported: add --as adapter")
    out = Path(args.out) if args.out else folder / ("merged" if is_model else "adapter-upload")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out is {out}, which exists already: remove it, or name another folder")
    check_can_write_in(out.parent, f"--out is {out}")
    from launcher import exporting  # heavy: torch and transformers

    if not is_model:
        return exporting.export_adapter(config, adapter, out, args.base_model)
    return exporting.export(config, adapter, out)
