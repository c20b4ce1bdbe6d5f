"""Which command did the user type, and how does a wrong one end?"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError

from launcher.commands import doctor, evaluate, export, inspect, launch, plan, report, select, sweep, train
from launcher.commands.common import Parser
from launcher.process_ranks import reports_errors
from launcher.stopping import EXIT_ERROR, EXIT_INPUT, EXIT_SIGNAL, Stopped, stoppable
from sparse_zero.errors import InputError

_COMMANDS = (train, launch, doctor, sweep, plan, select, inspect, evaluate, export, report)
_EPILOG = """\
one YAML is one run; any of its settings may be changed on the command line:
  sparse-zero launch --config configs/runs/quickstart.yaml --training.steps=300 --output.folder=runs/longer
  sparse-zero doctor --config ...                      what would keep it from starting, on all nodes

from there:
  sparse-zero inspect runs/longer/adapter              what was trained
  sparse-zero evaluate --config ... --adapter runs/longer/adapter
  sparse-zero export --config ... --adapter runs/longer/adapter --out merged
  sparse-zero report runs/longer                       pictures and one HTML page

`sparse-zero COMMAND --help` has examples of each command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for wrong input, 128 + signal when it was stopped by one."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        with stoppable():
            code: int = args.run(args)
        return code
    except InputError as error:
        if reports_errors(error, os.environ):
            print(f"sparse-zero: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_INPUT
    except Stopped as stop:
        print(f"sparse-zero: {stop}", file=sys.stderr)
        return EXIT_SIGNAL + stop.signal
    except KeyboardInterrupt:
        print("sparse-zero: interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT
    except (OSError, SafetensorError) as error:
        from launcher.faults import describe_disk_error  # heavy: torch

        told = describe_disk_error(error, Path.cwd())
        if told is None:
            raise
        print(f"sparse-zero: error: {told}", file=sys.stderr)
        return EXIT_ERROR


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="sparse-zero",
        description="Fine-tune language models by selected blocks, rows and columns of their weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in _COMMANDS:
        command.add_parser(subparsers).set_defaults(run=command.run)
    args, rest = parser.parse_known_args(argv)
    for argument in rest:
        if not args.takes_overrides or not argument.startswith("--") or "." not in argument.partition("=")[0]:
            parser.error(f"unknown argument {argument}")
        if "=" not in argument:
            parser.error(f"{argument} has no value: write {argument}=VALUE")
    args.overrides = rest
    return args


def _version() -> str:
    try:
        return f"sparse-zero {version('sparse-zero')}"
    except PackageNotFoundError:
        return "sparse-zero (not installed)"


if __name__ == "__main__":
    sys.exit(main())
