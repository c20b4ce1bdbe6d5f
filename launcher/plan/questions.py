"""How many GPUs does a run need, and how large a batch, length or budget fits?

All by the closed form, which takes milliseconds. What is asked for grows with memory, so that bisection finds it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from launcher.plan.forecasting import planned_selection
from launcher.plan.planned_run import Gpu, PlannedRun
from launcher.plan.search import largest_that_fits
from launcher.plan.settings import judge
from sparse_zero.errors import InputError
from sparse_zero.selection.config import BudgetConfig, SelectionConfig

Question = Literal["gpus", "batch", "length", "budget", "stage"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
MAX_RANKS = 1024
_MAX_BATCH = 4096
_MAX_LENGTH = 2**20
_MAX_LORA_RANK = 1024


# --- how many GPUs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The fewest GPUs for one ZeRO stage."""

    stage: int
    # On that many, or on MAX_RANKS where no number is enough.
    run: PlannedRun
    num_gpus: int | None

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {"stage": self.stage, "gpus": self.num_gpus, "needed_bytes": self.run.needed_bytes}


def at_stage(run: PlannedRun, stage: int) -> PlannedRun:
    """The run at another stage, without the offloading that the stage cannot do."""
    changes: dict[str, Any] = {"stage": stage}
    if stage < 3:
        changes["offload_base"] = "none"
        # Below stage 3, DeepSpeed offloads to host memory only; at stage 0 nothing.
        changes["offload_optimizer"] = "none" if stage == 0 or run.job.offload_optimizer == "none" else "cpu"
    return run.but(**changes)


def gpus_needed(run: PlannedRun, gpu: Gpu) -> list[Gpus]:
    """The fewest GPUs of this memory for each stage; more never need more of each."""
    found = []
    for stage in (0, 1, 2, 3):
        staged = at_stage(run, stage)
        if stage == 0 and staged.job.precision == "fp16":
            continue

        def too_few(ranks: int, staged: PlannedRun = staged) -> bool:
            return not staged.but(world_size=ranks).fits(gpu)

        most = largest_that_fits(1, MAX_RANKS, too_few)
        needed = 1 if most is None else most + 1
        enough = needed <= MAX_RANKS
        found.append(
            Gpus(
                stage=stage,
                run=staged.but(world_size=needed if enough else MAX_RANKS),
                num_gpus=needed if enough else None,
            )
        )
    return found


def fewest(found: Sequence[Gpus]) -> Gpus | None:
    """The fewest GPUs, and of as many the fastest stage; None where no number is enough."""
    enough = [each for each in found if each.num_gpus is not None]
    return min(enough, key=lambda each: (each.num_gpus or 0, judge(each.run).seconds), default=None)


# --- how large a batch, length, budget --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The most of something that fits."""

    # The settings to change, as overrides: "training.micro_batch_size".
    field: str
    value: int | float | None
    # With that value; without one, with the smallest.
    run: PlannedRun
    # The next larger one that was tried, which does not fit; None at the end of what is tried.
    above: int | float | None
    above_run: PlannedRun | None

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "field": self.field,
            "value": self.value,
            "needed_bytes": self.run.needed_bytes,
            "trained": self.run.num_trained,
            "next": None
            if self.above_run is None
            else {"value": self.above, "needed_bytes": self.above_run.needed_bytes},
        }  # fmt: skip


def _largest(
    field: str, values: Sequence[int | float], make: Callable[[int], PlannedRun], gpu: Gpu
) -> Largest:  # fmt: skip
    known: dict[int, PlannedRun] = {}

    def at(index: int) -> PlannedRun:
        if index not in known:
            known[index] = make(index)
        return known[index]

    last = largest_that_fits(0, len(values) - 1, lambda index: at(index).fits(gpu))
    beyond = 0 if last is None else last + 1
    return Largest(
        field=field,
        value=None if last is None else values[last],
        run=at(last or 0),
        above=values[beyond] if beyond < len(values) else None,
        above_run=at(beyond) if beyond < len(values) else None,
    )


def largest_batch(run: PlannedRun, gpu: Gpu) -> Largest:
    """The largest micro-batch of a rank; no larger than the samples of a step, beyond which no run starts."""
    most = min(_MAX_BATCH, run.config.training.global_batch_size)
    return _largest("training.micro_batch_size", range(1, most + 1), lambda index: run.but(micro_batch=index + 1), gpu)


def largest_length(run: PlannedRun, gpu: Gpu) -> Largest:
    """The longest samples, in tokens; the model may know fewer positions."""
    # A position without a successor predicts nothing: from 2 tokens on.
    return _largest("data.max_length", range(2, _MAX_LENGTH + 1), lambda index: run.but(length=index + 2), gpu)


def _fractions() -> list[float]:
    """From 0.01% to 100%, in steps that change the second digit."""
    digits = [*(round(1.0 + 0.1 * step, 1) for step in range(90))]
    return [*(round(each * 10.0**power, 6) for power in (-4, -3, -2, -1) for each in digits), 1.0]


def _sizes(selection: SelectionConfig) -> tuple[str, list[int | float], Callable[[Any], SelectionConfig]]:
    """What sets how much a selection trains: the field, its values from little to much, the selection with one.

    Raises:
        InputError: nothing does.
    """
    regions = selection.regions
    if selection.file is not None:
        raise InputError(
            f"selection.file is {selection.file}, which says what is trained: ask for the budget of a run with "
            "selection.regions"
        )
    if selection.budget is not None:
        budget = selection.budget
        empty: dict[str, Any] = dict.fromkeys(("fraction", "parameters", "bytes", "regions"))
        return (
            "selection.budget.fraction",
            list(_fractions()),
            lambda value: dataclasses.replace(
                selection, budget=dataclasses.replace(budget, **{**empty, "fraction": value})
            ),
        )
    if all(region.blocks_per_side is not None for region in regions):
        # As many blocks on each diagonal as strips: fewer of them are larger.
        return (
            "selection.regions.*.blocks_per_side and per_matrix",
            [512, 256, 128, 64, 32, 16, 8, 4, 2, 1],
            lambda value: dataclasses.replace(
                selection,
                regions=tuple(
                    dataclasses.replace(region, blocks_per_side=value, per_matrix=value) for region in regions
                ),
            ),
        )
    return (
        "selection.regions.0.per_matrix" if len(regions) == 1 else "selection.regions.*.per_matrix",
        list(range(1, 4097)),
        lambda value: dataclasses.replace(
            selection,
            regions=tuple(
                region if region.per_matrix is None else dataclasses.replace(region, per_matrix=value)
                for region in regions
            ),
        ),
    )


def widest_adapted(run: PlannedRun) -> int:
    """The most rows and columns that a matrix with adapters has at once: the rank of the whole matrix."""
    adapted = [each for each in run.shapes.shape.linears if each.name.rpartition(".")[2] in run.job.lora_targets]
    return max((min(each.out_features, each.in_features) for each in adapted), default=1)


def check_lora_rank(run: PlannedRun) -> None:
    """Refuse adapters that are larger than every matrix that they adapt.

    Raises:
        InputError: names the rank and the most that there is.
    """
    most = widest_adapted(run)
    if run.job.method in ("lora", "dora") and run.job.lora_rank > most:
        raise InputError(
            f"--lora-rank is {run.job.lora_rank}, and of {run.config.model.name_or_path} the smaller side of no "
            f"adapted matrix is above {most}: lower it"
        )


def largest_budget(run: PlannedRun, gpu: Gpu) -> Largest:
    """The most that may be trained: the budget, rows or columns of each matrix, fewer and larger diagonal blocks, r.

    Raises:
        InputError: the method trains everything, or what a file says.
    """
    method = run.job.method
    if method == "full":
        raise InputError("--find budget with method full, which trains every parameter: choose another method")
    if method != "selection":
        ranks = range(1, min(_MAX_LORA_RANK, widest_adapted(run)) + 1)
        return _largest("--lora-rank", ranks, lambda index: run.but(lora_rank=ranks[index]), gpu)
    field, values, make = _sizes(run.config.selection)
    low, high = _bounds(run)
    if run.config.selection.budget is None:
        usable = [value for value in values if _per_matrix(make(value)) <= high]
    else:
        usable = [value for value in values if low <= value * run.shapes.shape.num_parameters <= high]
    if not usable:
        raise InputError(f"{field} has no value with which regions of the model's matrices could be selected")
    return _largest(field, usable, lambda index: run.but(selection=make(usable[index])), gpu)


def _per_matrix(selection: SelectionConfig) -> int:
    return max((region.per_matrix or 0 for region in selection.regions), default=0)


def _bounds(run: PlannedRun) -> tuple[int, int]:
    """Of a budget, the least and the most parameters it may be; without one, of the regions in every matrix."""
    selection = run.config.selection
    if selection.budget is None:
        return 1, min((min(each.out_features, each.in_features) for each in run.shapes.shape.linears), default=0)
    competing = [region for region in selection.regions if region.per_matrix is None and region.kind != "whole"]
    others = tuple(region for region in selection.regions if region not in competing)
    fixed = 0
    if others:
        only = dataclasses.replace(selection, regions=others, budget=None)
        fixed = planned_selection(run.but(selection=only).config, run.shapes).num_parameters
    with warnings.catch_warnings():
        # That the budget is more than there is to choose from.
        warnings.simplefilter("ignore")
        whole = dataclasses.replace(selection, budget=BudgetConfig(fraction=1.0))
        everything = planned_selection(run.but(selection=whole).config, run.shapes).num_parameters
    widest = max((max(each.out_features, each.in_features) for each in run.shapes.shape.linears), default=0)
    largest = max((widest if each.block_size is None else each.block_size**2 for each in competing), default=0)
    return fixed + largest, everything
