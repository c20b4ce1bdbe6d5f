"""Which entries of a weight belong to which region, and who owns an entry that several regions cover?

Ownership: every entry of ``W[out, in]`` belongs to at most one kind, block before row before column.
Layout of the flat values of one kind (regions in ascending order):

    block   [num_blocks, height, width]  row-major within the block, entries beyond a ragged edge left out
    row     [num_rows, in]               without entries that a block owns
    column  [num_columns, out]           one column after the other, without entries of blocks and rows
    whole   [out]                        a vector, which is trained entirely; its shape is written (out, 1)

Legend: O = out features, I = in features, N = regions of the kind, H, W = height and width of a block.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.selection.config import KINDS, Kind

# Indices as callers may give them.
Indices = Tensor | Sequence[int] | Sequence[Sequence[int]]


# Height and width of the blocks of one weight; (0, 0) where there are none.
BlockShape = tuple[int, int]


def block_shape_of(size: int | BlockShape) -> BlockShape:
    """(height, width) of blocks given by their side, or by both sides."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def grid_shape(shape: tuple[int, int], size: int | BlockShape) -> tuple[int, int]:
    """Rows and columns of the grid of blocks that covers ``shape``; the last ones may be ragged."""
    height, width = block_shape_of(size)
    return -(-shape[0] // height), -(-shape[1] // width)


def _indices(value: Indices, width: int | None) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.int64)
    return tensor.reshape(-1) if width is None else tensor.reshape(-1, width)


class WeightSelection:
    """The chosen regions of one weight; not to be changed after construction.

    Args:
        shape: (O, I), out and in features of the weight.
        block_size: side of the blocks, or their (height, width); ignored when there are none.
        blocks: [N, 2] row and column of each block in the grid.
        rows: [N] output channels.
        columns: [N] input channels.
        whole: the weight is a vector of O entries, written (O, 1), and all of it is chosen.

    The indices are kept as sorted int64 tensors on the host.

    Raises:
        InputError: an index outside the weight, or a region listed twice.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int],
        block_size: int | BlockShape = 0,
        blocks: Indices = (),
        rows: Indices = (),
        columns: Indices = (),
        whole: bool = False,
    ) -> None:
        self.shape = shape
        self.whole = whole
        self.blocks, self.rows, self.columns = _indices(blocks, 2), _indices(rows, None), _indices(columns, None)
        # (0, 0) without blocks, so that equal selections have equal digests.
        self.block_shape: BlockShape = block_shape_of(block_size) if len(self.blocks) else (0, 0)
        if len(self.blocks) and min(self.block_shape) < 1:
            raise InputError(f"block_size is {block_size} for a selection with blocks: give a positive size")
        if whole and (shape[1] != 1 or len(self.blocks) or len(self.rows) or len(self.columns)):
            raise InputError(f"a weight of shape {shape} is chosen as a whole: only vectors without regions can be")
        grid = grid_shape(shape, self.block_shape) if len(self.blocks) else (0, 0)
        self._check("blocks", self.blocks, grid)
        self._check("rows", self.rows.unsqueeze(1), (shape[0],))
        self._check("columns", self.columns.unsqueeze(1), (shape[1],))
        self.blocks = self.blocks[(self.blocks[:, 0] * grid[1] + self.blocks[:, 1]).argsort()]
        self.rows, self.columns = self.rows.sort().values, self.columns.sort().values

    def _check(self, name: str, indices: Tensor, limits: tuple[int, ...]) -> None:
        if len(indices) and (bool((indices < 0).any()) or bool((indices >= torch.tensor(limits)).any())):
            raise InputError(f"{name} of a weight of shape {self.shape} reach outside the limits {limits}")
        if len(torch.unique(indices, dim=0)) != len(indices):
            raise InputError(f"{name} of a weight of shape {self.shape} contain duplicates: list each region once")

    def __repr__(self) -> str:
        return (
            f"WeightSelection(shape={self.shape}, block_size={self.block_shape}, blocks={self.blocks.tolist()}, "
            f"rows={self.rows.tolist()}, columns={self.columns.tolist()}, whole={self.whole})"
        )

    def num_regions(self, kind: Kind) -> int:
        """Number of chosen regions of ``kind``."""
        if kind == "whole":
            return int(self.whole)
        return len({"block": self.blocks, "row": self.rows, "column": self.columns}[kind])

    def num_parameters_by_kind(self) -> dict[Kind, int]:
        """Entries that each present kind owns, overlaps counted once."""
        counts: dict[Kind, int] = {}
        if len(self.blocks):
            counts["block"] = int((self._block_heights() * self._block_widths()).sum())
        if len(self.rows):
            counts["row"] = int(self._row_owned().sum())
        if len(self.columns):
            counts["column"] = int(self._column_owned().sum())
        if self.whole:
            counts["whole"] = self.shape[0]
        return counts

    @property
    def num_parameters(self) -> int:
        """Entries of the weight that are trained, each counted once."""
        return sum(self.num_parameters_by_kind().values())

    # -- counting without listing entries

    def _block_heights(self) -> Tensor:
        return (self.shape[0] - self.blocks[:, 0] * self.block_shape[0]).clamp(max=self.block_shape[0])

    def _block_widths(self) -> Tensor:
        return (self.shape[1] - self.blocks[:, 1] * self.block_shape[1]).clamp(max=self.block_shape[1])

    def _row_owned(self) -> Tensor:
        """[num_rows]: entries of each row that no block owns."""
        owned = torch.full((len(self.rows),), self.shape[1])
        if len(self.blocks):
            covered = torch.zeros(grid_shape(self.shape, self.block_shape)[0], dtype=torch.int64)
            covered.index_add_(0, self.blocks[:, 0], self._block_widths())
            owned -= covered[self.rows // self.block_shape[0]]
        return owned

    def _column_owned(self) -> Tensor:
        """[num_columns]: entries of each column that neither blocks nor rows own."""
        owned = torch.full((len(self.columns),), self.shape[0] - len(self.rows))
        if len(self.blocks):
            grid = grid_shape(self.shape, self.block_shape)
            rows_in_strip = torch.bincount(self.rows // self.block_shape[0], minlength=grid[0])
            covered = torch.zeros(grid[1], dtype=torch.int64)
            # A block takes its height from each of its columns, less the rows that were already taken off.
            covered.index_add_(0, self.blocks[:, 1], self._block_heights() - rows_in_strip[self.blocks[:, 0]])
            owned -= covered[self.columns // self.block_shape[1]]
        return owned

    # -- entries

    def _block_grid(self) -> Tensor | None:
        """[grid rows, grid columns] bool: which blocks are chosen; None without blocks."""
        if not len(self.blocks):
            return None
        grid = torch.zeros(grid_shape(self.shape, self.block_shape), dtype=torch.bool)
        grid[self.blocks[:, 0], self.blocks[:, 1]] = True
        return grid

    def owned_mask(self, kind: Kind) -> Tensor | None:
        """Which entries of the dense regions the kind owns: bool [N, H, W], [N, I], [N, O] or [O]; None for all."""
        out_features, in_features = self.shape
        height, width = self.block_shape
        if kind == "whole":
            return None
        grid = self._block_grid()
        if kind == "block":
            if out_features % height == 0 and in_features % width == 0:
                return None
            tall = torch.arange(height) < self._block_heights().unsqueeze(1)
            wide = torch.arange(width) < self._block_widths().unsqueeze(1)
            mask = tall.unsqueeze(2) & wide.unsqueeze(1)
        elif kind == "row":
            if grid is None:
                return None
            strips = torch.arange(in_features) // width
            mask = ~grid[self.rows // height][:, strips]
        else:
            if grid is None and not len(self.rows):
                return None
            mask = torch.ones(len(self.columns), out_features, dtype=torch.bool)
            mask[:, self.rows] = False
            if grid is not None:
                strips = torch.arange(out_features) // height
                mask &= ~grid[strips][:, self.columns // width].T
        return None if bool(mask.all()) else mask

    def flat_indices(self, kind: Kind) -> Tensor:
        """[num_parameters of the kind] int64: positions in ``W.reshape(-1)``, in the order of the values."""
        out_features, in_features = self.shape
        if kind == "block":
            height, width = self.block_shape
            rows = (self.blocks[:, :1] * height + torch.arange(height)).unsqueeze(2)
            columns = (self.blocks[:, 1:] * width + torch.arange(width)).unsqueeze(1)
        elif kind == "whole":
            return torch.arange(out_features)
        elif kind == "row":
            rows, columns = self.rows.unsqueeze(1), torch.arange(in_features)
        else:
            rows, columns = torch.arange(out_features), self.columns.unsqueeze(1)
        positions = rows * in_features + columns
        mask = self.owned_mask(kind)
        return positions.reshape(-1) if mask is None else positions[mask]

    def kinds(self) -> Iterator[Kind]:
        """The kinds that own at least one entry, in the order of ownership."""
        counts = self.num_parameters_by_kind()
        return (kind for kind in KINDS if counts.get(kind, 0) > 0)
