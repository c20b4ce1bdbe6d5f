#!/usr/bin/env python3
"""How close is the neural tangent kernel of few parameters to that of all, and does it classify as well?

For every head, number of shots and seed, the empirical kernels of all parameters, of rows, columns and blocks at some
budgets, and of LoRA are computed, and compared: relative distances, alignment, accuracy of kernel ridge regression on
few-shot classification, and agreement of its predictions. Written are results.json (every figure and prediction),
report.md, report.html and pictures. Kernels are kept in the folder, and a rerun computes only what is missing.

  python scripts/ntk_study.py --config configs/studies/ntk.yaml --model.name_or_path=FOLDER \\
      --data.train=SST-2/train.tsv --data.test=SST-2/dev.tsv --out runs/ntk

Without data.train, sentences are made up. Any setting of the config can be changed by --section.key=value, or, where
it is in no section, by --key=value, such as --shots=[16,64].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.config import parse_as, set_value
from launcher.yaml_files import parse_yaml, read_mapping
from scripts.benchmarking import exit_code
from scripts.ntk.study_config import StudyConfig
from sparse_zero.errors import InputError

DEFAULT_OUT = Path("runs/ntk-study")


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study that a YAML file describes, with overrides.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    mapping = read_mapping(path)
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        if not override.startswith("--") or not equals or not all(name.split(".")):
            raise InputError(f"{override} is no option and no override: write --section.key=value")
        set_value(mapping, name, parse_yaml(text, f"the value of --{name}"), override)
    return parse_as(StudyConfig, mapping, str(path))


def _show(progress: Any, task: Any, share: float) -> None:
    progress.update(task, completed=100 * share)


def run(config: StudyConfig, out: Path, *, until: str = "report") -> None:
    """Compute what is missing, then measure, and write the report."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from scripts.ntk.study_points import Study, points_of

    study = Study(config, out)
    points = points_of(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("points", total=len(points))
        for point in points:
            inside = progress.add_task(point.name, total=100)
            study.compute(point, partial(_show, progress, inside))
            progress.remove_task(inside)
            progress.advance(task)
    if until == "kernels":
        return
    from scripts.ntk import study_report

    study_report.write(study, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="a file such as configs/studies/ntk.yaml")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder of the results (default: {DEFAULT_OUT})")
    parser.add_argument(
        "--until",
        choices=("kernels", "report"),
        default="report",
        help="kernels: stop when they are computed, without a report (default: report)",
    )
    options, rest = parser.parse_known_args(arguments)
    return exit_code(lambda: run(load_study(options.config, rest), options.out, until=options.until))


if __name__ == "__main__":
    sys.exit(main())
