"""`sparse-zero select`: calibrate and choose the regions, without training."""

import argparse
from pathlib import Path

from launcher.commands.common import Parser, add_command, check_keeps_inputs, inputs_of, read_run
from launcher.run_folder import SCORES_NAME, RunFolder, check_out_file, scores_beside
from sparse_zero.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "select",
        "choose what would be trained, write it and all scores to files, and stop",
        """
sparse-zero select --config run.yaml
sparse-zero select --config run.yaml --out one-percent.safetensors --selection.budget.fraction=0.01

other budgets from the same calibration, in seconds:
sparse-zero select --config run.yaml --from-scores one-percent.scores.safetensors \\
            --selection.budget.fraction=0.02 --out two-percent.safetensors

and then:
sparse-zero inspect one-percent.safetensors
sparse-zero inspect one-percent.safetensors two-percent.safetensors
sparse-zero train --config run.yaml '--selection.regions=[]' --selection.budget=null \\
            --selection.file=two-percent.safetensors
""",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the selection file; default: selection.safetensors in output.folder"
    )
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="the file for the scores of all candidate regions; default: NAME.scores.safetensors beside --out "
        "NAME.safetensors, or scores.safetensors in output.folder",
    )
    parser.add_argument(
        "--from-scores",
        metavar="FILE",
        help="choose from the scores of an earlier calibration; loads neither weights nor data",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args)
    out = Path(args.out) if args.out else RunFolder(config.output.folder).selection
    if not args.out and out.exists():
        raise InputError(f"{out} belongs to the run in output.folder: name another file with --out")
    check_out_file(out, "--out" if args.out else "the selection file in output.folder")
    scores_out = _scores_file(args, out)
    inputs = {**inputs_of(args, config), "--from-scores": args.from_scores}
    check_keeps_inputs(out, "--out", inputs)
    if scores_out is not None:
        check_keeps_inputs(scores_out, "--scores", inputs)
    if args.from_scores is not None:
        from launcher.choosing import choose_from_scores  # heavy: torch and transformers

        return choose_from_scores(config, Path(args.from_scores), out, scores_out)
    if config.selection.file is not None and args.scores:
        raise InputError(
            f"--scores is {args.scores}, but selection.file {config.selection.file} is used as it is: there are no "
            "scores; leave --scores out"
        )
    from launcher import train  # heavy: torch and DeepSpeed

    return train.select_only(config, out, scores_out)


def _scores_file(args: argparse.Namespace, out: Path) -> Path | None:
    """Where the scores go; None if they lie in a file already, and no other one is named."""
    if args.scores is None and args.from_scores is not None:
        return None
    default = scores_beside(out) if args.out else out.with_name(SCORES_NAME)
    path = Path(args.scores) if args.scores else default
    if path == out:
        raise InputError(f"--scores is {path}, the file of the selection too: name another one")
    check_out_file(path, "--scores" if args.scores else "the file of the scores")
    return path
