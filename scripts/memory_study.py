#!/usr/bin/env python3
"""How does the memory of a rank scale with ranks, stage, length, batch, budget, method and model?

A study is a config (configs/studies): its curves are forecast by the closed form, and the points that it names are
simulated, too. Written are a table (table.csv, table.parquet), pictures, report.md and report.html. Simulations are
kept in the folder, and a rerun does only what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.config import apply_override, parse_as
from launcher.yaml_files import read_mapping
from scripts.benchmarking import exit_code
from scripts.memory.study_config import StudyConfig
from sparse_zero.errors import InputError

DEFAULT_OUT = Path("runs/memory-study")
_TIMEOUT_SECONDS = 600.0


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study that a YAML file describes.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    mapping = read_mapping(path)
    for override in overrides:
        apply_override(mapping, override)
    return parse_as(StudyConfig, mapping, str(path))


def _simulate(config: StudyConfig, points: Mapping[str, Any], forecasts: Any, out: Path, progress: Any) -> Any:
    """Results of simulations by the names of their points."""
    from launcher.config import resolved_yaml
    from launcher.plan.simulation import with_calibration
    from launcher.yaml_files import parse_yaml
    from scripts.memory.in_processes import PRELOADED, in_fork, run_all
    from scripts.memory.simulated_jobs import simulate_mapping
    from scripts.memory.study_points import config_of_point
    from tests.distributed.spawn import preloaded_context

    task = progress.add_task("simulations", total=len(points))
    context = preloaded_context(PRELOADED)

    def one(name: str) -> dict[str, Any]:
        point = points[name]
        # The job as it was forecast: a peer's rank follows from its budget there.
        arguments = {
            "mapping": parse_yaml(resolved_yaml(config_of_point(point)), "the point"),
            "world_size": point.world_size,
            "changes": dict(forecasts[name]),
        }
        found = in_fork(context, simulate_mapping, arguments, _TIMEOUT_SECONDS)
        if point.curve == "headline" and point.method == "smt" and "failed" not in found:
            before = in_fork(context, simulate_mapping, {**arguments, "part": "calibration"}, _TIMEOUT_SECONDS)
            if "failed" in before:
                return before
            found["simulated"] = with_calibration(found["simulated"], before["simulated"])
        return found

    def told(name: str, found: dict[str, Any]) -> None:
        progress.advance(task)
        if "failed" in found:
            progress.console.print(f"[red]failed[/red] {name}: {str(found['failed']).splitlines()[-1]}")

    simulations = out / "simulations.jsonl"
    results = run_all(list(points), one, simulations, workers=config.simulate.workers, on_result=told)
    progress.update(task, completed=len(points))
    return results


def study(config: StudyConfig, out: Path) -> list[dict[str, Any]]:
    """All rows of the study's table."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from scripts.memory.study_frontier import frontier
    from scripts.memory.study_points import Forecasts, is_simulated, points_of, simulated_columns

    forecasts, points = Forecasts(), list(points_of(config))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(1) as beside:
        wanted = {point.name: point for point in points if is_simulated(point, config)}
        jobs = {name: forecasts.run(point).changes for name, point in wanted.items()}
        # In processes of their own, while this one forecasts.
        simulations = beside.submit(_simulate, config, wanted, jobs, out, progress) if wanted else None
        task = progress.add_task("forecasts", total=len(points))
        rows = []
        for point in points:
            rows.append({**forecasts.row(point), "gpu_gib": None})
            progress.advance(task)
        searched = config.frontier
        number = len(searched.methods) * len(searched.gpu_gib) * len(searched.gpus)
        task = progress.add_task("frontier", total=number)
        largest = frontier(config, forecasts, out / "models", lambda: progress.advance(task))
        found = {} if simulations is None else simulations.result()
    for point, row in zip(points, rows, strict=True):
        if is_simulated(point, config) and "failed" not in found[point.name]:
            row.update(simulated_columns(found[point.name]["simulated"]))
    return rows + largest


def write_table(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """table.csv and table.parquet."""
    # It comes with the package datasets, and has no types.
    pandas: Any = importlib.import_module("pandas")
    frame = pandas.DataFrame(list(rows))
    frame.to_csv(out / "table.csv", index=False)
    frame.to_parquet(out / "table.parquet", index=False)


def run(options: argparse.Namespace) -> None:
    """Do the study that the command line asks for."""
    from scripts.memory import study_report
    from sparse_zero.files import atomic_write_text

    config = load_study(options.config, options.overrides)
    if options.markdown_into is not None:
        study_report.check_markers(options.markdown_into)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = study(config, options.out)
    write_table(rows, options.out)
    parts = study_report.parts_of(config, rows)
    drawn = study_report.drawn(parts)
    study_report.write_pictures(drawn, options.out / "pictures")
    text = study_report.markdown(parts, "pictures", level=2)
    atomic_write_text(options.out / "report.md", f"# Memory study\n\n{text}")
    study_report.write_html(options.out / "report.html", parts, drawn)
    if options.markdown_into is not None:
        command = f"python scripts/memory_study.py --config {options.config} --markdown-into {options.markdown_into}"
        study_report.write_into(options.markdown_into, parts, drawn, command)
    print(f"{len(rows)} rows in {options.out}: table.csv, table.parquet, report.md, report.html, pictures")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="a file such as configs/studies/memory.yaml")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder of the results (default: {DEFAULT_OUT})")
    parser.add_argument("--markdown-into", type=Path, default=None, help="also replace the generated part of this file")
    options, rest = parser.parse_known_args(arguments)
    options.overrides = rest

    def everything() -> None:
        for override in rest:
            if not override.startswith("--") or "=" not in override:
                raise InputError(f"{override} is no option and no override: write --section.key=value")
        run(options)

    return exit_code(everything)


if __name__ == "__main__":
    sys.exit(main())
