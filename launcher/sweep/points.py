"""Which runs is a sweep, and what is each called? Pure functions from the grid to resolved configs."""

import copy
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, parse_config, set_value
from launcher.config_checks import check_config
from launcher.sweep.sweep_config import Choice, SweepConfig, excluded_values, identity, is_choice, parse_choice
from launcher.yaml_files import merge, parse_yaml, read_mapping
from sparse_zero.errors import InputError

# Of a value in a name, and of a whole name, which is a folder's and, with a suffix, a file's.
_MAX_VALUE, _MAX_NAME = 32, 120
# Hexadecimal digits: two of the points of a sweep share 40 bits once in 100,000 sweeps.
_HASH_DIGITS = 10
_PLAIN = re.compile(r"[A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    # Of its run folder in the sweep's folder: from the settings that vary, and nothing else.
    name: str
    # The grid's keys, with a value or the name of a choice each.
    settings: Mapping[str, Any]
    config: RunConfig


def expand(sweep: SweepConfig, base: Mapping[str, Any]) -> list[Point]:
    """All points in the order of the grid, whose last key changes fastest.

    Args:
        sweep: the section.
        base: the config without the section, as read from YAML.

    Raises:
        InputError: a point is no run that could be started, two are the same, or all are excluded.
    """
    points: list[Point] = []
    # A whole config without its folder, and a name without case, by the name of the point that has it.
    known: dict[str, str] = {}
    choices = _read_choices(sweep)
    for settings in combinations(sweep):
        name = name_of(settings)
        config = _parse(sweep, base, choices, settings, name)
        run = repr(dataclasses.replace(config, output=dataclasses.replace(config.output, folder="FOLDER")))
        for each, what in ((run, "the same run"), (name.casefold(), "the same name on some file systems")):
            if each in known:
                raise InputError(
                    f"the points {known[each]} and {name} of the sweep are {what}: take one of them out of sweep.grid"
                )
            known[each] = name
        points.append(Point(name=name, settings=settings, config=config))
    if not points:
        raise InputError("sweep.exclude leaves no point of sweep.grid: take some of it out")
    return points


def find_config(sweep: SweepConfig, base: Mapping[str, Any], name: str) -> RunConfig | None:
    """The config of one point; None where the grid has none of this name.

    Raises:
        InputError: it is no run that could be started.
    """
    settings = next((each for each in combinations(sweep) if name_of(each) == name), None)
    return None if settings is None else _parse(sweep, base, _read_choices(sweep), settings, name)


def combinations(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """The settings of every point that is not excluded, in the grid's order."""
    excluded: list[dict[str, set[str]]] = []
    for entry in sweep.exclude:
        known = {key: {identity(value) for value in sweep.grid[key]} for key in entry}
        excluded.append(
            {key: {identity(each) for each in excluded_values(value, known[key])} for key, value in entry.items()}
        )
    for values in itertools.product(*sweep.grid.values()):
        settings = dict(zip(sweep.grid, values, strict=True))
        if not any(all(identity(settings[key]) in entry[key] for key in entry) for entry in excluded):
            yield settings


def name_of(settings: Mapping[str, Any]) -> str:
    """A short name, safe for a file system, which no other settings of the same keys have.

    ``method=rows,learning_rate=0.001,seed=0``: keys by as many of their last parts as tell them apart. It depends on
    these settings only, so that a point keeps its name when the grid gets further values.
    """
    keys = short_keys(list(settings))
    name = ",".join(f"{key}={_label(value)}" for key, value in zip(keys, settings.values(), strict=True))
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[: _MAX_NAME - _HASH_DIGITS - 1]}~{_hash(name)}"


def short_keys(keys: Sequence[str]) -> list[str]:
    """The shortest ends of dotted keys that differ from each other."""
    short = []
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-number:]) for number in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        end = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), key)
        short.append(_slug(end))
    return short


def _label(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _slug(repr(value))
    if isinstance(value, str) and value != "none" and isinstance(_as_yaml(value), str):
        return _slug(value)
    return _slug(str(value), hashed=identity(value))


def _as_yaml(text: str) -> Any:
    """What a text would be in YAML without quotes; the text itself where it would be nothing."""
    try:
        return parse_yaml(text, "")
    except InputError:
        return text


def _slug(text: str, hashed: str | None = None) -> str:
    """``text`` where it is short and plain; else what is plain of it and a hash of all of it."""
    if hashed is None and _PLAIN.fullmatch(text) and len(text) <= _MAX_VALUE:
        return text
    plain = "-".join(_PLAIN.findall(text)).strip("-.")[: _MAX_VALUE - _HASH_DIGITS - 1]
    return f"{plain}~{_hash(hashed or text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]


def _read_choices(sweep: SweepConfig) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The files that every choice merges, each read once."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, values in sweep.grid.items():
        if is_choice(values):
            for name, content in values.items():
                choice = parse_choice(f"sweep.grid.{key}.{name}", content)
                found[key, name] = [read_mapping(Path(file)) for file in choice.extends]
    return found


def _parse(
    sweep: SweepConfig,
    base: Mapping[str, Any],
    files: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
    name: str,
) -> RunConfig:
    """The run of one point, checked as `sparse-zero launch` checks one."""
    mapping: dict[str, Any] = copy.deepcopy(dict(base))
    try:
        # A key that the grid has is the last word over what a choice merges.
        for key, value in settings.items():
            if is_choice(sweep.grid[key]):
                place = f"sweep.grid.{key}.{value}"
                choice = parse_choice(place, sweep.grid[key][value])
                mapping = with_choice(mapping, place, choice, files[key, value])
        for key, value in settings.items():
            if not is_choice(sweep.grid[key]):
                set_value(mapping, key, copy.deepcopy(value), f"sweep.grid.{key}")
        set_value(mapping, "output.folder", str(sweep.path / name), "sweep.folder")
        config = parse_config(mapping, source="its config")
        check_config(config)
    except InputError as error:
        raise InputError(f"the point {name} of the sweep: {error}") from error
    return config


def with_choice(
    mapping: dict[str, Any], place: str, choice: Choice, files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A config changed by a choice.

    Args:
        mapping: the config; it may be changed in place.
        place: where the choice stands, for errors.
        choice: what it does.
        files: the content of those that the choice extends.

    Raises:
        InputError: the choice takes out what is not there, or sets what has no place.
    """
    for key in choice.without:
        _take_out(mapping, key, place)
    for each in files:
        mapping = merge(mapping, copy.deepcopy(dict(each)))
    for key, value in choice.settings.items():
        if "." in key:
            set_value(mapping, key, copy.deepcopy(value), f"{place}.{key}")
        else:
            mapping = merge(mapping, {key: copy.deepcopy(value)})
    return mapping


def _take_out(mapping: dict[str, Any], key: str, place: str) -> None:
    *sections, last = key.split(".")
    target: Any = mapping
    for section in sections:
        target = target.get(section) if isinstance(target, dict) else None
    if not isinstance(target, dict) or last not in target:
        raise InputError(f"{place}.without has {key}, which the config has not: take it out")
    del target[last]
