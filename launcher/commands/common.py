"""What do the commands share: the --config argument, overrides, and reading the run?"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from launcher.config import RunConfig, load_config, named_paths
from launcher.config_checks import check_config
from launcher.deepspeed_config import check_own_config
from sparse_zero.errors import InputError

OVERRIDES = "Any setting may be changed with --section.key=value, as in --training.steps=100."


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like those about any other input."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`InputError` where argparse would print its usage and exit."""
        raise InputError(f"{message}; see {self.prog} --help")


def add_command(
    subparsers: "argparse._SubParsersAction[Parser]",
    name: str,
    summary: str,
    examples: str,
    *,
    config: bool = True,
    needs_config: bool = True,
) -> Parser:
    """A subcommand's parser; ``config`` gives it ``--config`` and overrides, which some can do without."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}." + (f" {OVERRIDES}" if config else ""),
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if config:
        parser.add_argument("--config", required=needs_config, metavar="FILE", help="the YAML file of the run")
    parser.set_defaults(takes_overrides=config)
    return parser


def read_run(args: argparse.Namespace, *, trains: bool = True) -> RunConfig:
    """The run that ``--config`` and the overrides describe, with what can be said of it from the config alone.

    Args:
        args: of the command.
        trains: False where a model is loaded and nothing is trained: a run in bf16 may answer its problems in fp32.

    Raises:
        InputError: the config does not hold, or (trains) no rank could start with it.
    """
    config = load_config(args.config, args.overrides)
    if trains:
        check_config(config)
    else:
        check_own_config(config)
    return config


def inputs_of(args: argparse.Namespace, config: RunConfig) -> dict[str, str]:
    """What a command reads that is given a config: the file itself, and what it names."""
    return {"--config": args.config, **named_paths(config)}


def check_keeps_inputs(out: Path, option: str, inputs: Mapping[str, str | Path | None]) -> None:
    """Raise where a command would write over what it reads, by whatever name.

    Args:
        out: the file to be written.
        option: that names it.
        inputs: what is read, by option or setting.

    Raises:
        InputError: names the option and what it would overwrite.
    """
    for name, path in inputs.items():
        if path is not None and os.path.realpath(out) == os.path.realpath(path):
            raise InputError(
                f"{option} is {out}, which {name} names as input: it would be overwritten; name another file"
            )
