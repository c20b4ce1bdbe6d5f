"""`sparse-zero train`: fine-tune in this one process."""

import argparse

from launcher.commands.common import Parser, add_command, read_run


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    return add_command(
        subparsers,
        "train",
        "fine-tune in this process (one GPU or the CPU); `launch` starts several",
        """
sparse-zero train --config configs/runs/quickstart.yaml
sparse-zero train --config run.yaml --training.steps=10 --output.folder=runs/try
sparse-zero train --config run.yaml --checkpoint.resume=runs/old/checkpoints/step-000100
""",
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args)
    from launcher import train  # heavy: torch and DeepSpeed

    return train.run(config)
