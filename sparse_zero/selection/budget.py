"""Which regions are chosen, once they have scores: fixed numbers per matrix, then the ranking under a budget?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.selection.calibration import Key
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import Kind
from sparse_zero.selection.regions import WeightSelection

# Relative differences of scores below this may come from rounding alone: the sums are fp64, but the gradients in
# them come from fp32 products, whose order of summation depends on the number of threads.
SUMMATION_NOISE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen regions by weight, and what happened at the cut."""

    weights: dict[str, WeightSelection]
    # Entries of the budget that the next region of the ranking did not fit into.
    num_parameters_left: int | None
    # Scores of the last chosen and the first refused region, relative to the former; None without a cut.
    cut_margin: float | None


def normalised(candidates: Sequence[Candidates], scores: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Scores that may be compared across kinds.

    ``abs_of_mean`` shrinks with the root of the region's size, so it is divided by the mean over all regions
    of its kind when several kinds compete; the order within a kind stays. The other scores favour no size.
    """
    kinds = {c.kind for c in candidates}
    if len(kinds) < 2 or candidates[0].score != "abs_of_mean":
        return {(c.weight, c.kind): scores[c.weight, c.kind] for c in candidates}
    means: dict[Kind, float] = {}
    for kind in kinds:
        flat = torch.cat([scores[c.weight, c.kind].reshape(-1) for c in candidates if c.kind == kind])
        means[kind] = float(flat.mean()) or 1.0
    return {(c.weight, c.kind): scores[c.weight, c.kind] / means[c.kind] for c in candidates}


def best_first(scores: Tensor) -> Tensor:
    """Flat indices by falling score; ties in the order of the indices."""
    return torch.argsort(scores.reshape(-1), descending=True, stable=True)


def _weight_selections(candidates: Sequence[Candidates], chosen: Mapping[Key, Tensor]) -> dict[str, WeightSelection]:
    """Assemble flat region indices per weight and kind into selections of weights."""
    parts: dict[str, dict[str, Any]] = {}
    for c in candidates:
        flat = chosen.get((c.weight, c.kind))
        if flat is None or not len(flat):
            continue
        entry = parts.setdefault(c.weight, {"shape": c.shape})
        if c.kind == "block":
            width = c.grid[1]
            entry["block_size"] = c.block_shape
            entry["blocks"] = torch.stack([flat // width, flat % width], dim=1)
        else:
            entry["rows" if c.kind == "row" else "columns"] = flat
    return {weight: WeightSelection(**entry) for weight, entry in parts.items()}


def choose(candidates: Sequence[Candidates], scores: Mapping[Key, Tensor], max_parameters: int | None) -> Choice:
    """Fixed numbers first, then the longest prefix of the common ranking that fits.

    Args:
        candidates: as from ``find_candidates``: sorted, so that ties fall the same way on every rank.
        scores: fp64, higher is better, in the shape of each candidate's grid.
        max_parameters: entries that may be trained, overlaps counted once; None: no bound.

    Raises:
        InputError: the fixed numbers alone exceed the bound, or not even one region fits.
    """
    fixed = {
        (c.weight, c.kind): best_first(scores[c.weight, c.kind])[: c.per_matrix]
        for c in candidates
        if c.per_matrix is not None
    }
    fixed_parameters = sum(w.num_parameters for w in _weight_selections(candidates, fixed).values())
    if max_parameters is not None and fixed_parameters > max_parameters:
        raise InputError(
            f"selection.budget allows {max_parameters:,} parameters, but the regions with per_matrix alone are "
            f"{fixed_parameters:,}: raise the budget or lower per_matrix"
        )
    competing = [c for c in candidates if c.per_matrix is None]
    if not competing:
        left = None if max_parameters is None else max_parameters - fixed_parameters
        return Choice(weights=_weight_selections(candidates, fixed), num_parameters_left=left, cut_margin=None)
    assert max_parameters is not None

    comparable = normalised(competing, scores)
    flat_scores = torch.cat([comparable[c.weight, c.kind].reshape(-1) for c in competing])
    owner = torch.cat([torch.full((scores[c.weight, c.kind].numel(),), n) for n, c in enumerate(competing)])
    region = torch.cat([torch.arange(scores[c.weight, c.kind].numel()) for c in competing])
    ranking = best_first(flat_scores)

    def prefix(length: int) -> dict[str, WeightSelection]:
        owners, regions = owner[ranking[:length]], region[ranking[:length]]
        order = torch.argsort(owners, stable=True)
        counts = torch.bincount(owners, minlength=len(competing)).tolist()
        pieces = torch.split(regions[order], counts)
        chosen = {(c.weight, c.kind): piece for c, piece in zip(competing, pieces, strict=True)}
        return _weight_selections(candidates, {**chosen, **fixed})

    # The number of covered entries grows with the prefix, so its longest fitting length is found by bisection.
    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(w.num_parameters for w in prefix(middle).values()) <= max_parameters:
            low = middle
        else:
            high = middle - 1
    weights = prefix(low)
    if not weights:
        raise InputError(
            f"selection.budget allows {max_parameters:,} parameters, less than one region: "
            "raise it or use smaller regions"
        )
    margin = None
    if 0 < low < len(ranking):
        last, refused = float(flat_scores[ranking[low - 1]]), float(flat_scores[ranking[low]])
        margin = (last - refused) / abs(last) if last else 0.0
    used = sum(w.num_parameters for w in weights.values())
    return Choice(weights=weights, num_parameters_left=max_parameters - used, cut_margin=margin)
