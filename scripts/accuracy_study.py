#!/usr/bin/env python3
"""Which method learns best at which budget? Methods x budgets x seeds x tasks under one protocol, and one table.

A study is a config (configs/studies). For every task, method and budget the learning rate is tuned on development data,
from as many candidates for each method; then the best one is run with every seed and tested. Runs that are finished are
kept, so that the same command goes on where it was stopped.

  python scripts/accuracy_study.py --config configs/studies/plateau.yaml --dry-run
  python scripts/accuracy_study.py --config configs/studies/plateau.yaml --jobs 2 \\
      --tasks.sst2.model.name_or_path=FOLDER --tasks.sst2.data.train=FILE --tasks.sst2.data.test=FILE
  python scripts/accuracy_study.py --config configs/studies/plateau.yaml --collect

Other arguments change the config: --section.key=value. docs/studies.md says how studies are written and read.
Exit code: 0 all runs are finished, 1 one is not, 2 wrong input, 128 + signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.stopping import EXIT_SIGNAL, Stopped
from scripts.accuracy.study import Study, open_study, run_study, study_results
from scripts.accuracy.study_config import read_study
from scripts.accuracy.study_running import Machine, num_cores
from scripts.commands import command_of
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_bytes, atomic_write_json, atomic_write_text, read_json

_RESULTS = "results.json"


def show_points(study: Study) -> None:
    """What a dry run prints: every tuning run with its state, and what follows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    study.extend_as_before()
    study.check_finished()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    finals = {point.name: point for points in study.finals().values() for point in points}
    for name in [*(point.name for point in study.tuning_points), *finals]:
        table.add_row(name, study.folder.state(name))
    Console().print(table)
    num_finals = len(study.setups) * len(study.config.study.seeds)
    print(f"{len(study.tuning_points)} tuning runs, {num_finals} final runs ({len(finals)} have their rate)")


def kept_remarks(results: Path, given: Sequence[str]) -> list[str]:
    """Those that are given; without any, those of the last collection, which a new one shall not lose."""
    if given or not results.is_file():
        return [text for text in given if text]
    kept: list[str] = read_json(results).get("remarks", [])
    return kept


def write_results(results: dict[str, Any], folder: Path) -> list[Path]:
    """Tables, the JSON, pictures; the paths."""
    from launcher.plots import LIGHT, to_png
    from scripts.accuracy.study_plots import drawings
    from scripts.accuracy.study_tables import as_csv, markdown, terminal_tables

    for table in terminal_tables(results):
        table.show()
    written = [folder / name for name in (_RESULTS, "table.csv", "table.md")]
    atomic_write_json(written[0], results)
    atomic_write_text(written[1], as_csv(results))
    atomic_write_text(written[2], markdown(results))
    try:
        for name, (_, draw) in drawings(results).items():
            written.append(folder / f"{name}.png")
            atomic_write_bytes(written[-1], to_png(draw(LIGHT)))
    except InputError as error:  # Without matplotlib: the tables are there all the same.
        print(f"no picture: {error}", file=sys.stderr)
    return written


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code."""
    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}: it must be at least 1")
    for override in options.overrides:
        if not override.startswith("--") or "=" not in override:
            raise InputError(f"{override} is no option and no override: write --section.key=value")
    study = open_study(read_study(options.config, options.overrides))
    if options.dry_run:
        show_points(study)
        return 0
    code = 0
    machine = Machine(jobs=options.jobs, threads=options.threads or max(num_cores() // options.jobs, 1))
    if not options.collect:
        try:
            code = run_study(study, machine)
        except Stopped as stop:
            return EXIT_SIGNAL + stop.signal
        if code > EXIT_SIGNAL:  # A user who interrupts does not wait for pictures.
            return code
    results, notes = study_results(study, command_of("scripts/accuracy_study.py", options.config, options.overrides))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    results["remarks"] = kept_remarks(study.folder.path / _RESULTS, options.remark)
    print("\n".join(str(path) for path in write_results(results, study.folder.path)))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="a file such as configs/studies/plateau.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="threads of each run (default: cores / jobs)")
    parser.add_argument(
        "--remark",
        action="append",
        default=[],
        metavar="TEXT",
        help="what a reader must know that no number says, such as other work beside the runs; may be repeated. "
        "Without any, those of the last collection stay; an empty one takes them away",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="check everything, and list the runs instead of running them"
    )
    what.add_argument("--collect", action="store_true", help="only make tables and pictures of what has finished")
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    try:
        return run(options)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
