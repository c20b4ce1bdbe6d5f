"""Does the selection still capture what matters now, and if not, what is trained instead from now on?"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_zero.collectives import PeerError, of_rank_zero
from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import num_retired, selection_of
from sparse_zero.module_map import ModuleMap, default_module_map
from sparse_zero.reselection.migrate import MakeEngine, check_can_migrate, check_kinds_can_change, migrate
from sparse_zero.reselection.migration import EntryCounts
from sparse_zero.reselection.plain import plain, without_values
from sparse_zero.selection.calibration import LossFunction
from sparse_zero.selection.config import FullCalibrationConfig, ReselectConfig, SelectionConfig
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.select import choose_regions, score_regions
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.optimizer_state import algorithm, optimizer_step_count

# Apart from the seeds of neighbouring runs, which differ by one.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Reselection:
    """What a check found, and what was done."""

    # Optimizer steps before it.
    step: int
    # Whether another selection is trained from now on.
    changed: bool
    entries: EntryCounts
    # Share of the score of all candidates that the selection captures, before and after; None if there are several
    # scores, which cannot be added, or none above zero.
    captured_before: float | None
    captured_after: float | None
    # Why the check could not be made, and training goes on as before; None if it was made.
    problem: str | None = None
    # Of all candidates, as the check found them; None if it was not made.
    scores: RegionScores | None = None


def _reselect_config(config: SelectionConfig) -> ReselectConfig:
    if config.reselect is None:
        raise InputError("selection.reselect is missing: it says how the selection is made anew")
    return config.reselect


def config_at(config: SelectionConfig, step: int) -> SelectionConfig:
    """The configuration of the check after ``step`` steps: another seed each time, weights frozen.

    Raises:
        InputError: ``config.reselect`` is missing.
    """
    reselect_config = _reselect_config(config)
    return dataclasses.replace(
        config,
        seed=config.seed + _SEED_STRIDE * step,
        calibration_batches=reselect_config.calibration_batches or config.calibration_batches,
        calibration_weights="frozen",
        full_calibration=FullCalibrationConfig(),
        reselect=None,
    )


class ReselectionWarning(UserWarning):
    """A check of the selection could not be made; training goes on with the current one."""


def _said(problem: object, step: int) -> str:
    warnings.warn(
        f"the selection could not be checked after step {step}, and stays: {problem}", ReselectionWarning, stacklevel=3
    )
    return str(problem)


def _agreed(share: float | None) -> float | None:
    """Rank 0's: the last bits of sums depend on the number of threads, and all ranks must decide alike. Collective."""
    agreed = float(of_rank_zero(torch.tensor(math.nan if share is None else share, dtype=torch.float64)))
    return None if math.isnan(agreed) else agreed


def reselect(
    engine: Any,
    batches: Iterable[Any] | None,
    config: SelectionConfig,
    *,
    make_engine: MakeEngine,
    loss_fn: LossFunction | None = None,
    module_map: ModuleMap | None = None,
    step: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Any, Reselection]:
    """Score the model as it is now, and train what matters now. Collective: equal arguments on every rank.

    The scores read the weights that act, and gradients at them; regions, score and budget are those of ``config``.
    A check that its data make impossible (a gradient that is not finite, a matrix that none reaches) is said in a
    :class:`ReselectionWarning` and changes nothing. Nothing changes, either, if the current selection captures
    ``config.reselect.captured_below`` of the score, or is found again; otherwise see
    :func:`~sparse_zero.reselection.migrate.migrate`.

    Args:
        engine: from :func:`sparse_zero.initialize`, between two steps. At its end when another one is returned.
        batches: micro-batches as for :func:`sparse_zero.select`, others than at earlier checks:
            ``config_at(config, step)`` says how many, and has a seed. None if no score reads data.
        config: of the selection, with ``reselect``.
        make_engine: see :func:`~sparse_zero.reselection.migrate.migrate`.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar; default: the loss of a transformers model.
        module_map: the base's family; default: read from module names.
        step: steps done, for the report and the seed; default: the optimizer's own counter.
        on_batch: called after each micro-batch that this rank computed, for progress displays.

    Returns:
        The engine to go on with, and what was found and done.

    Raises:
        InputError: ``config.reselect`` is missing, or the optimizer's state cannot go to other entries.
    """
    reselect_config = _reselect_config(config)
    check_can_migrate(engine)
    check_kinds_can_change(algorithm(engine), [region.kind for region in config.regions])
    step = optimizer_step_count(engine) if step is None else step
    now = config_at(config, step)
    model: nn.Module = engine.module
    current = selection_of(model)
    if module_map is None:
        with without_values(model):
            module_map = default_module_map(model)
    unchanged = Reselection(
        step=step,
        changed=False,
        entries=EntryCounts(kept=current.num_parameters, new=0, returned=0, dropped=0, retired=num_retired(model)),
        captured_before=None,
        captured_after=None,
    )
    try:
        with plain(engine):
            scores = score_regions(model, batches, now, loss_fn, module_map=module_map, on_batch=on_batch)
    except (InputError, PeerError) as error:
        # All ranks raise together. One check on unlucky data is no reason to lose the training.
        return engine, dataclasses.replace(unchanged, problem=_said(error, step))
    captured = _agreed(scores.share_captured(current)["total"])
    unchanged = dataclasses.replace(unchanged, captured_before=captured, captured_after=captured, scores=scores)
    wanted = reselect_config.captured_below
    if wanted is not None and captured is None:
        problem = "the scores have no positive mass in common, so that captured_below cannot be judged"
        return engine, dataclasses.replace(unchanged, problem=_said(problem, step))
    if wanted is not None and captured is not None and captured >= wanted:
        return engine, unchanged
    with without_values(model):
        chosen = choose_regions(model, scores, now, module_map=module_map)
    if chosen == current:
        return engine, unchanged
    # The run's own configuration: what a resumed run compares.
    metadata = {"config": dataclasses.asdict(config), "reselected_after_step": step}
    chosen = Selection(chosen.weights, {**current.metadata, **chosen.metadata, **metadata})
    captured_after = chosen.metadata["share_captured"]["total"]
    engine, counts = migrate(engine, chosen, make_engine, moments=reselect_config.moments, module_map=module_map)
    report = Reselection(
        step=step,
        changed=True,
        entries=counts,
        captured_before=captured,
        captured_after=captured_after,
        scores=scores,
    )
    return engine, report
