"""How much of the model, and how much of the score mass, lies in the chosen regions: counts for tables and pictures?"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from launcher.selection_map import LayerGrid, locate_weight, module_order
from sparse_zero.errors import InputError
from sparse_zero.module_map import Role, role_from_name
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.regions import BlockShape, WeightSelection
from sparse_zero.selection.selection import Selection

By = Literal["module", "layer", "weight"]
_ROLES: tuple[Role, ...] = ("attention", "mlp", "embedding", "head", "other")
# Points of a budget curve: enough for a line without corners, few enough for a picture of any model.
_MAX_CURVE_POINTS = 2000


class Place(NamedTuple):
    """What the rows of a table stand for; fields that the table does not tell apart are None."""

    role: Role | None = None
    # Name within a layer (``self_attn.q_proj``), or of the weight where every weight has a row.
    name: str | None = None
    layer: int | None = None


def place_of(weight: str, by: By) -> Place:
    """The row that a weight belongs to."""
    module, layer = locate_weight(weight)
    if by == "layer":
        return Place(layer=layer)
    return Place(role=role_from_name(weight), name=module if by == "module" else weight, layer=None)


def sorted_places(places: set[Place], by: By) -> list[Place]:
    """In the order of the model: attention before MLP, layer 2 before layer 10, what has no layer last."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

    if by == "layer":
        return sorted(places, key=lambda place: (place.layer is None, place.layer or 0))
    if by == "weight":
        return sorted(places, key=lambda place: natural(place.name or ""))
    return sorted(places, key=lambda place: (_ROLES.index(place.role or "other"), module_order(place.name or "")))


@dataclass(kw_only=True)
class Count:
    """What is known of the regions of one kind in one place; sums over weights."""

    place: Place
    kind: Kind
    # Heights and widths of the blocks that occur.
    block_shapes: set[BlockShape] = field(default_factory=set)
    # Shapes of the weights, by name: of those with candidates or a chosen region.
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    # Candidate regions; 0 where they are not known.
    candidates: int = 0
    regions: int = 0
    # Entries that the kind owns, overlaps counted once.
    parameters: int = 0
    # Score mass of all candidates and of the chosen ones, by kind and score: only within these it can be compared.
    mass: dict[tuple[Kind, str], float] = field(default_factory=dict)
    captured: dict[tuple[Kind, str], float] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Entries of the weights, trained or not."""
        return sum(height * width for height, width in self.shapes.values())

    @property
    def share_captured(self) -> float | None:
        """Share of the score mass that was chosen; None where it is not known, or of several kinds or scores."""
        total = sum(self.mass.values())
        return sum(self.captured.values()) / total if len(self.mass) == 1 and total > 0.0 else None

    def add(self, other: "Count") -> None:
        """Add what is known of further weights."""
        self.block_shapes |= other.block_shapes
        self.shapes |= other.shapes
        self.candidates += other.candidates
        self.regions += other.regions
        self.parameters += other.parameters
        for mine, theirs in ((self.mass, other.mass), (self.captured, other.captured)):
            for key, amount in theirs.items():
                mine[key] = mine.get(key, 0.0) + amount

    @property
    def label(self) -> str:
        """The kind, with the size of its blocks: ``block 256``, ``block 64x172``."""
        if self.kind != "block" or not self.block_shapes:
            return self.kind
        if len(self.block_shapes) > 1:
            return "block, varied"
        height, width = next(iter(self.block_shapes))
        return f"block {height}" if height == width else f"block {height}x{width}"


def chosen_mask(candidates: Candidates, weight: WeightSelection | None) -> Tensor:
    """Which candidate regions are chosen: bool, in the shape of the scores."""
    mask = torch.zeros(candidates.grid, dtype=torch.bool)
    if weight is not None:
        if candidates.kind == "block":
            mask[weight.blocks[:, 0], weight.blocks[:, 1]] = True
        else:
            mask[weight.rows if candidates.kind == "row" else weight.columns] = True
    return mask


def check_scores_fit(selection: Selection, scores: RegionScores, source: str) -> None:
    """Raise unless the scores are of the model and the regions of the selection.

    Args:
        selection: what was chosen.
        scores: scores of candidate regions.
        source: where the scores are from, for the error: ``--scores FILE``.

    Raises:
        InputError: another base, a weight of another shape, blocks of another size, or no region of the selection
            is a candidate.
    """
    bases = [part.metadata.get("base") or {} for part in (selection, scores)]
    if all("sha256" in base for base in bases) and bases[0]["sha256"] != bases[1]["sha256"]:
        raise InputError(
            f"{source} has scores of the base {bases[1]['name']} ({bases[1]['sha256'][:12]}), and the selection was "
            f"chosen for {bases[0]['name']} ({bases[0]['sha256'][:12]}): name the scores of that base"
        )
    chosen = {
        (name, kind) for name, weight in selection.weights.items() for kind in KINDS
        if kind != "whole" and weight.num_regions(kind)
    }  # fmt: skip
    for c in scores.candidates:
        weight = selection.weights.get(c.weight)
        if weight is None:
            continue
        if weight.shape != c.shape:
            raise InputError(
                f"{source} has scores of {c.weight} with shape {c.shape[0]}x{c.shape[1]}, and the selection has "
                f"{weight.shape[0]}x{weight.shape[1]}: they belong to different models; name the scores of this one"
            )
        if c.kind == "block" and len(weight.blocks) and weight.block_shape != c.block_shape:
            raise InputError(
                f"{source} has scores of blocks of {c.block_shape[0]}x{c.block_shape[1]} in {c.weight}, and the "
                f"selection has blocks of {weight.block_shape[0]}x{weight.block_shape[1]}: name scores of that size"
            )
    if chosen and not chosen & {(c.weight, c.kind) for c in scores.candidates}:
        name, kind = min(chosen)
        raise InputError(
            f"{source} has no scores of any chosen region (such as the {kind}s of {name}): they belong to another "
            "model or to other modules; name the scores that this selection was chosen by"
        )


def count_regions(selection: Selection, scores: RegionScores | None, by: By) -> list[Count]:
    """Counts per place and kind, in the order of the model; places without candidates and chosen regions are left out.

    Args:
        selection: what was chosen.
        scores: of the same model and regions, or None where they are not known.
        by: what a row stands for.
    """
    found: dict[tuple[Place, Kind], Count] = {}

    def add(name: str, kind: Kind, part: Count) -> None:
        found.setdefault((part.place, kind), Count(place=part.place, kind=kind)).add(part)

    candidates = {(c.weight, c.kind): c for c in scores.candidates} if scores else {}
    for (name, kind), c in candidates.items():
        assert scores is not None
        weight = selection.weights.get(name)
        mass = scores.mass(c)
        part = Count(place=place_of(name, by), kind=kind, candidates=c.num_regions, shapes={name: c.shape})
        if kind == "block":
            part.block_shapes.add(c.block_shape)
        part.mass[kind, c.score] = float(mass.sum())
        part.captured[kind, c.score] = 0.0 if weight is None else float(mass[chosen_mask(c, weight)].sum())
        add(name, kind, part)
    for name, weight in selection.weights.items():
        owned = weight.num_parameters_by_kind()
        for kind in KINDS:
            if not weight.num_regions(kind):
                continue
            part = Count(place=place_of(name, by), kind=kind, parameters=owned.get(kind, 0))
            part.regions = weight.num_regions(kind)
            part.shapes[name] = weight.shape
            if kind == "block":
                part.block_shapes.add(weight.block_shape)
            add(name, kind, part)
    order = {place: number for number, place in enumerate(sorted_places({place for place, _ in found}, by))}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], KINDS.index(key[1])))]


def total_of(counts: Iterable[Count], place: Place) -> Count:
    """The sum of counts, of any kinds."""
    summed: Count | None = None
    for count in counts:
        summed = summed or Count(place=place, kind=count.kind)
        summed.add(count)
    assert summed is not None
    return summed


def layer_sums(values: Mapping[str, float], num_layers: int | None = None) -> LayerGrid:
    """Sums of numbers of weights over every module type and layer; empty where there is no weight.

    Args:
        values: by weight name.
        num_layers: layers of the model; None ends the grid at the last one that occurs.
    """
    places = {name: locate_weight(name) for name in values}
    inside = {module for module, layer in places.values() if layer is not None}
    modules = sorted(
        {module for module, _ in places.values()}, key=lambda name: (name not in inside, module_order(name))
    )
    width = max([num_layers or 0, *(layer + 1 for _, layer in places.values() if layer is not None)])
    has_outside = any(layer is None for _, layer in places.values())
    row_of = {module: row for row, module in enumerate(modules)}
    cells: list[list[float | None]] = [[None] * (width + has_outside) for _ in modules]
    for name, (module, layer) in places.items():
        row, column = cells[row_of[module]], width if layer is None else layer
        row[column] = (row[column] or 0.0) + values[name]
    return LayerGrid(
        modules=tuple(modules), num_layers=width, has_outside=has_outside, cells=tuple(tuple(row) for row in cells)
    )


def layer_shares(values: Mapping[str, float], wholes: Mapping[str, float], num_layers: int | None = None) -> LayerGrid:
    """Sums of ``values`` over sums of ``wholes`` of the same weights, for every module type and layer."""
    above, below = layer_sums(values, num_layers), layer_sums({name: wholes[name] for name in values}, num_layers)
    cells = tuple(
        tuple(a / b if a is not None and b else None for a, b in zip(*rows, strict=True))
        for rows in zip(above.cells, below.cells, strict=True)
    )
    return replace(above, cells=cells)


def trained_shares(selection: Selection, scores: RegionScores | None, num_layers: int | None = None) -> LayerGrid:
    """Share of the entries of matrices that is trained; 0 for candidates of which none was chosen, else empty.

    Vectors are left out: they are trained entirely, and nothing else could be told apart on their scale.
    """
    shapes = {c.weight: c.shape for c in scores.candidates} if scores else {}
    shapes |= {name: weight.shape for name, weight in selection.weights.items() if not weight.whole}
    counts = {name: weight.num_parameters for name, weight in selection.weights.items()}
    return layer_shares(
        {name: float(counts.get(name, 0)) for name in shapes},
        {name: float(height * width) for name, (height, width) in shapes.items()},
        num_layers,
    )


def mass_shares(scores: RegionScores, kind: Kind, score: str, num_layers: int | None = None) -> LayerGrid:
    """Share of the mass of one kind and score, over the whole model, that lies in each place; empty without mass."""
    members = [c for c in scores.candidates if (c.kind, c.score) == (kind, score)]
    mass = {c.weight: float(scores.mass(c).sum()) for c in members}
    total = sum(mass.values())
    return layer_sums({name: amount / total for name, amount in mass.items()} if total > 0.0 else {}, num_layers)


def kinds_and_scores(scores: RegionScores) -> dict[tuple[Kind, str], list[Candidates]]:
    """The candidates by kind and score: masses can be compared within these groups only."""
    groups: dict[tuple[Kind, str], list[Candidates]] = {}
    for c in scores.candidates:
        groups.setdefault((c.kind, c.score), []).append(c)
    return dict(sorted(groups.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1])))


@dataclass(frozen=True, kw_only=True)
class BudgetCurve:
    """How much of the score mass of a kind any budget could capture, when the regions go by falling score."""

    kind: Kind
    score: str
    # Entries of all candidate regions.
    num_entries: int
    # [points] fp64, rising from 0: entries spent, each region's counted whole, and the share of the mass captured.
    spent: Tensor
    captured: Tensor
    # What the selection spends on regions of this kind and score, and captures with them.
    actual_spent: float
    actual_captured: float

    def at(self, spent: float) -> float:
        """The largest share that regions of ``spent`` entries together could capture."""
        return float(self.captured[int(torch.searchsorted(self.spent, spent, right=True)) - 1])


def budget_curves(selection: Selection, scores: RegionScores) -> list[BudgetCurve]:
    """One curve for every kind and score of the candidates that has any mass."""
    curves = []
    for (kind, score), members in kinds_and_scores(scores).items():
        values = torch.cat([scores.comparable(c).reshape(-1) for c in members])
        mass = torch.cat([scores.mass(c).reshape(-1) for c in members])
        sizes = torch.cat([c.sizes().reshape(-1) for c in members])
        chosen = torch.cat([chosen_mask(c, selection.weights.get(c.weight)).reshape(-1) for c in members])
        total = float(mass.sum())
        if total <= 0.0:
            continue
        order = torch.argsort(values, descending=True, stable=True)
        zero = torch.zeros(1, dtype=torch.float64)
        spent = torch.cat([zero, sizes[order].cumsum(0)])
        captured = (torch.cat([zero, mass[order].cumsum(0)]) / total).clamp(max=1.0)
        if len(spent) > _MAX_CURVE_POINTS:
            # Evenly spaced in the logarithm: a budget is a small part of the model.
            steps = torch.logspace(
                0, torch.log10(torch.tensor(len(spent) - 1.0)), _MAX_CURVE_POINTS, dtype=torch.float64
            )
            kept = torch.unique(torch.cat([torch.zeros(1), steps.round().clamp(max=len(spent) - 1)]).long())
            spent, captured = spent[kept], captured[kept]
        curves.append(
            BudgetCurve(
                kind=kind,
                score=score,
                num_entries=int(sizes.sum()),
                spent=spent,
                captured=captured,
                actual_spent=float(sizes[chosen].sum()),
                actual_captured=float(mass[chosen].sum()) / total,
            )
        )
    return curves


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many regions of a module type have which score."""

    module: str
    kind: Kind
    score: str
    # [bins + 1] fp64, the same for all modules of a kind and score.
    edges: Tensor
    # Whether the edges are evenly spaced in the logarithm; scores that are not positive are then left out.
    is_log: bool
    # [bins] int64: candidates, and those that were chosen.
    every: Tensor
    chosen: Tensor
    # Candidates that no bin holds.
    num_left_out: int


def histograms(selection: Selection, scores: RegionScores, num_bins: int) -> list[Histogram]:
    """A histogram for every module type, kind and score; excluded regions (-inf) are in none."""
    found = []
    for (kind, score), members in kinds_and_scores(scores).items():
        flat = torch.cat([scores.scores[c.weight, kind].reshape(-1) for c in members])
        finite = flat[flat.isfinite()]
        if not len(finite):
            continue
        positive = finite[finite > 0]
        is_log = 2 * len(positive) >= len(finite)
        edges = _edges(positive if is_log else finite, num_bins, is_log)
        by_module: dict[str, list[Candidates]] = {}
        for c in members:
            by_module.setdefault(locate_weight(c.weight)[0], []).append(c)
        for module in sorted(by_module, key=module_order):
            values = torch.cat([scores.scores[c.weight, kind].reshape(-1) for c in by_module[module]])
            chosen = torch.cat([chosen_mask(c, selection.weights.get(c.weight)).reshape(-1) for c in by_module[module]])
            inside = (values >= edges[0]) & (values <= edges[-1])
            counts = [
                torch.bincount(
                    (torch.searchsorted(edges, values[mask], right=True) - 1).clamp(max=num_bins - 1),
                    minlength=num_bins,
                )
                for mask in (inside, inside & chosen)
            ]
            found.append(
                Histogram(
                    module=module, kind=kind, score=score, edges=edges, is_log=is_log,
                    every=counts[0], chosen=counts[1], num_left_out=int((~inside).sum()),
                )
            )  # fmt: skip
    return found


def _edges(values: Tensor, num_bins: int, is_log: bool) -> Tensor:
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = (low / 2, high * 2) if is_log else (low - 0.5, high + 0.5)
    if not is_log:
        return torch.linspace(low, high, num_bins + 1, dtype=torch.float64)
    edges = torch.logspace(math.log10(low), math.log10(high), num_bins + 1, dtype=torch.float64)
    edges[0], edges[-1] = low, high  # Exactly, so that the extremes are inside.
    return edges
