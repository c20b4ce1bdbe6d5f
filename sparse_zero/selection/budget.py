"""Which regions are chosen, once they have scores: fixed numbers per matrix, then the ranking under a budget?

What is fixed comes first: what is of kind whole, and families with per_matrix. What it leaves of the budget is divided
into parts: among the groups, among the matrices of each, or not at all. In every part the regions compete: the chosen
set is the longest prefix of the part's ranking whose entries, each counted once, fit. With floors per layer, every
layer first takes the longest prefix of a ranking of its own that fits its floor, and the others follow in the part's
ranking; with caps, a layer is passed over from the first region on that does not fit its cap.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.calibration import Key
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.competition import Competition
from sparse_zero.selection.config import BudgetConfig, Kind
from sparse_zero.selection.ranking import smallest_margin, take_order
from sparse_zero.selection.regions import BlockShape, WeightSelection
from sparse_zero.selection.shares import check_layers, divide, find_layers, resolve_budget

# Relative differences of scores below this may come from rounding alone: the sums are fp64, but the gradients in
# them come from fp32 products, whose order of summation depends on the number of threads.
SUMMATION_NOISE = 1e-6


@dataclass(frozen=True, kw_only=True)
class GroupChoice:
    """What one group of the budget got, and did not use. Both in the unit of the budget."""

    modules: tuple[str, ...]
    allowed: int
    left: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen regions by weight, vectors included, and what happened at the cuts."""

    weights: dict[str, WeightSelection]
    # What the budget, as given, has left: entries that the next regions of the rankings did not fit into, or
    # numbers of regions. None where the budget is not counted in this; a budget in bytes is in parameters too.
    num_parameters_left: int | None = None
    num_regions_left: int | None = None
    bytes_left: int | None = None
    # Where chosen and refused scores come closest among the competing regions: their difference, relative to the
    # chosen one. None without a cut: nothing competes, or nothing was refused.
    cut_margin: float | None = None
    # The same within the families with per_matrix; None where these take all or there are none.
    per_matrix_cut_margin: float | None = None
    # One for each group of the budget.
    groups: tuple[GroupChoice, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """Everything but the weights, as JSON values."""
        return {
            "num_parameters_left": self.num_parameters_left,
            "num_regions_left": self.num_regions_left,
            "bytes_left": self.bytes_left,
            "cut_margin": self.cut_margin,
            "per_matrix_cut_margin": self.per_matrix_cut_margin,
            "groups": [{**asdict(group), "modules": list(group.modules)} for group in self.groups],
        }


def mean_magnitudes(
    candidates: Iterable[Candidates], scores: Mapping[Key, Tensor]
) -> dict[tuple[Kind, BlockShape], float]:
    """Mean magnitude of the scores that are not -inf, of every kind and block shape; 1 where all are zero."""
    totals: dict[tuple[Kind, BlockShape], float] = {}
    numbers: dict[tuple[Kind, BlockShape], int] = {}
    for c in candidates:
        found = scores[c.weight, c.kind]
        finite = found[found != -torch.inf]
        shape = (c.kind, c.block_shape)
        totals[shape] = totals.get(shape, 0.0) + float(finite.abs().sum())
        numbers[shape] = numbers.get(shape, 0) + finite.numel()
    return {shape: total / max(numbers[shape], 1) or 1.0 for shape, total in totals.items()}


def normalised(candidates: Sequence[Candidates], scores: Mapping[Key, Tensor], size_neutral: bool) -> dict[Key, Tensor]:
    """Scores that may be compared across kinds.

    A mean of signed numbers shrinks with the root of the region's size, a sum grows with it. Where several kinds (or
    several shapes of blocks) compete on such a score, it is divided by its mean magnitude over all regions of the
    kind (the shape) that are not -inf; the order within a kind stays. Scores that favour no size stay as they are.
    """
    own = {(c.weight, c.kind): scores[c.weight, c.kind] for c in candidates}
    shapes = {(c.kind, c.block_shape) for c in candidates}
    if size_neutral or len(shapes) < 2:
        return own
    means = mean_magnitudes(candidates, own)
    return {(c.weight, c.kind): own[c.weight, c.kind] / means[c.kind, c.block_shape] for c in candidates}


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


def _take_fixed(
    candidates: Sequence[Candidates], scores: Mapping[Key, Tensor]
) -> tuple[dict[Key, Tensor], float | None]:
    """The regions of families with per_matrix, and the smallest margin among their cuts."""
    chosen: dict[Key, Tensor] = {}
    margins: list[float] = []
    for c in candidates:
        if c.per_matrix is None:
            continue
        own = scores[c.weight, c.kind]
        order = take_order(own, c.pick)
        if len(order) < c.per_matrix:
            raise InputError(
                f"selection.regions.per_matrix is {c.per_matrix}, but selection.score {c.score} lets only {len(order)} "
                f"{c.kind} regions of {c.weight} be chosen (the others are -inf): lower it"
            )
        chosen[c.weight, c.kind] = order[: c.per_matrix]
        is_chosen = torch.zeros(len(own), dtype=torch.bool)
        is_chosen[chosen[c.weight, c.kind]] = True
        margin = smallest_margin(own, is_chosen)
        margins += [] if margin is None else [margin]
    return chosen, min(margins, default=None)


def choose(
    candidates: Sequence[Candidates],
    scores: Mapping[Key, Tensor],
    budget: BudgetConfig | None,
    *,
    module_map: ModuleMap,
    whole: Mapping[str, WeightSelection] | None = None,
    num_parameters_model: int,
    bytes_per_parameter: int = 16,
    size_neutral: bool,
) -> Choice:
    """Fixed numbers first, then in every part of the budget the longest prefix of its ranking that fits.

    Args:
        candidates: as from ``find_candidates``: sorted, so that ties fall the same way on every rank.
        scores: higher is better, -inf means never; in the shape of each candidate's grid, fp64, without NaN and
            +inf (which say nothing about an order), as :class:`~sparse_zero.selection.region_scores.RegionScores` has
            them.
        budget: how much may be trained, overlaps counted once; None (no bound) if nothing competes.
        module_map: tells which matrices the groups' patterns match, and in which layer they lie.
        whole: what is trained entirely, by name; it counts against the budget, as one region each.
        num_parameters_model: parameters of the model, tied ones counted once: what a fraction is a fraction of.
        bytes_per_parameter: bytes of training state of one trained entry, for a budget in bytes.
        size_neutral: whether the competing regions' score may be compared across sizes as it is.

    Raises:
        InputError: see :func:`~sparse_zero.selection.shares.check_budget`; scores that are -inf where a choice is due;
            the fixed regions alone exceed the budget; or the budget, a part of it, a floor or a cap
            is less than one region.
    """
    whole = whole or {}
    flat = {(c.weight, c.kind): scores[c.weight, c.kind].reshape(-1) for c in candidates}
    fixed, fixed_margin = _take_fixed(candidates, flat)
    taken = _weight_selections(candidates, fixed)
    competing = [c for c in candidates if c.per_matrix is None]
    if budget is None:
        assert not competing, "regions that compete need a budget"
        return Choice(weights={**taken, **whole}, per_matrix_cut_margin=fixed_margin)
    limit = resolve_budget(budget, num_parameters_model, bytes_per_parameter)
    used = sum(w.num_parameters for w in (*taken.values(), *whole.values()))
    if limit.unit == "regions":
        used = sum(map(len, fixed.values())) + len(whole)
    if used > limit.amount:
        vectors = "what is of kind whole and " if whole else ""
        raise InputError(
            f"selection.budget allows {limit.says(limit.amount)}, but {vectors}the regions with per_matrix alone are "
            f"{used:,}: raise the budget or lower per_matrix"
        )
    margin: float | None = None
    groups: tuple[GroupChoice, ...] = ()
    chosen = fixed
    if competing:
        assert len({c.pick for c in competing}) == 1, "what competes is picked from the same end"
        parts = divide(competing, budget, module_map, limit, used)
        layers = None
        if budget.min_share_per_layer is not None or budget.max_share_per_layer is not None:
            layers = find_layers(competing, parts.group_of, module_map)
            check_layers(budget, layers)
        competition = Competition(competing, normalised(competing, flat, size_neutral), taken, parts, limit)
        regions, used_by_part, margin = competition.run(budget, layers)
        used_by_group = [0] * len(parts.groups)
        for part, number in zip(parts.parts, used_by_part.tolist(), strict=True):
            used_by_group[part.group] += number
        used += sum(used_by_group)
        groups = tuple(
            GroupChoice(modules=group.modules, allowed=allowed, left=allowed - number)
            for group, allowed, number in zip(budget.groups, parts.groups, used_by_group, strict=False)
        )
        chosen = {**competition.table.split(regions), **fixed}
    left = limit.amount - used
    in_parameters = limit.unit == "parameters"
    return Choice(
        weights={**_weight_selections(candidates, chosen), **whole},
        num_parameters_left=left if in_parameters else None,
        num_regions_left=None if in_parameters else left,
        bytes_left=None if budget.bytes is None else budget.bytes - used * bytes_per_parameter,
        cut_margin=margin,
        per_matrix_cut_margin=fixed_margin,
        groups=groups,
    )
