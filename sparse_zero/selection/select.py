"""The whole way from a model and data to a selection: candidates, scores, budget, choice?"""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import check_equal_on_all_ranks
from sparse_zero.errors import InputError
from sparse_zero.module_map import ModuleMap, default_module_map
from sparse_zero.selection.budget import SUMMATION_NOISE, choose
from sparse_zero.selection.calibration import Key, LossFunction, default_loss, gradient_scores
from sparse_zero.selection.candidates import Candidates, find_candidates
from sparse_zero.selection.config import BudgetConfig, SelectionConfig
from sparse_zero.selection.selection import Selection


class SelectionWarning(UserWarning):
    """The selection is valid, but not quite what was asked for; the message says in which respect."""


def num_parameters(model: nn.Module) -> int:
    """All parameters of the model, tied ones counted once: what a budget's fraction is a fraction of."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def max_parameters(budget: BudgetConfig | None, total: int) -> int | None:
    """The budget in entries, for a model of ``total`` parameters.

    Raises:
        InputError: the budget is larger than the model.
    """
    if budget is None:
        return None
    if budget.fraction is not None:
        return int(budget.fraction * total)
    assert budget.parameters is not None
    if budget.parameters > total:
        raise InputError(
            f"selection.budget.parameters is {budget.parameters:,}, more than the model's {total:,}: lower it"
        )
    return budget.parameters


def _dataless_score(candidates: Candidates, seed: int) -> Tensor:
    """random: uniform, from a seed of its own for every weight and kind; first: falling with the index."""
    sizes = candidates.sizes()
    if candidates.score == "first":
        return (1.0 - torch.arange(sizes.numel(), dtype=torch.float64) / sizes.numel()).reshape(sizes.shape)
    key = f"{seed}/{candidates.weight}/{candidates.kind}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "little"))
    return torch.rand(sizes.shape, dtype=torch.float64, generator=generator)


def check_selection(model: nn.Module, config: SelectionConfig, module_map: ModuleMap | None = None) -> list[Candidates]:
    """Everything about ``config`` that can be checked against ``model`` before any data are read.

    Works on a model on the meta device. Returns the candidates that :func:`select` will score.
    """
    if config.file is not None:
        raise InputError(f"selection.file is {config.file}: nothing is left to select; use Selection.load")
    candidates = find_candidates(config, module_map or default_module_map(model))
    max_parameters(config.budget, num_parameters(model))
    return candidates


def select(
    model: nn.Module,
    batches: Iterable[Any] | None,
    config: SelectionConfig,
    loss_fn: LossFunction | None = None,
    *,
    module_map: ModuleMap | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Selection:
    """Calibrate, rank and choose. Collective: every rank calls it with equal arguments.

    Args:
        model: dense model with weights; unchanged afterwards.
        batches: micro-batches of fixed composition, the same sequence on every rank (a rank computes its
            share of them); None if no score reads gradients.
        config: candidates, scores and budget.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar; default: the loss of a transformers model.
        module_map: the model's family; default: read from module names.
        on_batch: called after each micro-batch that this rank computed, for progress displays.

    Raises:
        InputError: patterns, sizes or budget do not fit the model, or the ranks disagree.
    """
    module_map = module_map or default_module_map(model)
    candidates = check_selection(model, config, module_map)
    total = num_parameters(model)
    scores: dict[Key, Tensor] = {
        (c.weight, c.kind): _dataless_score(c, config.seed) for c in candidates if c.score in ("random", "first")
    }
    by_gradient = [c for c in candidates if c.score in ("abs_of_mean", "mean_of_abs")]
    num_batches = 0
    if by_gradient:
        if batches is None:
            raise InputError(f"selection.score {by_gradient[0].score} reads gradients: pass calibration batches")
        found, num_batches = gradient_scores(model, batches, by_gradient, loss_fn or default_loss, on_batch)
        scores.update(found)
    budget = max_parameters(config.budget, total)
    choice = choose(candidates, scores, budget)
    if by_gradient and choice.cut_margin is not None and choice.cut_margin < SUMMATION_NOISE:
        warnings.warn(
            f"scores at the cut differ by {choice.cut_margin:.1e} relative, within summation noise: "
            "another world size might choose another region there",
            SelectionWarning,
            stacklevel=2,
        )
    competing = any(c.per_matrix is None for c in candidates)
    if competing and choice.cut_margin is None:
        warnings.warn(
            f"the budget of {budget:,} parameters covers every candidate region: "
            f"{choice.num_parameters_left:,} parameters are left unused",
            SelectionWarning,
            stacklevel=2,
        )
    selection = Selection(
        choice.weights,
        {
            "config": dataclasses.asdict(config),
            "num_parameters_model": total,
            "num_layers": module_map.num_layers,
            "num_parameters_left": choice.num_parameters_left,
            "cut_margin": choice.cut_margin,
            "num_calibration_batches": num_batches,
        },
    )
    if dist.is_initialized():
        check_equal_on_all_ranks(selection.digest(), "the selection")
    return selection
