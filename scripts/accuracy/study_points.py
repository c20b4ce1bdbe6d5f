"""Which runs is a study? Pure functions from its config, and what tuning has found, to checked runs with names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import RunConfig, parse_config, resolved_yaml, set_value
from launcher.deepspeed_config import check_own_config
from launcher.sweep.points import name_of, with_choice
from launcher.sweep.sweep_config import Choice
from launcher.yaml_files import merge, read_mapping
from scripts.accuracy.study_config import Method, StudyConfig, Task
from scripts.accuracy.study_data import TaskData, data_config, data_settings
from sparse_zero.errors import InputError
from sparse_zero.selection.shares import share_of

if TYPE_CHECKING:
    from scripts.accuracy.heads import Sizes

TUNE, FINAL = "tune", "final"
# What a run of a study has unless the study says otherwise: nothing that no table reads, for it takes a good part of a
# short run.
DEFAULTS: Mapping[str, Any] = {
    "zero": {"stage": 2, "placement": "inplace"},
    "output": {
        "merged": False, "evaluate_base": False, "report": False, "tensorboard": False, "adapter": True,
    },
    "memory": {"measure": False, "simulate": False},
}  # fmt: skip
# In which the methods of a task may differ, besides what they train: how a run computes, and what kinds of
# region and modules have of their own.
_FREE_TRAINING = (
    "learning_rate", "per_kind", "per_module", "weight_decay", "optimizer", "micro_batch_size",
    "gradient_checkpointing", "loss_chunk", "kernels", "prefix_cache",
)  # fmt: skip
# What is trained may be chosen by other data than it is trained on.
_FREE_DATA = ("calibration", "calibration_split")
_SET_BY_STUDY = (
    "training.learning_rate", "training.seed", "selection.seed", "output.folder",
    "data.train", "data.validation", "data.test", "data.format", "data.limit", "data.evaluation.limit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One task by one method at one budget: what gets a learning rate of its own, and a line of the table."""

    task: Task
    method: Method
    # Share of all parameters; None: what the method's own settings say.
    budget: float | None

    @property
    def key(self) -> tuple[str, str, float | None]:
        """What tells it from others."""
        return self.task.name, self.method.name, self.budget


@dataclass(frozen=True, kw_only=True)
class StudyPoint:
    """One run."""

    # Of its run folder in the study's folder.
    name: str
    stage: str
    setup: Setup
    rate: float | None
    seed: int
    # Stage, task, method, budget, rate, seed: what the name is made of.
    settings: Mapping[str, Any]
    config: RunConfig

    @property
    def is_peer(self) -> bool:
        """Whether another worker than ``sparse-zero train`` trains it."""
        return hasattr(self.config, "peer")

    @cached_property
    def yaml(self) -> str:
        """The resolved config that it is started with."""
        return resolved_yaml(self.config)


def setups_of(config: StudyConfig) -> list[Setup]:
    """All of them, in the order of the table."""
    return [
        Setup(task=task, method=method, budget=budget)
        for task in config.all_tasks()
        for method in config.all_methods()
        for budget in (method.budgets or (None,))
    ]


def tuning_points(
    config: StudyConfig, setup: Setup, rate: float, data: TaskData, sizes: Sizes | None
) -> list[StudyPoint]:
    """The runs that try one learning rate on the development data, one of each seed; they are given no test data."""
    points = [_point(config, setup, TUNE, rate, seed, data, sizes) for seed in config.tuning.seeds]
    # What the protocol promises, whatever a method or task has set.
    assert str(data.tested_on) not in repr([each.config for each in points]), "tuning must not be given the test data"
    return points


def final_points(
    config: StudyConfig, setup: Setup, rate: float | None, data: TaskData, sizes: Sizes | None
) -> list[StudyPoint]:
    """The runs with the chosen rate and every seed."""
    return [_point(config, setup, FINAL, rate, seed, data, sizes) for seed in config.study.seeds]


def check_same_protocol(points: Sequence[StudyPoint]) -> None:
    """Raise unless all runs of a task and stage learn from the same data for as many steps and tokens.

    Raises:
        InputError: names the two points, and what differs.
    """
    first: dict[tuple[str, str], StudyPoint] = {}
    for point in points:
        other = first.setdefault((point.stage, point.setup.task.name), point)
        ours, theirs = _protocol(point), _protocol(other)
        for key, value in ours.items():
            if value != theirs[key]:
                raise InputError(
                    f"methods.{point.setup.method.name} has {key} {value!r}, and {other.setup.method.name} has "
                    f"{theirs[key]!r}: methods of a task learn from the same batches for as many steps; set it in run "
                    "or in the task"
                )


def _protocol(point: StudyPoint) -> dict[str, Any]:
    config = point.config
    free = (*_FREE_TRAINING, "seed", "max_nonfinite_steps", "validation_every")
    training = {f"training.{key}": value for key, value in vars(config.training).items() if key not in free}
    model = {f"model.{key}": getattr(config.model, key) for key in ("name_or_path", "dtype")}
    data = {f"data.{key}": value for key, value in vars(config.data).items() if key not in _FREE_DATA}
    return {**training, **model, **data}


def _point(
    config: StudyConfig,
    setup: Setup,
    stage: str,
    rate: float | None,
    seed: int,
    data: TaskData,
    sizes: Sizes | None,
) -> StudyPoint:
    task, method = setup.task, setup.method
    settings: dict[str, Any] = {"stage": stage, "task": task.name, "method": method.name}
    settings |= {"budget": setup.budget, "rate": rate}
    is_tuning = stage == TUNE
    # The first tuning seed is not told: seeds can be added to a study that has begun with one.
    if not (is_tuning and seed == config.tuning.seeds[0]):
        settings["seed"] = seed
    name = name_of(settings)
    try:
        mapping = _mapping(config, setup)
        _add_head(mapping, task.head, setup, sizes)
        answers = data.has_problems and not (is_tuning and config.tuning.metric == "loss")
        changes: dict[str, Any] = {
            f"data.{key}": value
            for key, value in data_settings(
                data_config(config, task), data, is_tuning=is_tuning, metric=config.tuning.metric
            ).items()
        }
        changes |= {"training.seed": seed, "output.folder": str(config.study.path / name), "output.evaluate": answers}
        if rate is not None:
            changes["training.learning_rate"] = rate
        if is_tuning:
            mapping["data"].pop("forgetting", None)
            changes["output.adapter"] = False
            if config.tuning.steps is not None:
                changes |= {"training.steps": config.tuning.steps, "training.epochs": None}
        if "peer" not in mapping:
            changes["selection.seed"] = seed
        for key, value in changes.items():
            set_value(mapping, key, value, f"the study's {key}")
        parsed = parse_run(mapping)
        if parsed.checkpoint.keep_best != "none":
            raise InputError(
                f"checkpoint.keep_best is {parsed.checkpoint.keep_best!r}: a final run would be chosen by the data "
                "that it is judged by, and only of the methods that keep one; leave it out"
            )
    except InputError as error:
        raise InputError(f"the point {name} of the study: {error}") from error
    return StudyPoint(name=name, stage=stage, setup=setup, rate=rate, seed=seed, settings=settings, config=parsed)


def parse_run(mapping: Mapping[str, Any]) -> RunConfig:
    """A run of ours, or one with a section ``peer`` instead of ``selection``.

    Raises:
        InputError: it is no run that could be started.
    """
    if "peer" in mapping:
        from scripts.accuracy.peer_config import PeerRunConfig

        return parse_config(mapping, "its config", PeerRunConfig)
    parsed = parse_config(mapping, "its config")
    check_own_config(parsed)
    return parsed


def _mapping(config: StudyConfig, setup: Setup) -> dict[str, Any]:
    """The config of a run without data files, rate and seed."""
    task, method = setup.task, setup.method
    mapping = merge(merge(copy.deepcopy(dict(DEFAULTS)), copy.deepcopy(config.run)), copy.deepcopy(dict(task.sections)))
    choices: list[tuple[str, Choice]] = [(f"methods.{method.name}", method.choice)]
    if setup.budget is not None and setup.budget in method.at:
        choices.append((f"methods.{method.name}.at.{setup.budget}", method.at[setup.budget]))
    for place, choice in choices:
        _check_settings(place, choice.settings)
        files = [read_mapping(Path(file)) for file in choice.extends]
        for file, settings in zip(choice.extends, files, strict=True):
            _check_settings(f"{file}, which {place} extends,", settings)
        mapping = with_choice(mapping, place, choice, files)
        if place == choices[0][0] and setup.budget is not None:
            # Before what is set at a single budget, which may change it.
            for key in method.budget_keys:
                set_value(mapping, key, setup.budget, f"methods.{method.name}.budget_keys")
    if "peer" in mapping:
        mapping.pop("selection", None)
    return mapping


def _check_settings(place: str, settings: Mapping[str, Any]) -> None:
    """Refuse what the study itself sets: it would be lost without a word."""
    for key in _dotted(settings):
        if key in _SET_BY_STUDY:
            raise InputError(f"{place} sets {key}, which the study sets itself: leave it out (rates are in rates)")


def _dotted(settings: Mapping[str, Any]) -> Iterator[str]:
    """Names of all settings, however they are nested."""
    for key, value in settings.items():
        yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{below}" for below in _dotted(value))


def _add_head(mapping: dict[str, Any], head: Sequence[str], setup: Setup, sizes: Sizes | None) -> None:
    """Have the head trained whole, beside what the budget is spent on."""
    if not head:
        return
    if "peer" in mapping:
        mapping["peer"]["head"] = list(head)
        return
    selection = mapping.get("selection")
    if not isinstance(selection, dict) or "regions" not in selection:
        raise InputError(f"methods.{setup.method.name} has no selection.regions to which the head could be added")
    selection["regions"] = [*selection["regions"], {"kind": "whole", "modules": list(head)}]
    budget = selection.get("budget")
    if isinstance(budget, dict) and sizes is not None:
        # A selection's budget counts all that is trained; the study's is without the head.
        if budget.get("fraction") is not None:
            selection["budget"] = {**budget, "parameters": share_of(budget["fraction"], sizes.total) + sizes.head}
            del selection["budget"]["fraction"]
        elif budget.get("parameters") is not None:
            selection["budget"] = {**budget, "parameters": budget["parameters"] + sizes.head}
