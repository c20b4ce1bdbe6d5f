"""In which order are regions taken, and how many from the front of an order fit, every entry counted once?

The regions of many weights are numbered through, and all arithmetic runs over these numbers at once: a model of 7B
has 100,000 blocks of 256, and two million rows and columns.

Counting. Let a weight ``W[O, I]`` have R chosen rows and C chosen columns, and let r of the rows and c of the columns
run through the strips of a block of height h and width w. However they overlap, the chosen regions cover

    R*I + C*O - R*C  +  sum over chosen blocks of (h - r) * (w - c)

entries: those of rows and columns, and what these leave of the blocks.

Legend: N = regions, K = candidates (kinds of weights), W = weights, S = strips of all weights together, M = regions in
an order, P = scopes. A scope is a part of the regions with an order and a bound of its own (all, a group of matrices,
a matrix, a layer); a weight lies in one scope as a whole, so overlaps never cross scopes.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import MATRIX_KINDS, Kind, Pick
from sparse_zero.selection.regions import WeightSelection, grid_shape

Unit = Literal["parameters", "regions"]


def _starts(lengths: Tensor) -> Tensor:
    """[P]: where each of several adjacent ranges starts."""
    return lengths.cumsum(0) - lengths


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers of [start, start + length) of every range, one range after the other."""
    offsets = torch.repeat_interleave(starts - _starts(lengths), lengths)
    return offsets + torch.arange(len(offsets))


def take_order(scores: Tensor, pick: Pick, at_most: int | None = None) -> Tensor:
    """[M] positions in ``scores`` [N], the first to be taken first; of these, the first ``at_most``.

    max takes the highest scores first, min the lowest, mixed in turn the best, the worst, the second best, ... (the
    better half from above, the other from below). Ties fall by position. A score of -inf is never taken.
    """
    eligible = (scores != -torch.inf).nonzero().squeeze(1)
    values = scores if len(eligible) == len(scores) else scores[eligible]
    if pick == "mixed":
        falling = torch.argsort(values, descending=True, stable=True)
        rising = torch.argsort(values, stable=True)
        half = (len(values) + 1) // 2
        is_worse = torch.ones(len(values), dtype=torch.bool)
        is_worse[falling[:half]] = False
        order = torch.empty_like(falling)
        order[::2], order[1::2] = falling[:half], rising[is_worse[rising]]
        return eligible[order[:at_most]]
    descending = pick == "max"
    if at_most is not None and at_most < len(values):
        # Few are wanted of many: sort only what is as good as the last of them.
        best = torch.topk(values, at_most, largest=descending, sorted=False).values
        near = (values >= best.min() if descending else values <= best.max()).nonzero().squeeze(1)
        eligible, values = eligible[near], values[near]
    return eligible[torch.argsort(values, descending=descending, stable=True)[:at_most]]


class _Weights(NamedTuple):
    """What the table knows of its weights; without blocks, a weight is one strip in either direction."""

    names: list[str]
    out_features: Tensor  # [W]
    in_features: Tensor  # [W]
    block_height: Tensor  # [W]
    block_width: Tensor  # [W]
    first_row_strip: Tensor  # [W]
    first_column_strip: Tensor  # [W]
    grid_width: Tensor  # [W] blocks side by side


class RegionTable:
    """The regions of all candidates, numbered: candidate by candidate, each in the order of its grid.

    Args:
        candidates: kinds of weights that compete; a kind of a weight occurs once.
        taken: what is chosen already, by weight; regions that are counted cost what they add to it.
    """

    def __init__(self, candidates: Sequence[Candidates], taken: Mapping[str, WeightSelection]) -> None:
        self.candidates = list(candidates)
        self.num_regions = torch.tensor([c.num_regions for c in candidates])  # [K]
        self.starts = _starts(self.num_regions)  # [K]
        shapes: dict[str, tuple[int, int]] = {}
        blocks: dict[str, tuple[int, int]] = {}
        kinds: dict[str, set[Kind]] = {}
        for c in candidates:
            shapes[c.weight] = c.shape
            kinds.setdefault(c.weight, set()).add(c.kind)
            if c.kind == "block":
                blocks[c.weight] = c.block_shape
        inside = {name: taken[name] for name in shapes if name in taken}
        for name, selection in inside.items():
            if len(selection.blocks):
                blocks[name] = selection.block_shape
        # Regions of one kind do not overlap; those of two kinds may.
        self.can_overlap = bool(inside) or any(len(found) > 1 for found in kinds.values())
        names = list(shapes)
        number = {name: at for at, name in enumerate(names)}
        self.weight = torch.tensor([number[c.weight] for c in candidates])  # [K]
        self.kind = torch.tensor([MATRIX_KINDS.index(c.kind) for c in candidates])  # [K]
        shape = torch.tensor([shapes[name] for name in names])
        block = torch.tensor([blocks.get(name, shapes[name]) for name in names])
        grid = torch.tensor([grid_shape(shapes[name], blocks.get(name, shapes[name])) for name in names])
        self.weights = _Weights(
            names=names,
            out_features=shape[:, 0],
            in_features=shape[:, 1],
            block_height=block[:, 0],
            block_width=block[:, 1],
            first_row_strip=_starts(grid[:, 0]),
            first_column_strip=_starts(grid[:, 1]),
            grid_width=grid[:, 1],
        )
        # By strip: its weight [S], and its height or width [S], the last one of a weight ragged.
        self.weight_of_row_strip, self.heights = self._strips(grid[:, 0], block[:, 0], shape[:, 0])
        self.weight_of_column_strip, self.widths = self._strips(grid[:, 1], block[:, 1], shape[:, 1])
        self._count_taken(inside, number)

    @staticmethod
    def _strips(num_strips: Tensor, size: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.repeat_interleave(torch.arange(len(num_strips)), num_strips)
        place = torch.arange(len(weight)) - _starts(num_strips)[weight]
        return weight, torch.minimum(size[weight], features[weight] - place * size[weight])

    def _count_taken(self, taken: Mapping[str, WeightSelection], number: Mapping[str, int]) -> None:
        """Count per strip what is chosen already, and set the counts that regions are counted on top of."""
        w = self.weights
        rows, columns, block_rows, block_columns = [], [], [], []
        for name, selection in taken.items():
            at = number[name]
            rows.append(w.first_row_strip[at] + selection.rows // w.block_height[at])
            columns.append(w.first_column_strip[at] + selection.columns // w.block_width[at])
            block_rows.append(w.first_row_strip[at] + selection.blocks[:, 0])
            block_columns.append(w.first_column_strip[at] + selection.blocks[:, 1])
        nothing = [torch.zeros(0, dtype=torch.int64)]
        self._taken_rows = torch.bincount(torch.cat(rows + nothing), minlength=len(self.heights))  # [S]
        self._taken_columns = torch.bincount(torch.cat(columns + nothing), minlength=len(self.widths))  # [S]
        self._taken_blocks = torch.cat(block_rows + nothing), torch.cat(block_columns + nothing)
        self._num_taken = torch.zeros(len(w.names), dtype=torch.int64)  # [W]
        self._num_taken = self.num_added(nothing[0], nothing[0], (nothing[0], nothing[0]))

    def num_added(self, rows: Tensor, columns: Tensor, blocks: tuple[Tensor, Tensor]) -> Tensor:
        """[W]: entries that regions add to those taken already, in every weight.

        Args:
            rows: strip of each row.
            columns: strip of each column.
            blocks: row strip and column strip of each block.
        """
        w = self.weights
        in_row_strip = torch.bincount(rows, minlength=len(self.heights)) + self._taken_rows
        in_column_strip = torch.bincount(columns, minlength=len(self.widths)) + self._taken_columns
        num_rows = torch.zeros(len(w.names), dtype=torch.int64).index_add_(0, self.weight_of_row_strip, in_row_strip)
        num_columns = torch.zeros(len(w.names), dtype=torch.int64)
        num_columns.index_add_(0, self.weight_of_column_strip, in_column_strip)
        total = num_rows * w.in_features + num_columns * w.out_features - num_rows * num_columns
        heights_left, widths_left = self.heights - in_row_strip, self.widths - in_column_strip
        for row_strip, column_strip in (blocks, self._taken_blocks):
            left = heights_left[row_strip] * widths_left[column_strip]
            total.index_add_(0, self.weight_of_row_strip[row_strip], left)
        return total - self._num_taken

    def candidate_of(self, regions: Tensor) -> Tensor:
        """[M]: which candidate each region belongs to."""
        return torch.searchsorted(self.starts, regions, right=True) - 1

    def regions_of(self, candidates: Tensor) -> Tensor:
        """Numbers of all regions of some candidates ([K'], ascending), in their order."""
        return _ranges(self.starts[candidates], self.num_regions[candidates])

    def describe(self, region: int) -> str:
        """The region in words, for errors: ``row 3 of 'layers.0.q_proj.weight'``."""
        at = int(self.candidate_of(torch.tensor([region])))
        c, index = self.candidates[at], region - int(self.starts[at])
        shown = f"({index // c.grid[1]}, {index % c.grid[1]})" if c.kind == "block" else str(index)
        return f"{c.kind} {shown} of {c.weight!r}"

    def split(self, regions: Tensor) -> dict[tuple[str, Kind], Tensor]:
        """Numbers of regions as flat indices into the grids, ascending, by weight and kind."""
        ascending = regions.sort().values
        owners = self.candidate_of(ascending)
        pieces = torch.split(
            ascending - self.starts[owners], torch.bincount(owners, minlength=len(self.candidates)).tolist()
        )
        return {(c.weight, c.kind): piece for c, piece in zip(self.candidates, pieces, strict=True) if len(piece)}


class Order:
    """Orders of regions in some scopes, and how many from the front of each fit.

    Args:
        table: the regions.
        fronts: for each scope the numbers of its regions, or of the first of them, in their order.
    """

    def __init__(self, table: RegionTable, fronts: Sequence[Tensor]) -> None:
        self.table = table
        self.num_regions = torch.tensor([len(front) for front in fronts])  # [P]
        self.starts = _starts(self.num_regions)  # [P]
        self.regions = torch.cat(list(fronts))  # [M]
        self.scope = torch.repeat_interleave(torch.arange(len(fronts)), self.num_regions)  # [M]
        candidate = table.candidate_of(self.regions)
        w, weight = table.weights, table.weight[candidate]
        index = self.regions - table.starts[candidate]
        self._scope_of_weight = torch.full((len(w.names),), -1)
        self._scope_of_weight[weight] = self.scope
        # Entries of each region, overlaps not considered [M].
        self._sizes = torch.empty_like(self.regions)
        # By kind: how many of the kind there are before each place of the order [M + 1], and their strips.
        self._before: dict[Kind, Tensor] = {}
        self._strips: dict[Kind, tuple[Tensor, ...]] = {}
        kind_of = table.kind[candidate]
        for code, kind in enumerate(MATRIX_KINDS):
            members = kind_of == code
            self._before[kind] = torch.zeros(len(self.regions) + 1, dtype=torch.int64)
            torch.cumsum(members, 0, out=self._before[kind][1:])
            at, i = weight[members], index[members]
            if kind == "block":
                row_strips = w.first_row_strip[at] + i // w.grid_width[at]
                column_strips = w.first_column_strip[at] + i % w.grid_width[at]
                self._strips[kind] = (row_strips, column_strips)
                self._sizes[members] = table.heights[row_strips] * table.widths[column_strips]
            elif kind == "row":
                self._strips[kind] = (w.first_row_strip[at] + i // w.block_height[at],)
                self._sizes[members] = w.in_features[at]
            else:
                self._strips[kind] = (w.first_column_strip[at] + i // w.block_width[at],)
                self._sizes[members] = w.out_features[at]

    def num_entries(self, lengths: Tensor) -> Tensor:
        """[P]: entries that the first ``lengths`` [P] regions of each scope add, each counted once."""
        found: dict[Kind, tuple[Tensor, ...]] = {}
        for kind, before in self._before.items():
            first = before[self.starts]
            chosen = _ranges(first, before[self.starts + lengths] - first)
            found[kind] = tuple(strips[chosen] for strips in self._strips[kind])
        blocks = found["block"]
        added = self.table.num_added(found["row"][0], found["column"][0], (blocks[0], blocks[1]))
        within = self._scope_of_weight >= 0
        total = torch.zeros_like(self.num_regions)
        return total.index_add_(0, self._scope_of_weight[within], added[within])

    def longest(self, limits: Tensor, unit: Unit) -> Tensor:
        """[P]: the largest number of regions from the front of each scope that stay within ``limits`` [P]."""
        if unit == "regions" or not len(self.regions):
            return torch.minimum(self.num_regions, limits)
        # What fits without regard to overlaps fits all the more with it.
        covered = self._sizes.cumsum(0)
        covered -= (covered - self._sizes)[self.starts.clamp(max=len(covered) - 1)][self.scope]
        fitting = torch.bincount(self.scope[covered <= limits[self.scope]], minlength=len(self.num_regions))
        if not self.table.can_overlap:
            return fitting
        # The entries grow with the length: double the step while it fits, then bisect.
        refused = self.num_regions + 1
        step = torch.ones_like(fitting)
        while bool((refused - fitting > 1).any()):
            doubling = refused > self.num_regions
            probe = torch.where(doubling, torch.minimum(fitting + step, self.num_regions), (fitting + refused) // 2)
            fits = self.num_entries(probe) <= limits
            fitting, refused = torch.where(fits, probe, fitting), torch.where(fits, refused, probe)
            step = step * 2
        return fitting

    def front(self, lengths: Tensor) -> Tensor:
        """Numbers of the first ``lengths`` [P] regions of each scope."""
        return self.regions[_ranges(self.starts, lengths)]


def smallest_margin(scores: Tensor, is_chosen: Tensor) -> float | None:
    """How far, relatively, the closest refused score is from the chosen one beside it; None without a cut.

    Args:
        scores: [M] fp64; -inf is neither chosen nor refused.
        is_chosen: [M] bool; the refused scores lie below the chosen ones, above them, or between.

    Relative to the chosen score, or to the refused one where that is 0.
    """
    chosen, refused = scores[is_chosen], scores[~is_chosen & (scores != -torch.inf)]
    if not len(chosen) or not len(refused):
        return None
    highest, lowest = float(refused.max()), float(refused.min())
    cuts = []
    if len(above := chosen[chosen >= highest]):
        cuts.append((float(above.min()), highest))
    if len(below := chosen[chosen < highest]):
        cuts.append((float(below.max()), lowest))
    return min(0.0 if last == first else abs(last - first) / abs(last or first) for last, first in cuts)
