"""How are the selected entries of a weight read and written, in the order of the flat values?"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_zero.selection.config import Kind
from sparse_zero.selection.regions import BlockShape, WeightSelection
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import read_entries, write_entries


class Places(NamedTuple):
    """Where the entries of one kind lie in a weight W[out, in]; int64 tensors on the weight's device."""

    kind: Kind
    # (out, in), and (height, width) of the blocks.
    shape: tuple[int, int]
    block_shape: BlockShape
    # [N] row of each region: of the blocks' grid, or output channel; None for columns.
    rows: Tensor | None
    # [N] column of each region: of the blocks' grid, or input channel; None for rows.
    columns: Tensor | None
    # [n] positions of the owned entries in the dense regions; None where the kind owns them all.
    owned: Tensor | None


def places_of(selection: WeightSelection, kind: Kind, device: torch.device) -> Places:
    """Where the entries of ``kind`` lie, which is one of a matrix."""
    rows = {"block": selection.blocks[:, 0], "row": selection.rows}.get(kind)
    columns = {"block": selection.blocks[:, 1], "column": selection.columns}.get(kind)
    mask = selection.owned_mask(kind)
    owned = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    rows, columns, owned = (None if index is None else index.to(device) for index in (rows, columns, owned))
    return Places(kind, selection.shape, selection.block_shape, rows, columns, owned)


def flat_positions(places: Places) -> Tensor:
    """[n] int64: positions in ``W.reshape(-1)``, in the order of the values; computed where the places are."""
    (height, width), in_features = places.block_shape, places.shape[1]
    # Of one dense region, as the values have it: its rows and columns of W.
    if places.rows is None:
        assert places.columns is not None
        num_regions, height, width = len(places.columns), places.shape[0], 1
    elif places.columns is None:
        num_regions, height, width = len(places.rows), 1, in_features
    else:
        num_regions = len(places.rows)
    found = places.owned
    if found is None:
        index = places.columns if places.rows is None else places.rows
        assert index is not None
        found = torch.arange(num_regions * height * width, device=index.device)
    region, within = found // (height * width), found % (height * width)
    rows, columns = within // width, within % width
    if places.rows is not None:
        rows = rows + places.rows[region] * height
    if places.columns is not None:
        columns = columns + places.columns[region] * width
    return rows * in_features + columns


def _regions(weight: Tensor, places: Places) -> Tensor | None:
    """Copy of the dense regions, in the layout of the values; None for blocks that do not divide the weight."""
    if places.columns is None:
        assert places.rows is not None
        return weight.index_select(0, places.rows)
    if places.rows is None:
        return weight.index_select(1, places.columns).T.contiguous()
    blocks = _block_view(weight, places)
    return None if blocks is None else blocks[places.rows, :, places.columns, :]


def _put_regions(weight: Tensor, places: Places, dense: Tensor) -> None:
    """Overwrite the regions, of which :func:`_regions` gives a copy."""
    if places.columns is None:
        assert places.rows is not None
        weight.index_copy_(0, places.rows, dense)
    elif places.rows is None:
        # From a source in the order of the weight's memory: on CPUs in half the time.
        weight.index_copy_(1, places.columns, dense.T.contiguous())
    else:
        blocks = _block_view(weight, places)
        assert blocks is not None
        blocks[places.rows, :, places.columns, :] = dense


def _block_view(weight: Tensor, places: Places) -> Tensor | None:
    """[grid rows, H, grid columns, W] view of the weight; None where blocks do not divide it."""
    height, width = places.block_shape
    if weight.shape[0] % height or weight.shape[1] % width:
        return None
    return weight.view(weight.shape[0] // height, height, weight.shape[1] // width, width)


def gather_positions(parameter: Tensor, positions: Tensor) -> Tensor:
    """Copy on the host of what stands at ``positions`` (int64, row-major) of a contiguous parameter: 1-D.

    Collective where ZeRO-3 holds it in shards.
    """
    return read_entries(parameter, positions).to("cpu", copy=True)


def scatter_positions(parameter: Tensor, positions: Tensor, numbers: Tensor) -> None:
    """Overwrite what stands at ``positions`` (int64, row-major) of a contiguous parameter with 1-D ``numbers``.

    Where ZeRO-3 holds it in shards, every rank gives the same.
    """
    write_entries(parameter, positions, numbers)


def in_placement(numbers: Tensor, originals: Tensor, stored: Placement, wanted: Placement) -> Tensor:
    """Numbers of one placement in the form of the other, in fp32: delta = inplace - base entry."""
    if stored == wanted:
        return numbers.float()
    sign = 1.0 if wanted == "inplace" else -1.0
    return numbers.float() + sign * originals.float()


def add_wide(entries: Tensor, numbers: Tensor) -> Tensor:
    """``entries + numbers``, computed in fp32 at least and rounded once to the dtype of ``entries``."""
    wide = torch.promote_types(torch.float32, entries.dtype)
    return (entries.to(wide) + numbers.to(wide)).to(entries.dtype)


@torch.no_grad()
def gather_at(weight: Tensor, places: Places) -> Tensor:
    """Copy of the entries of ``weight`` [out, in], whole, at ``places``: 1-D, in the order of the values."""
    dense = _regions(weight, places)
    if dense is None:
        return weight.reshape(-1).index_select(0, flat_positions(places))
    flat = dense.reshape(-1)
    return flat if places.owned is None else flat.index_select(0, places.owned)


@torch.no_grad()
def scatter_at(weight: Tensor, places: Places, values: Tensor) -> None:
    """Overwrite the entries of contiguous ``weight`` [out, in], whole, at ``places`` with 1-D ``values``."""
    values = values.detach().to(device=weight.device, dtype=weight.dtype)
    if places.kind == "block" and _block_view(weight, places) is None:
        weight.view(-1).index_copy_(0, flat_positions(places), values)
        return
    if places.owned is not None:
        # What others own is read, and written as it was: faster than a position for each entry.
        dense = _regions(weight, places)
        assert dense is not None
        values = dense.view(-1).index_copy_(0, places.owned, values)
    sides = {"block": places.block_shape, "row": (places.shape[1],), "column": (places.shape[0],)}
    _put_regions(weight, places, values.view(-1, *sides[places.kind]))


def gather_entries(weight: Tensor, selection: WeightSelection, kind: Kind) -> Tensor:
    """:func:`gather_at` where a selection says that ``kind`` owns entries."""
    return gather_at(weight, places_of(selection, kind, weight.device))


def scatter_entries(weight: Tensor, selection: WeightSelection, kind: Kind, values: Tensor) -> None:
    """:func:`scatter_at` where a selection says that ``kind`` owns entries."""
    scatter_at(weight, places_of(selection, kind, weight.device), values)
