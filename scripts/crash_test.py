#!/usr/bin/env python3
"""Does a run that is killed again and again, at any moment, end with the very weights of the run that was not?

Two ranks train a random Llama through launcher/train.py, with DeepSpeed engines over gloo and a checkpoint every few
steps. One rank or both get SIGKILL at a random instant: while they load, between two saves, inside of one, or while the
adapter, the merged model, the summary and the report are written. A rank that is left is ended as a launcher would:
SIGTERM within a second, SIGKILL half a minute later. The run is started again until it is killed again or has ended.
What it leaves must equal, bit for bit, what the same run leaves without a kill: the values, the merged model, and every
loss in between. ZeRO stage, placement and re-selection are drawn for every run.

Where a kill fell is read from what lies in the run folder afterwards, not from what was meant. A kill inside of a save
is one that left a temporary checkpoint or a pointer to the one before; or, where only the rank that does not write was
killed, one that found the temporary checkpoint. Work lost are the steps that the next start does again: at most those
of one interval, and those that were done while the checkpoint was still being written (at most another interval).
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.stopping import EXIT_LOST, EXIT_SIGNAL
from scripts.benchmarking import exit_code, machine, make_parser, read_settings
from scripts.tiny_run import (
    WORLD_SIZE,
    Kind,
    RunSettings,
    Start,
    difference,
    leftovers,
    newest_checkpoint,
    pointer,
    result_of,
    steps_done,
    write_base,
    write_config,
)
from sparse_zero.files import atomic_write_json
from sparse_zero.zero.config import PLACEMENTS
from tests.distributed.spawn import preloaded_context

Phase = Literal["loading", "training", "inside a save", "ending"]
# What is aimed at; a third must be inside of a save.
AIMS: dict[Phase, float] = {"loading": 0.15, "training": 0.25, "inside a save": 0.4, "ending": 0.2}
# How a rank ends that was left: as if nothing had happened (at the end), by itself, or by its launcher's SIGTERM.
EXPECTED_CODES = (0, EXIT_LOST, EXIT_SIGNAL + signal.SIGTERM)
# A launcher looks at its ranks once a second.
_POLL_SECONDS = 1.0
# Nothing in a run of this size takes as long.
_STUCK_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What is killed, and how often."""

    kills: int = 200
    # Kills of one run at most, the last ones of them while it ends.
    per_run: int = 12
    at_end: int = 3
    seed: int = 0


SMALL = Settings(kills=6, steps=8, every=2, per_run=6, at_end=1, hidden=64)


@dataclass(kw_only=True)
class Kill:
    """One kill, and what came of it."""

    kind: str
    meant: Phase
    phase: Phase
    victims: list[int]
    # Exit codes of the ranks that were left, and how they came to an end.
    survivors: dict[int, int]
    ended: str
    # The last step that had been done.
    step: int
    # Steps that the next start that got so far did again; None where it was killed before.
    lost: int | None = None
    leftovers: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long the parts of the run without a kill took, in seconds."""

    loading: float
    step: float
    save: float
    ending: float


# --- instants ----------------------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A start ended otherwise than it should have."""


def _wait(start: Start, until: Callable[[], bool], every: float = 0.002) -> bool:
    """Wait until something holds; False if the run came to its end before.

    Raises:
        Failed: a rank ended with an error, or nothing happened for minutes.
    """
    while not until():
        codes = start.codes()
        if any(codes):
            start.end_survivors(5.0)
            raise Failed(f"exit codes {codes}\n{start.output()}")
        if codes == [0] * WORLD_SIZE:
            return False
        if start.seconds > _STUCK_SECONDS:
            start.kill(range(WORLD_SIZE))
            raise Failed(f"nothing happened for {_STUCK_SECONDS:.0f} s\n{start.output()}")
        time.sleep(every)
    return True


def wait_for_instant(start: Start, meant: Phase, pace: Pace, settings: Settings, random: Random) -> bool:
    """Let the ranks come to a random instant of a phase; False if they ended before."""
    run = start.run
    if meant == "loading":
        delay, came = random.uniform(0.0, pace.loading), True
    elif meant == "training":
        delay, came = random.uniform(0.0, 2 * pace.step), _wait(start, lambda: start.trains)
        step = start.continued_after + random.randint(0, 2 * settings.every)
        came = came and _wait(start, lambda: steps_done(run) >= min(step, settings.steps))
    elif meant == "ending":
        delay = random.uniform(0.0, pace.ending)
        came = _wait(start, lambda: start.trains and steps_done(run) == settings.steps)
    else:
        delay, came = random.uniform(0.0, pace.save), True
        for _ in range(random.randint(0, 1)):  # Not always the first one.
            came = came and _wait(start, lambda: bool(start.halves)) and _wait(start, lambda: not start.halves)
        came = came and _wait(start, lambda: bool(start.halves))
    until = (start.began if meant == "loading" else time.monotonic()) + delay
    return came and _wait(start, lambda: time.monotonic() > until)


def phase_of(start: Start, settings: Settings) -> Phase:
    """Where a kill fell, read right after it."""
    newest = newest_checkpoint(start.run)
    if start.halves or (newest > start.checkpoint_before and pointer(start.run) != newest):
        return "inside a save"
    if not start.trains:
        return "loading"
    return "ending" if steps_done(start.run) == settings.steps else "training"


# --- all of it ---------------------------------------------------------------------------------------------------


def undisturbed(config: Path, folder: Path, settings: Settings) -> tuple[dict[str, Any], Pace]:
    """What a run leaves that nobody kills, and how long its parts take.

    Raises:
        Failed: it did not come to its end.
    """
    start = Start(config, folder)
    run = start.run
    _wait(start, lambda: start.trains)
    loading = start.seconds
    saves: list[float] = []
    while _wait(start, lambda: bool(start.halves) or steps_done(run) == settings.steps):
        if steps_done(run) == settings.steps and saves:
            break
        began = start.seconds
        _wait(start, lambda: not start.halves)
        saves.append(start.seconds - began)
    trained = start.seconds
    _wait(start, lambda: False)
    start.end_survivors(0.0)
    left = leftovers(run)
    if left:
        raise Failed(f"without a kill, {', '.join(left)} were left behind")
    step = (trained - loading) / settings.steps
    return result_of(run), Pace(loading=loading, step=step, save=min(saves), ending=start.seconds - trained)


def choose_phase(
    kills: Sequence[Kill], own: Sequence[Kill], run: Path, settings: Settings, random: Random
) -> Phase | None:
    """What the next kill of a run is meant for: more likely what has had too few; None to let the run end."""
    if len(kills) + len(own) >= settings.kills or len(own) >= settings.per_run:
        return None
    if newest_checkpoint(run) == settings.steps or len(own) >= settings.per_run - settings.at_end:
        at_end = sum(kill.phase == "ending" for kill in own)
        return "ending" if at_end < settings.at_end else None
    so_far = Counter(kill.phase for kill in (*kills, *own))
    num = so_far.total() + 1
    missing = {phase: share - so_far[phase] / num for phase, share in AIMS.items() if phase != "ending"}
    # Those that are meant for a save and miss it fall into training.
    if missing["inside a save"] > 0 and random.random() < 0.8:
        return "inside a save"
    return random.choices(list(missing), [max(0.01, each) for each in missing.values()])[0]


def kill_until_it_ends(
    kind: Kind, config: Path, pace: Pace, kills: Sequence[Kill], settings: Settings, random: Random
) -> Iterator[Kill]:
    """Start a run again and again until it ends; every kill on the way.

    Raises:
        Failed: a start ended with an error of its own.
    """
    folder, own = config.parent, list[Kill]()
    unanswered: Kill | None = None
    while True:
        start = Start(config, folder)
        meant = choose_phase(kills, own, start.run, settings, random)
        came = _wait(start, lambda: False) if meant is None else wait_for_instant(start, meant, pace, settings, random)
        victims = random.choice(([0], [1], [0, 1]))
        if came:
            start.kill(victims)
        phase = phase_of(start, settings)
        trained = start.trains
        survivors = [rank for rank in range(WORLD_SIZE) if came and rank not in victims]
        ended = start.end_survivors(random.uniform(0.0, _POLL_SECONDS))
        if trained and unanswered is not None:
            unanswered.lost = unanswered.step - start.continued_after
            unanswered = None
        if not came:
            return
        assert meant is not None
        kill = Kill(
            kind=kind.describe(),
            meant=meant,
            phase=phase,
            victims=victims,
            survivors={rank: start.codes()[rank] or 0 for rank in survivors},
            ended=ended if survivors else "",
            step=steps_done(start.run),
            leftovers=leftovers(start.run),
        )
        if trained:
            unanswered = kill
        else:
            kill.lost = 0
        own.append(kill)
        yield kill


def crash(settings: Settings, folder: Path, tell: Callable[[str], None]) -> tuple[list[Kill], list[dict[str, Any]]]:
    """Kill until there have been enough kills: all of them, and what became of every run.

    Raises:
        Failed: a start ended with an error of its own.
    """
    random = Random(settings.seed)
    base = folder / "base"
    write_base(base, settings)
    # The first process waits until everything is imported.
    warm = preloaded_context().Process(target=os.getpid)
    warm.start()
    warm.join()
    known: dict[Kind, tuple[dict[str, Any], Pace]] = {}
    kills: list[Kill] = []
    runs: list[dict[str, Any]] = []
    while len(kills) < settings.kills:
        stage, reselects = random.choice((1, 2, 3)), random.random() < 0.5
        # Drawing the report takes longer than all the rest.
        reports = reselects and stage == 1
        kind = Kind(stage=stage, placement=random.choice(PLACEMENTS), reselects=reselects, reports=reports)
        if kind not in known:
            own = folder / f"whole-{len(known)}"
            own.mkdir()
            known[kind] = undisturbed(write_config(base, own, kind, settings), own, settings)
        wanted, pace = known[kind]
        own = folder / f"run-{len(runs)}"
        own.mkdir()
        config = write_config(base, own, kind, settings)
        found = list(kill_until_it_ends(kind, config, pace, kills, settings, random))
        kills += found
        different = difference(wanted, own / "run")
        runs.append({"kind": kind.describe(), "kills": len(found), "pace": asdict(pace), "difference": different})
        tell(f"{len(kills)} of {settings.kills} kills; {kind.describe()}: {len(found)}, {different or 'equal'}")
    return kills, runs


def summarize(kills: Sequence[Kill], runs: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """The numbers of the table."""
    phases = {}
    for phase in AIMS:
        found = [kill for kill in kills if kill.phase == phase]
        lost = [kill.lost for kill in found if kill.lost is not None]
        phases[phase] = {
            "kills": len(found),
            "of_rank_0": sum(kill.victims == [0] for kill in found),
            "of_rank_1": sum(kill.victims == [1] for kill in found),
            "of_both": sum(len(kill.victims) == WORLD_SIZE for kill in found),
            "resumes": len(lost),
            "lost_mean": statistics.mean(lost) if lost else 0.0,
            "lost_max": max(lost, default=0),
            "with_leftovers": sum(bool(kill.leftovers) for kill in found),
        }
    return {
        "kills": len(kills),
        "runs": len(runs),
        "different": [run for run in runs if run["difference"]],
        "phases": phases,
        "lost_mean": statistics.mean([kill.lost for kill in kills if kill.lost is not None] or [0]),
        "lost_max": max((kill.lost for kill in kills if kill.lost is not None), default=0),
        "lost_bound": 2 * settings.every,
        "survivors": dict(Counter(kill.ended for kill in kills if kill.ended)),
        "survivor_codes": {
            str(code): count for code, count in Counter(c for kill in kills for c in kill.survivors.values()).items()
        },
        "wrong_codes": sum(code not in EXPECTED_CODES for kill in kills for code in kill.survivors.values()),
    }


def print_summary(summary: dict[str, Any], settings: Settings) -> None:
    """The table that people read."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['kills']} kills of {summary['runs']} runs, a checkpoint every {settings.every} steps"
    )
    for heading in (
        "killed while",
        "kills",
        "rank 0",
        "rank 1",
        "both",
        "resumed",
        "steps lost",
        "at most",
        "leftovers",
    ):
        table.add_column(heading, justify="left" if heading == "killed while" else "right")
    for phase, row in summary["phases"].items():
        counts = [str(row[key]) for key in ("kills", "of_rank_0", "of_rank_1", "of_both", "resumes")]
        table.add_row(phase, *counts, f"{row['lost_mean']:.2f}", str(row["lost_max"]), str(row["with_leftovers"]))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        f"steps lost: {summary['lost_mean']:.2f} on average, {summary['lost_max']} at most "
        f"(bound {summary['lost_bound']}: the interval, and as much again while a checkpoint is being written)"
    )
    console.print(f"ranks that were left ended {summary['survivors']}, with exit codes {summary['survivor_codes']}")
    console.print(f"runs that ended otherwise than without a kill: {len(summary['different'])} of {summary['runs']}")
    for run in summary["different"]:
        console.print(f"  {run['kind']}: {run['difference']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a run or a rank did not end as it should, or lost too much; 2: wrong input."""
    passed = True
    # What killed processes leave in the system is cleared when this one ends, which need not be told.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")

    def everything() -> None:
        nonlocal passed
        parser = make_parser(__doc__, Settings)
        parser.add_argument(
            "--folder", type=Path, default=None, help="where the runs lie (default: a temporary folder)"
        )
        options = parser.parse_args(arguments)
        settings = read_settings(options, Settings(), SMALL)
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash_test_")))
            kills, runs = crash(settings, folder, lambda text: print(text, file=sys.stderr, flush=True))
        summary = summarize(kills, runs, settings)
        print_summary(summary, settings)
        if options.json is not None:
            content = {
                "settings": asdict(settings),
                "machine": machine(),
                "seconds": time.monotonic() - began,
                "summary": summary,
                "runs": runs,
                "kills": [asdict(kill) for kill in kills],
            }
            atomic_write_json(options.json, content)
        passed = (
            not summary["different"] and not summary["wrong_codes"] and summary["lost_max"] <= summary["lost_bound"]
        )

    try:
        return exit_code(everything) or (0 if passed else 1)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
