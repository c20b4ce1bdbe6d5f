"""How are the products with the selected blocks of a weight formed: one by one on views, or many at once on copies?

    views      one product per block, on strips of the operands where they lie: no copies; for few blocks
    strips     one product per block, on strips that were each copied once; for many blocks, on CPUs, where a product is
               quicker on contiguous operands by more than the copies cost
    gathered   strips copied for each block, one batched product: where products one by one would cost more to start
               than to compute, for many blocks on other devices and tiny ones on CPUs; and under torch.compile, whose
               graph would get a node for each
    triton     one kernel for all blocks that reads strips where they lie, see :mod:`.triton_kernels`

Which one is a matter of the plan and of the device, never of the data: nothing here waits for a GPU.

Legend: T = tokens, O = out features, I = in features, F = either, N = blocks, U = distinct column strips of the blocks,
G = strips of all of a matrix, H, W = height and width of a block, S = either.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparse_zero.layers.kernels import runs_triton

# Most blocks of one weight that are multiplied on views.
MOST_VIEWS = 32
# Bytes of the strips of all blocks up to which a CPU copies them for one batched product: they stay in its cache.
MOST_GATHERED_BYTES = 2 * 2**20
# Entries of a block from which on a CPU's product takes longer than its call.
FEWEST_ENTRIES = 16 * 16

Way = Literal["views", "strips", "gathered"]


class Cell(NamedTuple):
    """One block, in numbers of the host."""

    row: int
    column: int
    strip: int  # which of the distinct column strips


class BlockPlan(NamedTuple):
    """Where the blocks of one linear lie; int64 tensors on the linear's device."""

    height: int
    width: int
    rows: Tensor  # [N] grid row of each block
    columns: Tensor  # [N] grid column of each block
    strips: Tensor  # [U] distinct grid columns
    strip_of_block: Tensor  # [N] which of the strips each block reads
    # [N], or empty where they are many and :func:`reads_many_cells` says no.
    cells: tuple[Cell, ...]
    # Whether a block is cut off at the last row, and at the last column, of the weight.
    is_cut: tuple[bool, bool]

    def way(self, x_TF: Tensor) -> Way:
        """How products with operands like ``x_TF`` are formed by torch. Simulations are of GPUs."""
        if torch.compiler.is_compiling():
            return "gathered"
        few = len(self.rows) <= MOST_VIEWS
        if not reads_many_cells(x_TF):
            return "views" if few else "gathered"
        copied = len(self.rows) * x_TF.shape[0] * (self.height + self.width) * x_TF.element_size()
        if copied <= MOST_GATHERED_BYTES:
            return "gathered"
        if few:
            return "views"
        return "strips" if self.height * self.width >= FEWEST_ENTRIES else "gathered"


def reads_many_cells(x: Tensor) -> bool:
    """Whether products with tensors like ``x`` are formed one by one, however many they are: on a CPU."""
    return x.device.type == "cpu" and not _is_simulated(x)


def _is_simulated(x: Tensor) -> bool:
    """Whether a tensor has no data. Views and sums in place take no memory, so that a simulation can do without them.

    It could not do with them: a step of a large model has millions.
    """
    return hasattr(x, "fake_mode")


def take_strips(x_TF: Tensor, strips: Tensor, size: int, is_cut: bool) -> Tensor:
    """[N, T, S]: the strips of ``size`` columns with the given numbers; zeros beyond the edge where one ``is_cut``."""
    num_tokens, features = x_TF.shape
    if features % size and is_cut:
        x_TF = torch.nn.functional.pad(x_TF, (0, -features % size))
    num_strips = x_TF.shape[1] // size
    return x_TF[:, : num_strips * size].reshape(num_tokens, num_strips, size).transpose(0, 1).index_select(0, strips)


def keep_strips(x_TI: Tensor, plan: BlockPlan) -> Tensor:
    """[U, T, W]: a copy of what the blocks read of the input."""
    return take_strips(x_TI, plan.strips, plan.width, plan.is_cut[1])


def block_gradients(dy_TO: Tensor, x_TI: Tensor | None, x_strips_UTW: Tensor | None, plan: BlockPlan) -> Tensor:
    """[N, H, W]: ``dY[:, strip i].T @ X[:, strip j]`` of each block (i, j); what lies beyond an edge is any number.

    Args:
        dy_TO: gradient of the output.
        x_TI: the input; or None and ``x_strips_UTW``, as :func:`keep_strips` makes them.
        x_strips_UTW: see there; read if it is given.
        plan: of the blocks.
    """
    if runs_triton(dy_TO):
        from sparse_zero.layers import triton_kernels

        return triton_kernels.block_gradients(dy_TO, x_TI, x_strips_UTW, plan)
    way = plan.way(dy_TO)
    if way != "gathered":
        gradients = dy_TO.new_empty(len(plan.rows), plan.height, plan.width)
        if _is_simulated(gradients):
            return gradients
        dy_strips = _strips_of(dy_TO, plan.height, way)
        x_strips = _strips_of(x_TI, plan.width, way) if x_strips_UTW is None else x_strips_UTW.unbind()
        for gradient, cell in zip(gradients.unbind(), plan.cells, strict=True):
            dy_TH = dy_strips[cell.row]
            x_TW = x_strips[cell.column if x_strips_UTW is None else cell.strip]
            torch.mm(dy_TH.T, x_TW, out=gradient[: dy_TH.shape[1], : x_TW.shape[1]])
        return gradients
    dy_NTH = take_strips(dy_TO, plan.rows, plan.height, plan.is_cut[0])
    if x_strips_UTW is None:
        assert x_TI is not None
        x_NTW = take_strips(x_TI, plan.columns, plan.width, plan.is_cut[1])
    else:
        x_NTW = x_strips_UTW.index_select(0, plan.strip_of_block)
    return torch.bmm(dy_NTH.transpose(1, 2), x_NTW)


def _strips_of(x_TF: Tensor | None, size: int, way: Way) -> tuple[Tensor, ...]:
    """[T, S] each, the last may be narrower: views, or contiguous copies of as many bytes as ``x_TF``."""
    assert x_TF is not None
    strips = x_TF.split(size, dim=1)
    if way == "views":
        return strips
    num_tokens, features = x_TF.shape
    whole = features // size
    copies_GTS = x_TF[:, : whole * size].reshape(num_tokens, whole, size).transpose(0, 1).contiguous()
    return (*copies_GTS.unbind(), *strips[whole:])


def add_block_outputs(y_TO: Tensor, x_TI: Tensor, blocks_NHW: Tensor, plan: BlockPlan) -> None:
    """``y[:, strip i] += x[:, strip j] @ block.T`` for each block (i, j), in place."""
    if runs_triton(y_TO):
        from sparse_zero.layers import triton_kernels

        triton_kernels.add_block_products(
            y_TO, x_TI, blocks_NHW.transpose(1, 2), target_strips=plan.rows, source_strips=plan.columns
        )
    elif (way := plan.way(y_TO)) != "gathered":
        if _is_simulated(y_TO):
            return
        y_strips, x_strips = y_TO.split(plan.height, dim=1), _strips_of(x_TI, plan.width, way)
        for block, cell in zip(blocks_NHW.unbind(), plan.cells, strict=True):
            y_TH, x_TW = y_strips[cell.row], x_strips[cell.column]
            y_TH.addmm_(x_TW, block[: y_TH.shape[1], : x_TW.shape[1]].T)
    else:
        x_NTW = take_strips(x_TI, plan.columns, plan.width, plan.is_cut[1])
        _add_strips(y_TO, torch.bmm(x_NTW, blocks_NHW.transpose(1, 2)), plan.rows, plan.is_cut[0])


def add_block_input_gradients(dx_TI: Tensor, dy_TO: Tensor, blocks_NHW: Tensor, plan: BlockPlan) -> None:
    """``dx[:, strip j] += dy[:, strip i] @ block`` for each block (i, j), in place."""
    if runs_triton(dx_TI):
        from sparse_zero.layers import triton_kernels

        triton_kernels.add_block_products(dx_TI, dy_TO, blocks_NHW, target_strips=plan.columns, source_strips=plan.rows)
    elif (way := plan.way(dx_TI)) != "gathered":
        if _is_simulated(dx_TI):
            return
        dx_strips, dy_strips = dx_TI.split(plan.width, dim=1), _strips_of(dy_TO, plan.height, way)
        for block, cell in zip(blocks_NHW.unbind(), plan.cells, strict=True):
            dx_TW, dy_TH = dx_strips[cell.column], dy_strips[cell.row]
            dx_TW.addmm_(dy_TH, block[: dy_TH.shape[1], : dx_TW.shape[1]])
    else:
        dy_NTH = take_strips(dy_TO, plan.rows, plan.height, plan.is_cut[0])
        _add_strips(dx_TI, torch.bmm(dy_NTH, blocks_NHW), plan.columns, plan.is_cut[1])


def _add_strips(target_TF: Tensor, strips_NTS: Tensor, numbers: Tensor, is_cut: bool) -> None:
    """Add [N, T, S] strips into those columns of ``target_TF`` that they are numbered for; cut at a ragged edge."""
    num_tokens, features = target_TF.shape
    size = strips_NTS.shape[2]
    padded = torch.nn.functional.pad(target_TF, (0, -features % size)) if features % size and is_cut else target_TF
    num_strips = padded.shape[1] // size
    whole = padded[:, : num_strips * size].view(num_tokens, num_strips, size)
    whole.index_add_(1, numbers, strips_NTS.transpose(0, 1))
    if padded is not target_TF:
        target_TF.copy_(padded[:, :features])
