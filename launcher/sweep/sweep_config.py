"""What may the section ``sweep`` of a config say?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import parse_as, read_with_overrides, refuse_credentials
from launcher.yaml_files import names_of_files, parse_yaml, read_mapping
from sparse_zero.errors import InputError
from sparse_zero.files import to_json

SECTION = "sweep"
# Of the grid before exclusions: weeks of work, and far from a mistyped grid of millions.
MAX_POINTS = 4096
# Columns of the table that tell of a point; a choice of such a name would stand there twice.
PLACE_COLUMNS = ("index", "name", "state", "exit_code")
DEFAULT_REPEAT = "training.seed"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid over settings of a run."""

    # Where everything goes: each point's run folder, the resolved configs, the logs, the table. Relative paths start
    # at the current directory.
    folder: str
    # What varies, the first key slowest. A dotted key has a list of values; a word has named choices, each of which
    # sets several keys: see Choice.
    grid: dict[str, Any]
    # Combinations that are left out: each names keys of the grid, with one of their values or a list of some.
    exclude: tuple[dict[str, Any], ...] = ()
    # Keys over which means are taken; None: training.seed, where it varies.
    repeat_over: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.folder.strip():
            raise InputError("sweep.folder is empty: name the folder that the sweep writes to")
        if not self.grid:
            raise InputError("sweep.grid is empty: name a setting and its values, as in training.seed: [0, 1, 2]")
        for key, values in self.grid.items():
            _check_key(key, values)
        size = math.prod(len(values) for values in self.grid.values())
        if size > MAX_POINTS:
            raise InputError(f"sweep.grid has {size:,} points, more than {MAX_POINTS:,}: make several sweeps of it")
        for number, excluded in enumerate(self.exclude):
            if not excluded:
                raise InputError(f"sweep.exclude.{number} is empty, which is every point: name keys and values")
            for key, value in excluded.items():
                self._check_excluded(f"sweep.exclude.{number}", key, value)
        for key in self.repeat_over or ():
            if key not in self.grid:
                raise InputError(f"sweep.repeat_over has {key!r}, which sweep.grid has not: {self._known()}")

    def _check_excluded(self, place: str, key: str, value: Any) -> None:
        if key not in self.grid:
            raise InputError(f"{place} has the key {key!r}, which sweep.grid has not: {self._known()}")
        known = {identity(each) for each in self.grid[key]}
        for each in excluded_values(value, known):
            if identity(each) not in known:
                values = ", ".join(str(each) for each in self.grid[key])
                raise InputError(f"{place}.{key} is {each!r}, which is no value of it in sweep.grid: it has {values}")

    def _known(self) -> str:
        return f"known are {', '.join(self.grid)}"

    @property
    def path(self) -> Path:
        """The folder; a leading ``~`` is the home directory."""
        try:
            return Path(self.folder).expanduser()
        except RuntimeError as error:
            raise InputError(f"sweep.folder is {self.folder!r}: that user has no home directory") from error

    @property
    def repeats(self) -> tuple[str, ...]:
        """The keys over which means are taken."""
        if self.repeat_over is not None:
            return self.repeat_over
        return (DEFAULT_REPEAT,) if DEFAULT_REPEAT in self.grid else ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one named choice changes, in this order; its other keys are ``settings``."""

    # Dotted keys that are taken out of the config first: what is merged would else keep what it does not name.
    without: tuple[str, ...]
    # YAML files that are merged over the config, as `extends` merges them.
    extends: tuple[str, ...]
    # Sections, which are merged, and dotted keys, which are set.
    settings: Mapping[str, Any]


def parse_choice(place: str, content: Mapping[str, Any]) -> Choice:
    """A choice of the grid; ``place`` is where it stands, for errors."""
    settings = dict(content)
    without = settings.pop("without", [])
    if not isinstance(without, list) or not all(isinstance(key, str) and key for key in without):
        raise InputError(f"{place}.without is {without!r}: give a list of keys, as in [selection]")
    extends = names_of_files(settings.pop("extends", []), place)
    for key, value in settings.items():
        if "." in key:
            _check_dotted(place, key)
        elif not isinstance(value, dict):
            raise InputError(f"{place}.{key} is {value!r}: a choice has sections, or keys such as training.seed")
    return Choice(without=tuple(without), extends=tuple(extends), settings=settings)


def is_choice(values: Any) -> bool:
    """Whether the values of a key of the grid are named choices."""
    return isinstance(values, dict)


def identity(value: Any) -> str:
    """What two values share only if they are the same in a config: ``1``, ``1.0`` and ``true`` are three."""
    return f"{type(value).__name__}:{value!r}" if isinstance(value, float) else to_json(value)


def excluded_values(value: Any, known: set[str]) -> list[Any]:
    """The values that one key of an exclusion names: a list means any of them, unless it is itself a value."""
    return value if isinstance(value, list) and identity(value) not in known else [value]


def _check_dotted(place: str, key: str) -> None:
    if not all(key.split(".")):
        raise InputError(f"{place} has the key {key!r}: write section.key, as in training.seed")
    if key == "output.folder":
        raise InputError(f"{place} has output.folder: each point's is sweep.folder and its name; take it out")
    if key.partition(".")[0] == SECTION:
        raise InputError(f"{place} has {key}: a sweep does not change itself; take it out")


def _check_key(key: str, values: Any) -> None:
    place = f"sweep.grid.{key}"
    if not isinstance(values, list | dict):
        raise InputError(f"{place} is {values!r}: give a list of values, or named choices")
    if not values:
        raise InputError(f"{place} is empty: give at least one value, or take the key out")
    if isinstance(values, list):
        if "." not in key:
            raise InputError(f"{place} is a list, and {key!r} is no setting: write section.key, as in training.seed")
        _check_dotted("sweep.grid", key)
        seen = set()
        for value in values:
            if identity(value) in seen:
                raise InputError(f"{place} has {value!r} twice: remove one")
            seen.add(identity(value))
        return
    if "." in key or key in PLACE_COLUMNS:
        why = "a setting" if "." in key else "a column of the table"
        raise InputError(f"{place} has named choices, and {key!r} is the name of {why}: give them another name")
    for name, content in values.items():
        if not isinstance(content, dict):
            raise InputError(f"{place}.{name} is {content!r}: a choice is a mapping of what it sets, {{}} for nothing")
        parse_choice(f"{place}.{name}", content)


@dataclass(frozen=True, kw_only=True)
class _SweepSection:
    """The section in its place, so that errors say where a key stands."""

    sweep: SweepConfig


def read_sweep(path: str | Path, overrides: list[str]) -> tuple[SweepConfig, dict[str, Any]]:
    """The sweep that a YAML file describes, and the config that it varies, of which nothing is checked yet.

    Args:
        path: the file.
        overrides: ``--section.key=value``, of the config and of the section.

    Raises:
        InputError: the file has no section ``sweep``, or what stands there does not hold.
    """
    mapping = read_with_overrides(path, overrides, _place_files)
    refuse_credentials(mapping, str(path))
    if SECTION not in mapping:
        raise InputError(
            f"{path} has no section sweep: add one with folder and grid, or start the single run with `sparse-zero "
            "launch`"
        )
    section = mapping.pop(SECTION)
    sweep = parse_as(_SweepSection, {SECTION: section}, str(path)).sweep
    _check_overrides(sweep, overrides)
    return sweep, mapping


def _check_overrides(sweep: SweepConfig, overrides: Sequence[str]) -> None:
    """Refuse an override that the grid, or one of its choices, undoes: it would be lost without a word."""
    given: list[tuple[str, str]] = []
    for override in overrides:
        name, _, text = override.removeprefix("--").partition("=")
        if name.partition(".")[0] != SECTION:
            given += [(name, leaf) for leaf in _leaves(name, parse_yaml(text, f"the value of --{name}"))]
    if not given:
        return
    if any(leaf == "output.folder" for _, leaf in given):
        raise InputError("--output.folder is given, but each point has its own in sweep.folder: give --sweep.folder")
    for what, settings in _settings_of_grid(sweep):
        for setting in settings:
            lost = next((name for name, leaf in given if f"{leaf}.".startswith(f"{setting}.")), None)
            if lost is not None:
                raise InputError(f"--{lost} is given, but {what} {setting}: change it there")


def _settings_of_grid(sweep: SweepConfig) -> Iterator[tuple[str, list[str]]]:
    """Dotted keys that points do not take from the config, and what does that."""
    for key, values in sweep.grid.items():
        if not is_choice(values):
            yield "sweep.grid varies", [key]
            continue
        for name, content in values.items():
            choice = parse_choice(f"sweep.grid.{key}.{name}", content)
            merged = [read_mapping(Path(file)) for file in choice.extends]
            merged.append({key: value for key, value in choice.settings.items() if "." not in key})
            dotted = [key for key in choice.settings if "." in key]
            who = f"the choice {name} of sweep.grid.{key}"
            yield f"{who} sets", [*dotted, *(leaf for each in merged for leaf in _leaves("", each))]
            yield f"{who} takes out", list(choice.without)


def _leaves(name: str, value: Any) -> list[str]:
    """Dotted keys of what is no mapping in ``value``, which stands at ``name``."""
    if not isinstance(value, dict):
        return [name]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}" if name else key, inner)]


def _place_files(content: dict[str, Any], folder: Path) -> None:
    """Let the files that choices extend start at the folder of the file that names them."""
    section = content.get(SECTION)
    grid = section.get("grid") if isinstance(section, dict) else None
    for key, values in grid.items() if isinstance(grid, dict) else ():
        for name, choice in values.items() if isinstance(values, dict) else ():
            if isinstance(choice, dict) and "extends" in choice:
                names = names_of_files(choice["extends"], f"sweep.grid.{key}.{name}")
                choice["extends"] = [str(folder / Path(each).expanduser()) for each in names]
