"""What may the YAML of an accuracy study say: which tasks, methods, budgets and seeds, and under which protocol?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.config import parse_as, read_with_overrides, refuse_credentials
from launcher.sweep.sweep_config import Choice, parse_choice
from launcher.yaml_files import merge, names_of_files, read_mapping
from sparse_zero.errors import InputError

# Of every mean: fewer tell nothing of the spread.
MIN_SEEDS = 3
# Keys of a method, and of a task, that are the study's own; the others are those of a choice of a sweep.
_METHOD_KEYS = ("rates", "budgets", "budget_keys", "at", "label")
_TASK_KEYS = ("head", "development", "label")
# Where a budget goes: the section that a method has decides.
_BUDGET_OF_OURS, _BUDGET_OF_PEERS = "selection.budget.fraction", "peer.fraction"


@dataclass(frozen=True, kw_only=True)
class StudySection:
    """What is asked, and what all points share."""

    # Everything goes here: data, points, run folders, tables. Relative paths start at the current directory.
    folder: str
    # In one sentence, for the reports.
    question: str
    # Of the final runs: data order, initialisation of what is new, calibration and random scores.
    seeds: tuple[int, ...] = (1, 2, 3)
    # Methods that the others are held against: full fine-tuning, and the one at the same budget. Studies without
    # either leave the column out.
    full: str = "full"
    baseline: str = "lora"
    # A question that training (or development) and test data share. refuse: the study does not start; drop: the record
    # leaves the training data, counted; keep: it stays there, counted in the report, and is not tuned on.
    overlap: Literal["refuse", "drop", "keep"] = "refuse"
    # Adapters of finished points (the peers' too), whose size is in the table either way. Checkpoints never stay.
    keep_adapters: bool = False

    def __post_init__(self) -> None:
        for name in ("folder", "question"):
            if not getattr(self, name).strip():
                raise InputError(f"study.{name} is empty: say it")
        _check_seeds(
            "study.seeds", self.seeds, MIN_SEEDS, "3 or more different whole numbers from 0 on, such as [1, 2, 3]"
        )

    @property
    def path(self) -> Path:
        """The folder; a leading ``~`` is the home directory."""
        return Path(self.folder).expanduser()


@dataclass(frozen=True, kw_only=True)
class TuningSection:
    """How the learning rate of each task, method and budget is found, without the test data."""

    # Candidates of every method that names none itself.
    rates: tuple[float, ...]
    # Of the tuning runs: each candidate is run with all of them, and judged by the mean. None of study.seeds.
    seeds: tuple[int, ...] = (0,)
    # Optimizer steps of a tuning run; None: those of a final one.
    steps: int | None = None
    # What the best rate is best at, on the development data. accuracy: share of its problems answered right, ties
    # by the loss; loss: per token.
    metric: Literal["accuracy", "loss"] = "accuracy"
    # Records of the development data that are taken out of the training data, for tasks that name no file.
    records: int = 500
    # Rounds in which every method gets one more candidate: beyond the edge where the best one lies at it, else between
    # the best and its better neighbour. Only as long as one of them is at an edge.
    extend: int = 0

    def __post_init__(self) -> None:
        check_rates("tuning.rates", self.rates)
        _check_seeds("tuning.seeds", self.seeds, 1, "one or more different whole numbers from 0 on, such as [100]")
        for name, minimum in (("steps", 1), ("records", 1), ("extend", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"tuning.{name} is {value}: it must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study."""

    study: StudySection
    tuning: TuningSection
    # Sections of a run that all points share.
    run: dict[str, Any] = field(default_factory=dict)
    # By their names: sections of a run (model, data, training), and the keys of :class:`Task`.
    tasks: dict[str, dict[str, Any]]
    # By their names: a choice of a sweep, and the keys of :class:`Method`.
    methods: dict[str, dict[str, Any]]
    # Shares of all parameters that are trained, the head not counted.
    budgets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tasks", "methods"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: name at least one")
            for each in getattr(self, name):
                if not each.replace("-", "").replace("_", "").replace(".", "").isalnum():
                    raise InputError(f"{name} has {each!r}: use letters, digits, dots and dashes; it goes into paths")
        for value in self.budgets:
            if not 0 < value <= 1:
                raise InputError(f"budgets has {value}: give shares of all parameters, 0.01 is one percent")
        if len(set(self.budgets)) < len(self.budgets):
            raise InputError(f"budgets is {list(self.budgets)}: one stands twice")
        if common := sorted({*self.tuning.seeds} & {*self.study.seeds}):
            raise InputError(
                f"tuning.seeds has {common[0]}, one of study.seeds: the rate would be tuned on a run that counts; "
                "take another"
            )
        sizes = {each.name: len(each.rates) for each in self.all_methods() if each.rates}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(f"methods have different numbers of rates ({told}): give each the same, or none")
        self.all_tasks()

    def all_methods(self) -> list[Method]:
        """The methods, in their order."""
        return [_method(name, content, self) for name, content in self.methods.items()]

    def all_tasks(self) -> list[Task]:
        """The tasks, in their order."""
        return [_task(name, content) for name, content in self.tasks.items()]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    name: str
    # In tables and pictures.
    label: str
    # Candidates for the learning rate; empty: the config's own, untuned, which a frozen model needs no other than.
    rates: tuple[float, ...]
    # Those that it is run at; empty: at the one amount that its own settings say.
    budgets: tuple[float, ...]
    # Dotted keys that a budget is written to.
    budget_keys: tuple[str, ...]
    # Further settings at single budgets, by the budget.
    at: Mapping[float, Choice]
    # What it changes in a run.
    choice: Choice


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn."""

    name: str
    label: str
    # Sections of a run: model, data, training.
    sections: Mapping[str, Any]
    # Patterns of modules that the base's files lack; all methods train them whole, and no budget counts them.
    head: tuple[str, ...]
    # A file of development data; None: taken out of the training data.
    development: str | None


def check_rates(place: str, rates: Sequence[float]) -> None:
    """Raise unless the rates are positive, different, and in rising order.

    Raises:
        InputError: names the place.
    """
    numbers = all(isinstance(rate, int | float) and math.isfinite(rate) and rate > 0 for rate in rates)
    if not numbers or list(rates) != sorted(set(rates)):
        raise InputError(f"{place} is {list(rates)}: give different positive numbers in rising order")


def _check_seeds(place: str, seeds: Sequence[int], at_least: int, wanted: str) -> None:
    if len(seeds) < at_least or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"{place} is {list(seeds)}: give {wanted}")


def _strings(place: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise InputError(f"{place} is {value!r}: give a list of texts")
    return tuple(value)


def _label(place: str, value: Any, name: str) -> str:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise InputError(f"{place}.label is {value!r}: give a text")
    return name if value is None else value


def _method(name: str, content: Mapping[str, Any], config: StudyConfig) -> Method:
    place = f"methods.{name}"
    own = {key: content[key] for key in _METHOD_KEYS if key in content}
    choice = parse_choice(place, {key: value for key, value in content.items() if key not in _METHOD_KEYS})
    rates = own.get("rates", list(config.tuning.rates))
    if not isinstance(rates, list):
        raise InputError(f"{place}.rates is {rates!r}: give a list of learning rates, [] for none")
    check_rates(f"{place}.rates", rates)
    budgets = own.get("budgets", list(config.budgets))
    if not isinstance(budgets, list) or any(each not in config.budgets for each in budgets):
        known = ", ".join(map(str, config.budgets)) or "none"
        raise InputError(f"{place}.budgets is {budgets!r}: give some of budgets ({known}), [] for none")
    at = own.get("at", {})
    if not isinstance(at, dict):
        raise InputError(f"{place}.at is {at!r}: give a mapping from budgets to what is set there")
    known_at = {str(each): each for each in budgets}
    for key, value in at.items():
        if key not in known_at or not isinstance(value, dict):
            raise InputError(f"{place}.at has {key!r}: give one of its budgets ({', '.join(known_at) or 'none'})")
    is_peer = any("peer" in each for each in (choice.settings, *map(read_mapping, map(Path, choice.extends))))
    default_key = _BUDGET_OF_PEERS if is_peer else _BUDGET_OF_OURS
    return Method(
        name=name,
        label=_label(place, own.get("label"), name),
        rates=tuple(map(float, rates)),
        budgets=tuple(budgets),
        budget_keys=_strings(f"{place}.budget_keys", own.get("budget_keys", [default_key])),
        at={known_at[key]: parse_choice(f"{place}.at.{key}", value) for key, value in at.items()},
        choice=choice,
    )


def _task(name: str, content: Mapping[str, Any]) -> Task:
    place = f"tasks.{name}"
    sections = {key: value for key, value in content.items() if key not in _TASK_KEYS}
    for key, value in sections.items():
        if not isinstance(value, dict):
            raise InputError(f"{place}.{key} is {value!r}: a task has sections of a run, as model, data, training")
    development = content.get("development")
    if development is not None and not (isinstance(development, str) and development.strip()):
        raise InputError(f"{place}.development is {development!r}: name a file, or leave it out")
    return Task(
        name=name,
        label=_label(place, content.get("label"), name),
        sections=sections,
        head=_strings(f"{place}.head", content.get("head", [])),
        development=development,
    )


def read_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study that a YAML file describes, changed by ``--section.key=value``.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    mapping = read_with_overrides(path, overrides, _place_files)
    refuse_credentials(mapping, str(path))
    return parse_as(StudyConfig, mapping, str(path))


def _place_files(content: dict[str, Any], folder: Path) -> None:
    """Let files that methods and tasks extend start at the folder of the file that names them."""
    tasks, methods = (content.get(key) for key in ("tasks", "methods"))
    entries = list(methods.values()) if isinstance(methods, dict) else []
    entries += [at for each in entries if isinstance(each, dict) for at in _mappings(each.get("at"))]
    for each in entries:
        if isinstance(each, dict) and "extends" in each:
            names = names_of_files(each["extends"], "methods")
            each["extends"] = [str(folder / Path(name).expanduser()) for name in names]
    for each in _mappings(tasks):
        merged: dict[str, Any] = {}
        for name in names_of_files(each.pop("extends", []), "tasks"):
            merged = merge(merged, read_mapping(folder / Path(name).expanduser()))
        each.update(merge(merged, each))


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [each for each in value.values() if isinstance(each, dict)] if isinstance(value, dict) else []
