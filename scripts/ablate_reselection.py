#!/usr/bin/env python3
"""Does re-selection during training help?

The run of the quickstart, shorter and with a smaller budget, with one selection from the start, with a re-selection
every few steps, and with random choices; equal data, steps, budget and schedule, several seeds (of the data order,
the calibration data and the random choice). Every run is an ordinary `sparse-zero train`; finished ones are kept in
--folder, so that the script may be interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.smollm2 import default_cache, smollm2_folder
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json

ROOT = Path(__file__).resolve().parent.parent

# What each condition changes in the run's config.
CONDITIONS: dict[str, list[str]] = {
    "once": [],
    "every {every}, zero moments": ["--selection.reselect={{every: {every}, moments: zero}}"],
    "every {every}, mean moments": ["--selection.reselect={{every: {every}, moments: mean}}"],
    "random, once": ["--selection.score=random"],
    "random, every {every}": ["--selection.score=random", "--selection.reselect={{every: {every}, moments: zero}}"],
}


def command_of(folder: Path, changes: Sequence[str], seed: int, options: argparse.Namespace, model: str) -> list[str]:
    """The command line of one run."""
    return [
        sys.executable, "-m", "launcher", "train", "--config", str(ROOT / "configs/runs/quickstart.yaml"),
        f"--model.name_or_path={model}", f"--data.train={options.data}/train.json",
        f"--data.validation={options.data}/validation.json", "--data.test=null", "--output.evaluate=false",
        f"--training.steps={options.steps}", f"--training.seed={seed}", f"--selection.seed={seed}",
        f"--selection.budget.fraction={options.fraction}", "--selection.regions.1.per_matrix=null",
        "--selection.regions.2.per_matrix=null", "--output.merged=false", "--output.report=false",
        "--output.tensorboard=false", f"--checkpoint.every={options.steps}", f"--output.folder={folder}", *changes,
    ]  # fmt: skip


def run_one(name: str, changes: Sequence[str], seed: int, options: argparse.Namespace, model: str) -> dict[str, float]:
    """Validation loss, trained and retired parameters of one run; runs it unless its summary is there."""
    folder = options.folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    if not (folder / "summary.json").is_file():
        subprocess.run(command_of(folder, changes, seed, options, model), cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "validation_loss": [row["loss"] for row in rows if row.get("kind") == "validation"][-1],
        "trained": summary["parameters"]["trained"],
        "retired": summary["parameters"].get("retired", 0),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablate-reselection"), help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart-data"), help="of make_word_problems.py")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each condition (default: 3)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run (default: 60)")
    parser.add_argument("--every", type=int, default=15, help="steps between re-selections (default: 15)")
    parser.add_argument("--fraction", type=float, default=0.002, help="budget (default: 0.002 of the model)")
    parser.add_argument("--conditions", default=None, help="numbers of the conditions to run, such as 0,1,2")
    options = parser.parse_args(arguments)
    try:
        model = str(smollm2_folder(default_cache()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (ROOT / options.data / "train.json").is_file():
        command = [sys.executable, "scripts/make_word_problems.py", "--folder", str(options.data)]
        subprocess.run(command, cwd=ROOT, check=True)
    names = list(CONDITIONS)
    if options.conditions is not None:
        names = [names[int(number)] for number in options.conditions.split(",")]
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):  # seeds outside, so that an interrupted study compares like with like
        for name in names:
            changes = [change.format(every=options.every) for change in CONDITIONS[name]]
            title = name.format(every=options.every)
            found.setdefault(title, []).append(run_one(title, changes, seed, options, model))
        atomic_write_json(options.folder / "results.json", found)
    print_table(found)
    return 0


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    """Means over the seeds, and the paired difference to the first condition."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Mean over the seeds; difference: validation loss against the first condition, seed by seed")
    for heading in ("condition", "validation loss", "difference (each seed)", "trained", "retired"):
        table.add_column(heading, justify="left" if heading == "condition" else "right")
    first = next(iter(found.values()))
    for name, runs in found.items():
        losses = [run["validation_loss"] for run in runs]
        differences = ", ".join(
            f"{run['validation_loss'] - other['validation_loss']:+.4f}" for run, other in zip(runs, first, strict=True)
        )
        table.add_row(
            name,
            f"{statistics.mean(losses):.4f}",
            differences,
            f"{statistics.mean(run['trained'] for run in runs):,.0f}",
            f"{statistics.mean(run['retired'] for run in runs):,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    sys.exit(main())
