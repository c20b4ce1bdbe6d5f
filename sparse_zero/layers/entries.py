"""How are the selected entries of a dense weight read and written, in the order of the flat values?"""

import torch
from torch import Tensor

from sparse_zero.selection.config import Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.config import Placement


def _is_plain(selection: WeightSelection, kind: Kind) -> bool:
    """Whether the kind owns its regions whole, so that strided views reach them without an index per entry."""
    if kind == "block" and any(
        extent % side for extent, side in zip(selection.shape, selection.block_shape, strict=True)
    ):
        return False
    return selection.owned_mask(kind) is None


def _block_view(weight: Tensor, selection: WeightSelection) -> Tensor:
    """[grid rows, H, grid columns, W] view of a weight that the blocks divide."""
    height, width = selection.block_shape
    return weight.view(weight.shape[0] // height, height, weight.shape[1] // width, width)


@torch.no_grad()
def gather_positions(parameter: Tensor, positions: Tensor) -> Tensor:
    """Copy on the host of what stands at ``positions`` (int64, row-major) of a contiguous parameter: 1-D."""
    return parameter.detach().reshape(-1).index_select(0, positions.to(parameter.device)).to("cpu", copy=True)


@torch.no_grad()
def scatter_positions(parameter: Tensor, positions: Tensor, numbers: Tensor) -> None:
    """Overwrite what stands at ``positions`` (int64, row-major) of a contiguous parameter with 1-D ``numbers``."""
    numbers = numbers.to(device=parameter.device, dtype=parameter.dtype)
    parameter.data.view(-1).index_copy_(0, positions.to(parameter.device), numbers)


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
def gather_entries(weight: Tensor, selection: WeightSelection, kind: Kind) -> Tensor:
    """Copy of the entries of ``weight`` [out, in] that ``kind`` owns: 1-D, in the order of the values."""
    device = weight.device
    if not _is_plain(selection, kind):
        return weight.reshape(-1).index_select(0, selection.flat_indices(kind).to(device))
    if kind == "row":
        return weight.index_select(0, selection.rows.to(device)).reshape(-1)
    if kind == "column":
        return weight.index_select(1, selection.columns.to(device)).T.reshape(-1)
    rows, columns = selection.blocks.to(device).unbind(1)
    return _block_view(weight, selection)[rows, :, columns, :].reshape(-1)


@torch.no_grad()
def scatter_entries(weight: Tensor, selection: WeightSelection, kind: Kind, values: Tensor) -> None:
    """Overwrite the entries of contiguous ``weight`` [out, in] that ``kind`` owns with 1-D ``values``."""
    device = weight.device
    values = values.detach().to(device=device, dtype=weight.dtype)
    if not _is_plain(selection, kind):
        weight.view(-1).index_copy_(0, selection.flat_indices(kind).to(device), values)
    elif kind == "row":
        weight.index_copy_(0, selection.rows.to(device), values.view(-1, weight.shape[1]))
    elif kind == "column":
        weight.index_copy_(1, selection.columns.to(device), values.view(-1, weight.shape[0]).T)
    else:
        rows, columns = selection.blocks.to(device).unbind(1)
        _block_view(weight, selection)[rows, :, columns, :] = values.view(-1, *selection.block_shape)
