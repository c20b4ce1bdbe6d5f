"""What lies in a sweep's folder, and which number has each point?

The numbers are those of Slurm's array tasks, which start hours after the list was made: a point keeps its number
when the grid changes, and what a task runs is the config that was written with the list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, load_config, resolved_yaml
from launcher.run_folder import RunFolder, check_can_write_in, check_same_run, is_in_use
from launcher.stopping import EXIT_SIGNAL, SIGNALS
from launcher.summary import as_mapping
from launcher.sweep.points import Point
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, atomic_write_text, read_json

FORMAT = "sparse_zero.sweep"
# finished: has its summary. failed: ended with an error. stopped: begun, and a start continues it. running: another
# process works in its folder. missing: not begun.
STATES = ("finished", "running", "failed", "stopped", "missing")
# A run may go on with others of these; but what it has measured already is not the same number.
_MEASURED = ("data.validation", "data.validation_split", "training.validation_every", "output.evaluate")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One line of the list of points."""

    index: int
    name: str
    settings: Mapping[str, Any]
    # None: the grid no longer has it.
    point: Point | None


class SweepFolder:
    """Paths of one sweep. Names of points have a ``=`` in them, which no other file here has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points = path / "points.json"
        self.table = path / "table.csv"
        self.parquet = path / "table.parquet"
        self.markdown = path / "table.md"
        self.plot = path / "plot.png"

    def run(self, name: str) -> RunFolder:
        """The run folder of a point."""
        return RunFolder(self.path / name)

    def config(self, name: str) -> Path:
        """The resolved config that a point is started with."""
        return self.path / "points" / f"{name}.yaml"

    def outcome(self, name: str) -> Path:
        """How the last start of a point ended."""
        return self.path / "points" / f"{name}.json"

    def log(self, name: str) -> Path:
        """What the starts of a point have said."""
        return self.path / "logs" / f"{name}.log"

    def check_writable(self) -> None:
        """Raise unless files can be made in the folder and below it.

        Raises:
            InputError: names the file in the way, or the folder that does not allow it.
        """
        for place in (self.path, self.config("any").parent, self.log("any").parent):
            check_can_write_in(place, f"sweep.folder is {self.path}")

    def write_outcome(self, name: str, code: int, seconds: float) -> None:
        """Keep how a start ended: its exit code and how long it took."""
        atomic_write_json(self.outcome(name), {"exit_code": code, "seconds": seconds})

    def exit_code(self, name: str) -> int | None:
        """Of the last start that has ended; None where there is none."""
        path = self.outcome(name)
        code = as_mapping(read_json(path)).get("exit_code") if path.is_file() else None
        return code if isinstance(code, int) else None

    def state(self, name: str) -> str:
        """One of :data:`STATES`."""
        run, code = self.run(name), self.exit_code(name)
        if run.summary.is_file():
            return "finished"
        if is_in_use(run.path):
            return "running"
        if code and code - EXIT_SIGNAL not in SIGNALS:
            return "failed"
        return "stopped" if run.config.is_file() else "missing"


def read_list(folder: SweepFolder) -> list[Listed]:
    """The list that was written last, without the points' configs; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    if not folder.points.is_file():
        return []
    content = as_mapping(read_json(folder.points, strict=True))
    entries = content.get("points")
    if content.get("format") != FORMAT or not isinstance(entries, list):
        raise InputError(f"{folder.points} is no list of points of a sweep: restore it, or name another sweep.folder")
    listed = []
    for index, entry in enumerate(entries):
        name, settings = as_mapping(entry).get("name"), as_mapping(entry).get("settings")
        # A name goes into paths.
        if not isinstance(name, str) or "=" not in name or "/" in name or not isinstance(settings, Mapping):
            raise InputError(f"{folder.points}: entry {index} is no point: restore it, or name another sweep.folder")
        listed.append(Listed(index=index, name=name, settings=settings, point=None))
    return listed


def list_points(before: Sequence[Listed], points: Sequence[Point]) -> list[Listed]:
    """The points with their numbers: what was listed before keeps its own, and the others follow in their order."""
    new = {point.name: point for point in points}
    kept = []
    for each in before:
        point = new.pop(each.name, None)
        settings = each.settings if point is None else point.settings
        kept.append(Listed(index=each.index, name=each.name, settings=settings, point=point))
    added = [
        Listed(index=index, name=point.name, settings=point.settings, point=point)
        for index, point in enumerate(new.values(), start=len(kept))
    ]
    return kept + added


def write_list(folder: SweepFolder, listed: Sequence[Listed]) -> None:
    """Write the list and every config of it that is not there or another one."""
    for each in listed:
        if each.point is not None:
            path, text = folder.config(each.name), resolved_yaml(each.point.config)
            if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
                atomic_write_text(path, text)
    points = [{"name": each.name, "settings": dict(each.settings)} for each in listed]
    atomic_write_json(folder.points, {"format": FORMAT, "points": points})


def check_folders(folder: SweepFolder, configs: Mapping[str, RunConfig]) -> None:
    """Raise where the run folder of a point holds another run.

    Args:
        folder: of the sweep.
        configs: of points by their names.

    Raises:
        InputError: names the point, and what differs.
    """
    for name, config in configs.items():
        run = folder.run(name)
        if not run.config.is_file() or run.config.read_bytes() == resolved_yaml(config).encode("utf-8"):
            continue
        try:
            check_same_run(run, config)
        except InputError as error:
            raise InputError(f"the point {name} of the sweep: {error}") from error
        if run.summary.is_file():
            _check_measured(name, run, config)


def _check_measured(name: str, run: RunFolder, config: RunConfig) -> None:
    """Raise where a finished run was measured otherwise: its numbers would stand beside those of other data."""
    try:
        old = load_config(run.config)
    except InputError:
        return  # Of another version, and the same but for settings that do not matter here.
    for setting in _MEASURED:
        before, now = (attrgetter(setting)(each) for each in (old, config))
        if before != now:
            raise InputError(
                f"the point {name} of the sweep is finished, and {setting} was {before!r} and is now {now!r}: its "
                f"numbers do not compare; name another sweep.folder, or delete {run.path} to run it again"
            )


def find_listed(listed: Sequence[Listed], named: str, given: str) -> Listed:
    """The point of this number or name.

    Raises:
        InputError: there is none.
    """
    found = next((each for each in listed if named in (each.name, str(each.index))), None)
    if found is None:
        last = f"0 to {len(listed) - 1}" if listed else "none: run the sweep, or write its script, first"
        raise InputError(
            f"{given} is {named}, but the sweep's list of points (points.json) has no such one: it has {last}"
        )
    return found


def frozen_config(folder: SweepFolder, listed: Listed) -> RunConfig:
    """The config that was written with the list.

    Raises:
        InputError: it is missing or damaged.
    """
    return load_config(folder.config(listed.name))
