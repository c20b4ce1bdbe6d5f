"""`sparse-zero sweep`: run many configs, and collect one table."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.commands.common import Parser, add_command
from launcher.run_folder import check_new_file
from launcher.saying import say
from launcher.starting.start_files import exported_variables
from launcher.stopping import EXIT_SIGNAL, stop_requests
from launcher.sweep.points import expand, find_config
from launcher.sweep.sweep_config import SweepConfig, read_sweep
from launcher.sweep.sweep_folder import (
    Listed,
    SweepFolder,
    check_folders,
    find_listed,
    frozen_config,
    list_points,
    read_list,
    write_list,
)
from sparse_zero.errors import InputError

# The same as launcher.sweep.tables.SHOWN has; a test compares them.
_METRICS = (
    "final_loss", "validation_loss_best", "accuracy_tuned", "forgetting_change", "parameters_fraction",
    "peak_memory_bytes", "tokens_per_second", "total_seconds", "adapter_bytes",
)  # fmt: skip
_EXAMPLES = """
sparse-zero sweep --config configs/sweeps/quick.yaml --dry-run      the points, their names and states
sparse-zero sweep --config configs/sweeps/quick.yaml                run what is not finished, then the table
sparse-zero sweep --config FILE --only method=rows --stop-at-failure       some of them
sparse-zero sweep --config FILE --points 0-3,7
sparse-zero sweep --config FILE --collect --metric final_loss              the table and the picture only
sparse-zero sweep --config FILE --emit slurm --at-once 4 --out sweep.sbatch     one array task for each point

FILE is a run's config with one more section:
  sweep:
    folder: runs/budgets
    grid:
      method:                                  # a named choice sets several keys
        rows: {without: [selection], extends: ../methods/rocoft-rows.yaml}
        mixed: {}
      training.learning_rate: [1.0e-3, 3.0e-4]
      training.seed: [0, 1, 2]                 # means are taken over it
    exclude:
      - {method: rows, training.learning_rate: 3.0e-4}

A finished point is skipped, a failed or stopped one is started again when the command is given again; see
docs/sweeps.md. Exit code: 0 all chosen points are finished, 1 one is not, 2 wrong input, 128 + signal.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "sweep",
        "run every point of a grid over settings, and collect one table",
        _EXAMPLES,
        needs_config=False,
    )
    parser.add_argument("--only", metavar="TEXT", help="the points whose name has this in it")
    parser.add_argument("--points", metavar="RANGES", help="the points of these numbers, as in 0-3,7")
    parser.add_argument("--stop-at-failure", action="store_true", help="do not go on with the next point")
    parser.add_argument("--metric", choices=_METRICS, metavar="NAME", help=f"what is drawn: {', '.join(_METRICS)}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the points instead of running them")
    what.add_argument("--collect", action="store_true", help="only make the table of what there is")
    what.add_argument("--point", metavar="POINT", help="run one listed point, by number or name, as an array task does")
    parser.add_argument("--folder", metavar="FOLDER", help="with --point, instead of --config: the folder of the sweep")
    what.add_argument("--emit", choices=("slurm",), help="write the list of points and print an array script for it")
    parser.add_argument("--out", metavar="FILE", help="with --emit: the script's file, a new one (default: printed)")
    parser.add_argument("--at-once", type=int, metavar="K", help="with --emit: tasks that may run at a time")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    for name, value in (("--out", args.out), ("--at-once", args.at_once)):
        if value is not None and args.emit is None:
            raise InputError(f"{name} is {value}, and no script is written: give --emit slurm, or leave it out")
    for name, value in (("--only", args.only), ("--points", args.points)):
        if value is not None and (args.collect or args.point is not None):
            other = "--collect, which is about all points" if args.collect else "--point, which names one"
            raise InputError(f"{name} is {value} beside {other}: leave one out")
    if args.folder is not None:
        return _run_one_of(args)
    if args.config is None:
        raise InputError("--config is missing: name the YAML file of the sweep")
    sweep, base = read_sweep(args.config, args.overrides)
    folder = SweepFolder(sweep.path)
    if args.point is not None:
        return _run_one(folder, args.point, lambda each: _say_if_changed(args.config, sweep, base, folder, each))
    listed = list_points(read_list(folder), expand(sweep, base))
    chosen = _choose(args, [each for each in listed if each.point is not None])
    if args.dry_run:
        return _print_points(folder, listed, chosen)
    folder.check_writable()
    # Also of those that are not chosen: they stand in the same table.
    check_folders(folder, {each.name: each.point.config for each in listed if each.point is not None})
    if args.collect:
        _write_tables(args, sweep, folder, listed)
        return 0
    if args.emit is not None:
        return _emit(args, folder, listed, chosen)

    from launcher.sweep.progress import SweepProgress
    from launcher.sweep.running import lock_of, run_points

    _check_exported(chosen)
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock_of(folder) as lock:
        lock.take()
        write_list(folder, listed)
        left = [each for each in chosen if folder.state(each.name) != "finished"]
        if len(left) < len(chosen):
            say(f"{len(chosen) - len(left)} of {len(chosen)} points are finished already")
        code = run_points(folder, left, SweepProgress(len(left)), stops_at_failure=args.stop_at_failure)
        if code <= EXIT_SIGNAL:  # A user who interrupts does not wait for pictures.
            _write_tables(args, sweep, folder, listed)
    return code


def _choose(args: argparse.Namespace, listed: Sequence[Listed]) -> list[Listed]:
    chosen = list(listed)
    if args.only is not None:
        chosen = [each for each in chosen if args.only in each.name]
    if args.points is not None:
        numbers = _numbers(args.points)
        chosen = [each for each in chosen if any(each.index in span for span in numbers)]
    if not chosen:
        given = " ".join(
            f"{name} {value}" for name, value in (("--only", args.only), ("--points", args.points)) if value is not None
        )
        raise InputError(f"{given}: no point of the grid is left; --dry-run lists them")
    return chosen


def _numbers(text: str) -> list[range]:
    spans = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise InputError(f"--points is {text!r}: give numbers and ranges, as in 0-3,7")
        spans.append(range(int(first), int(last if dash else first) + 1))
    return spans


def _print_points(folder: SweepFolder, listed: Sequence[Listed], chosen: Sequence[Listed]) -> int:
    from launcher.sweep.tables import points_table, print_table

    print_table(points_table(chosen, [folder.state(each.name) for each in chosen]))
    gone = sum(each.point is None for each in listed)
    if gone:
        print(f"{gone} earlier points are no longer in the grid; {folder.points} keeps their numbers")
    return 0


def _run_one_of(args: argparse.Namespace) -> int:
    """Run one point of a sweep's folder. No config is read but the one that was written with the list."""
    if args.point is None:
        raise InputError(f"--folder is {args.folder} without --point: name one, or give --config instead")
    if args.config is not None or args.overrides:
        other = f"--config {args.config}" if args.config is not None else args.overrides[0]
        raise InputError(f"--folder is {args.folder} beside {other}: a point runs as it was listed; leave one out")
    return _run_one(SweepFolder(Path(args.folder)), args.point)


def _run_one(folder: SweepFolder, named: str, tell: Callable[[Listed], None] | None = None) -> int:
    """Run one point as it was listed, whatever became of the grid since; ``tell`` is called before."""
    from launcher.sweep.running import run_point

    listed = find_listed(read_list(folder), named, "--point")
    config = frozen_config(folder, listed)
    if tell is not None:
        tell(listed)
    # A relative path is that of the directory in which the list was written.
    if os.path.realpath(config.output.folder) != os.path.realpath(folder.run(listed.name).path):
        raise InputError(
            f"--point is {named}, whose output.folder is {config.output.folder}: it leads elsewhere than "
            f"{folder.run(listed.name).path}; start it in the directory where the sweep was listed"
        )
    check_folders(folder, {listed.name: config})
    if folder.state(listed.name) == "finished":
        say(f"{listed.name} is finished already")
        return 0
    with stop_requests() as request:
        return run_point(folder, listed.name, request, None)


def _say_if_changed(file: str, sweep: SweepConfig, base: dict[str, Any], folder: SweepFolder, listed: Listed) -> None:
    try:
        is_same = find_config(sweep, base, listed.name) == frozen_config(folder, listed)
    except InputError:
        is_same = False
    if not is_same:
        say(f"{file} has changed since {listed.name} was listed: run as it was listed")


def _check_exported(chosen: Sequence[Listed]) -> None:
    """Refuse what ``cluster.export`` names and is not set, before every point finds it out by itself."""
    for each in chosen:
        if each.point is not None:
            exported_variables(each.point.config.cluster, os.environ)


def _emit(args: argparse.Namespace, folder: SweepFolder, listed: Sequence[Listed], chosen: Sequence[Listed]) -> int:
    from launcher.sweep.array_script import array_of_points
    from launcher.sweep.running import lock_of

    if args.out is not None:
        check_new_file(Path(args.out))
    points = {each.name: (each.index, each.point.config) for each in chosen if each.point is not None}
    script = array_of_points(points, folder.path.absolute(), Path.cwd(), args.at_once)
    _check_exported(chosen)
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock_of(folder) as lock:
        lock.take()
        write_list(folder, listed)
    if args.out is None:
        print(script, end="")
        return 0
    from sparse_zero.files import atomic_write_text

    atomic_write_text(Path(args.out), script)
    print(args.out)
    return 0


def _write_tables(args: argparse.Namespace, sweep: SweepConfig, folder: SweepFolder, listed: Sequence[Listed]) -> None:
    from launcher.sweep.collecting import collect, group
    from launcher.sweep.tables import markdown, means_table, print_table, write_csv, write_parquet
    from sparse_zero.files import atomic_write_text

    rows, notes = collect(folder, [each for each in listed if each.point is not None])
    groups = group(rows, list(sweep.grid), sweep.repeats)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_csv(folder.table, rows)
    write_parquet(folder.parquet, rows)
    atomic_write_text(folder.markdown, markdown(groups, list(sweep.grid), sweep.repeats))
    print_table(means_table(groups, sweep.repeats))
    for note in notes:
        say(f"warning: {note}")
    written = [folder.table, folder.parquet, folder.markdown]
    try:
        written += _draw(args.metric, sweep, folder, groups)
    except InputError as error:  # Without matplotlib, or with nothing to draw: the table is there all the same.
        say(f"no picture: {error}")
    print("\n".join(str(path) for path in written))


def _draw(metric: str | None, sweep: SweepConfig, folder: SweepFolder, groups: Sequence[Any]) -> list[Path]:
    from launcher.plots import to_png
    from launcher.sweep.plot import MAX_LINES, default_metric, lines_of, numeric_key, sweep_figure
    from sparse_zero.files import atomic_write_bytes

    key, metric = numeric_key(sweep), metric or default_metric(groups)
    if key is None:
        raise InputError("no setting of the grid has several numbers, but for repeats")
    lines = {} if metric is None else lines_of(groups, key, metric)
    if metric is None or not lines:
        raise InputError("no finished point has a number to draw")
    if len(lines) > MAX_LINES:
        raise InputError(f"{len(lines)} lines are more than the {MAX_LINES} that can be told apart")
    atomic_write_bytes(folder.plot, to_png(sweep_figure(lines, key, metric)))
    return [folder.plot]
