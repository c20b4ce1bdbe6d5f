"""Which entries and regions do two selections have in common?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.selection_map import LayerGrid
from launcher.selection_stats import By, Place, layer_shares, place_of, sorted_places
from sparse_zero.errors import InputError
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection, grid_shape
from sparse_zero.selection.selection import Selection

# Code of an entry that no kind owns, after the numbers of the kinds.
_NONE = len(KINDS)


@dataclass(kw_only=True)
class Overlap:
    """What two selections train of one kind (None: of any kind) in one place; sums over weights."""

    place: Place
    kind: Kind | None
    # Entries that the kind owns in either selection, and in both.
    first: int = 0
    second: int = 0
    common: int = 0
    # Regions in both selections, and in one only. Blocks of different sizes are different regions.
    regions_common: int = 0
    regions_first_only: int = 0
    regions_second_only: int = 0

    @property
    def jaccard(self) -> float:
        """Common entries over those in either selection: 1 for the same entries, 0 for none in common."""
        union = self.first + self.second - self.common
        return self.common / union if union else 0.0

    def add(self, other: "Overlap") -> None:
        """Add what is known of further weights."""
        for name in ("first", "second", "common", "regions_common", "regions_first_only", "regions_second_only"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def check_same_model(first: Selection, second: Selection) -> None:
    """Raise unless the selections can be of one model.

    Raises:
        InputError: a weight with two shapes, or models with different numbers of parameters or layers.
    """
    for name in sorted(first.weights.keys() & second.weights.keys()):
        shapes = first.weights[name].shape, second.weights[name].shape
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{name} is {shapes[0][0]}x{shapes[0][1]} in PATH and {shapes[1][0]}x{shapes[1][1]} in OTHER: "
                "they select from different models; compare selections of one model"
            )
    for key, what in (("num_parameters_model", "parameters"), ("num_layers", "layers")):
        numbers = first.metadata.get(key), second.metadata.get(key)
        if None not in numbers and numbers[0] != numbers[1]:
            raise InputError(
                f"PATH selects from a model of {numbers[0]:,} {what} and OTHER from one of {numbers[1]:,} {what}: "
                "compare selections of one model"
            )


def owned_together(first: WeightSelection, second: WeightSelection) -> Tensor:
    """Entries of a weight by who owns them in two selections: int64 [kinds + none, kinds + none].

    Rows that lie in the same strips of blocks, and are chosen or not alike, are counted as one, and so are columns:
    the cost goes with the number of strips, not with the entries of the weight.

    Args:
        first: regions of the weight.
        second: other regions of a weight of the same shape.
    """
    if first.whole or second.whole:
        counts = torch.zeros(_NONE + 1, _NONE + 1, dtype=torch.int64)
        whole = KINDS.index("whole")
        counts[whole if first.whole else _NONE, whole if second.whole else _NONE] = first.shape[0]
        return counts
    owners = []
    sides = [_classes(side, (first, second)) for side in (0, 1)]
    for number, weight in enumerate((first, second)):
        (rows, row_chosen), (columns, column_chosen) = (side[number] for side in (sides[0][1], sides[1][1]))
        owner = torch.full((len(rows), len(columns)), _NONE, dtype=torch.int64)
        owner[:, column_chosen] = KINDS.index("column")
        owner[row_chosen] = KINDS.index("row")
        if len(weight.blocks):
            grid = torch.zeros(grid_shape(weight.shape, weight.block_shape), dtype=torch.bool)
            grid[weight.blocks[:, 0], weight.blocks[:, 1]] = True
            owner[grid[rows][:, columns]] = KINDS.index("block")
        owners.append(owner)
    numbers = sides[0][0].unsqueeze(1) * sides[1][0]
    together = (owners[0] * (_NONE + 1) + owners[1]).reshape(-1)
    # Sums of integers below 2^53 are exact in fp64.
    counts = torch.bincount(together, weights=numbers.reshape(-1).double(), minlength=(_NONE + 1) ** 2)
    return counts.long().reshape(_NONE + 1, _NONE + 1)


def _classes(side: int, weights: tuple[WeightSelection, WeightSelection]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Rows (side 0) or columns (side 1) that no region of either selection tells apart.

    Returns:
        The number of rows in each class, and for each selection the strip of blocks that a class lies in and whether
        its rows are chosen.
    """
    length = weights[0].shape[side]
    code = torch.zeros(length, dtype=torch.int64)
    parts = []
    for weight in weights:
        strip = torch.zeros(length, dtype=torch.int64)
        if len(weight.blocks):
            strip = torch.arange(length) // weight.block_shape[side]
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[weight.rows if side == 0 else weight.columns] = True
        code = (code * (int(strip[-1]) + 1) + strip) * 2 + chosen
        parts.append((strip, chosen))
    _, inverse, numbers = torch.unique(code, return_inverse=True, return_counts=True)
    member = torch.empty(len(numbers), dtype=torch.int64)
    member[inverse] = torch.arange(length)  # Any row of a class stands for it.
    return numbers, [(strip[member], chosen[member]) for strip, chosen in parts]


def _regions(weight: WeightSelection, kind: Kind) -> Tensor:
    """[N] numbers that are equal for equal regions of weights with the same shape and block shape."""
    if kind == "block":
        return weight.blocks[:, 0] * weight.shape[1] + weight.blocks[:, 1]
    if kind == "whole":
        return torch.arange(int(weight.whole))
    return weight.rows if kind == "row" else weight.columns


def compare_weights(first: WeightSelection | None, second: WeightSelection | None, place: Place) -> list[Overlap]:
    """An overlap for every kind that occurs, and one for all kinds together (kind None), of one weight."""
    some = first or second
    assert some is not None
    first, second = (weight or WeightSelection(shape=some.shape) for weight in (first, second))
    counts = owned_together(first, second)
    found = [Overlap(place=place, kind=None)]
    found[0].first, found[0].second = int(counts[:_NONE].sum()), int(counts[:, :_NONE].sum())
    found[0].common = int(counts[:_NONE, :_NONE].sum())
    for number, kind in enumerate(KINDS):
        regions = _regions(first, kind), _regions(second, kind)
        if not len(regions[0]) + len(regions[1]):
            continue
        overlap = Overlap(place=place, kind=kind)
        overlap.first, overlap.second = int(counts[number].sum()), int(counts[:, number].sum())
        overlap.common = int(counts[number, number])
        same_size = kind != "block" or first.block_shape == second.block_shape
        overlap.regions_common = int(torch.isin(*regions).sum()) if same_size else 0
        overlap.regions_first_only = len(regions[0]) - overlap.regions_common
        overlap.regions_second_only = len(regions[1]) - overlap.regions_common
        found.append(overlap)
        for name in ("regions_common", "regions_first_only", "regions_second_only"):
            setattr(found[0], name, getattr(found[0], name) + getattr(overlap, name))
    return found


def compare(first: Selection, second: Selection) -> dict[str, list[Overlap]]:
    """By weight name: the overlaps of all its kinds (see :func:`compare_weights`).

    Raises:
        InputError: they select from different models.
    """
    check_same_model(first, second)
    return {
        name: compare_weights(first.weights.get(name), second.weights.get(name), Place(name=name))
        for name in sorted(first.weights.keys() | second.weights.keys())
    }


def overlaps_by(compared: Mapping[str, list[Overlap]], by: By) -> list[Overlap]:
    """Sums over weights: a row for every place and kind, in the order of the model, without the sums over kinds."""
    found: dict[tuple[Place, Kind], Overlap] = {}
    for name, overlaps in compared.items():
        place = place_of(name, by)
        for overlap in overlaps:
            if overlap.kind is not None:
                found.setdefault((place, overlap.kind), Overlap(place=place, kind=overlap.kind)).add(overlap)
    order = {place: number for number, place in enumerate(sorted_places({place for place, _ in found}, by))}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], KINDS.index(key[1])))]


def overall(compared: Mapping[str, list[Overlap]]) -> list[Overlap]:
    """Sums over the model: a row for every kind, and the last one over all kinds."""
    found: dict[Kind | None, Overlap] = {}
    for overlaps in compared.values():
        for overlap in overlaps:
            found.setdefault(overlap.kind, Overlap(place=Place(), kind=overlap.kind)).add(overlap)
    return [found[kind] for kind in (*KINDS, None) if kind in found]


def jaccard_grid(compared: Mapping[str, list[Overlap]], num_layers: int | None = None) -> LayerGrid:
    """The Jaccard index of the entries of any kind, for every module type and layer."""
    sums = {name: overlaps[0] for name, overlaps in compared.items()}
    return layer_shares(
        {name: float(each.common) for name, each in sums.items()},
        {name: float(each.first + each.second - each.common) for name, each in sums.items()},
        num_layers,
    )
