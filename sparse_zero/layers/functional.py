"""The linear whose backward forms gradients of the selected entries only.

``Y[T, O] = X[T, I] @ W.T`` has ``dW = dY.T @ X``. Of it only these are formed:

    blocks (i, j)             dY[:, strip i].T @ X[:, strip j]      see :mod:`.region_products`
    rows R                    dY[:, R].T @ X
    columns C                 X[:, C].T @ dY                        (one row of values per column of W)

and ``dX = dY @ W``, with ``+ dY @ S(values)`` under the delta placement. What backward needs of ``X`` is kept:
the whole of it, or only the column strips and columns that are read, as the plan says. A ``W`` of codes is made dense
in forward and again in backward, for the one product each.

Legend: T = tokens, O = out features, I = in features, N = regions of a kind, H, W = height and width of a block,
U = distinct column strips of the blocks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_zero.layers.quantized import Quantization, dense_form
from sparse_zero.layers.region_products import (
    BlockPlan,
    add_block_input_gradients,
    add_block_outputs,
    block_gradients,
    keep_strips,
)
from sparse_zero.selection.config import MATRIX_KINDS, Kind


class Plan(NamedTuple):
    """Where the values of one linear lie; None where a kind is absent."""

    blocks: BlockPlan | None
    rows: Tensor | None  # [N]
    columns: Tensor | None  # [N]
    # Per kind: positions of the owned entries in the dense regions; None where the kind owns them all.
    owned: tuple[Tensor | None, Tensor | None, Tensor | None]
    # Whether backward keeps X whole (it is shared with siblings, or smaller than its slices).
    keep_input: bool
    # Whether the values are added to the product (delta) or already stand in W (inplace).
    is_delta: bool


# Of a linear without values.
PLAIN = Plan(blocks=None, rows=None, columns=None, owned=(None, None, None), keep_input=False, is_delta=False)


def pack_values(dense: Tensor, owned: Tensor | None) -> Tensor:
    """Flat values from dense regions: [N, H, W], [N, I] or [N, O] to 1-D."""
    flat = dense.reshape(-1)
    return flat if owned is None else flat.index_select(0, owned)


def unpack_values(values: Tensor, owned: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Dense regions from flat values, zero where another kind owns the entry."""
    if owned is None:
        return values.view(shape)
    dense = values.new_zeros(shape)
    dense.view(-1).index_copy_(0, owned, values)
    return dense


def _dense_blocks(values: Tensor, plan: Plan) -> Tensor:
    """[N, H, W] from flat values."""
    assert plan.blocks is not None
    return unpack_values(values, plan.owned[0], (len(plan.blocks.rows), plan.blocks.height, plan.blocks.width))


def _add_delta(y_TO: Tensor, x_TI: Tensor, values: tuple[Tensor | None, ...], plan: Plan) -> None:
    """``y += x @ S(values).T`` in place."""
    block, row, column = values
    out_features, in_features = y_TO.shape[1], x_TI.shape[1]
    if block is not None:
        assert plan.blocks is not None
        add_block_outputs(y_TO, x_TI, _dense_blocks(block.to(y_TO.dtype), plan), plan.blocks)
    if row is not None:
        assert plan.rows is not None
        dense = unpack_values(row.to(y_TO.dtype), plan.owned[1], (len(plan.rows), in_features))
        y_TO.index_add_(1, plan.rows, x_TI @ dense.T)
    if column is not None:
        assert plan.columns is not None
        dense = unpack_values(column.to(y_TO.dtype), plan.owned[2], (len(plan.columns), out_features))
        y_TO.addmm_(x_TI.index_select(1, plan.columns), dense)


def _add_delta_input_gradient(dx_TI: Tensor, dy_TO: Tensor, values: tuple[Tensor | None, ...], plan: Plan) -> None:
    """``dx += dy @ S(values)`` in place."""
    block, row, column = values
    out_features, in_features = dy_TO.shape[1], dx_TI.shape[1]
    if block is not None:
        assert plan.blocks is not None
        add_block_input_gradients(dx_TI, dy_TO, _dense_blocks(block.to(dx_TI.dtype), plan), plan.blocks)
    if row is not None:
        assert plan.rows is not None
        dense = unpack_values(row.to(dx_TI.dtype), plan.owned[1], (len(plan.rows), in_features))
        dx_TI.addmm_(dy_TO.index_select(1, plan.rows), dense)
    if column is not None:
        assert plan.columns is not None
        dense = unpack_values(column.to(dx_TI.dtype), plan.owned[2], (len(plan.columns), out_features))
        dx_TI.index_add_(1, plan.columns, dy_TO @ dense.T)


class _SparseLinear(torch.autograd.Function):
    """Forward of a linear; backward to its input, bias and values, never to the dense weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor | None,
        row: Tensor | None,
        column: Tensor | None,
        plan: Plan,
        quantization: Quantization | None,
        has_backward: bool,
    ) -> Tensor:
        device_type = x.device.type
        ctx.input_dtype = x.dtype
        compute_dtype = x.dtype
        if torch.is_autocast_enabled(device_type):
            compute_dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            x = x.to(compute_dtype)
            dense = dense_form(weight, quantization).to(compute_dtype)
            y = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(compute_dtype))
            del dense
            x_TI = x.reshape(-1, x.shape[-1])
            if plan.is_delta:
                _add_delta(y.view(-1, y.shape[-1]), x_TI, (block, row, column), plan)
        trained = [has_backward and values is not None and values.requires_grad for values in (block, row, column)]
        kept: list[Tensor | None] = [None, None, None]
        if plan.keep_input and any(trained):
            kept[0] = x_TI
        else:
            if trained[0]:
                assert plan.blocks is not None
                kept[1] = keep_strips(x_TI, plan.blocks)
            if trained[1]:
                kept[0] = x_TI
            if trained[2]:
                assert plan.columns is not None
                kept[2] = x_TI.index_select(1, plan.columns)
        # The Parameters themselves are saved, never a view of them: ZeRO-3 refills them before backward.
        delta_values = (block, row, column) if plan.is_delta else (None, None, None)
        ctx.save_for_backward(weight, *kept, *delta_values)
        ctx.plan, ctx.trained, ctx.input_shape = plan, trained, x.shape
        ctx.quantization = quantization
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.values_dtypes = [None if values is None else values.dtype for values in (block, row, column)]
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        weight, x_TI, x_strips_UTW, x_columns_TN, *values = ctx.saved_tensors
        plan: Plan = ctx.plan
        dx: Tensor | None = None
        gradients: dict[Kind, Tensor | None] = dict.fromkeys(MATRIX_KINDS)
        with torch.autocast(dy.device.type, enabled=False):
            dy_TO = dy.reshape(-1, dy.shape[-1])
            if ctx.needs_input_grad[0]:
                dx_TI = dy_TO @ dense_form(weight, ctx.quantization).to(dy.dtype)
                if plan.is_delta:
                    _add_delta_input_gradient(dx_TI, dy_TO, tuple(values), plan)
                dx = dx_TI.view(ctx.input_shape).to(ctx.input_dtype)
            if ctx.trained[0]:
                assert plan.blocks is not None
                gradients["block"] = pack_values(block_gradients(dy_TO, x_TI, x_strips_UTW, plan.blocks), plan.owned[0])
            if ctx.trained[1]:
                assert plan.rows is not None
                gradients["row"] = pack_values(dy_TO.index_select(1, plan.rows).T @ x_TI, plan.owned[1])
            if ctx.trained[2]:
                assert plan.columns is not None
                if x_columns_TN is None:
                    x_columns_TN = x_TI.index_select(1, plan.columns)
                gradients["column"] = pack_values(x_columns_TN.T @ dy_TO, plan.owned[2])
            dbias = dy_TO.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            cast = [
                None if gradient is None else gradient.to(dtype)
                for gradient, dtype in zip(gradients.values(), ctx.values_dtypes, strict=True)
            ]
        return dx, None, dbias, *cast, None, None, None


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    plan: Plan,
    quantization: Quantization | None = None,
) -> Tensor:
    """``x @ W.T + bias`` (``+ x @ S(values).T`` under delta), differentiable in ``x`` and the values.

    Args:
        x: [..., I] in any number of leading dimensions.
        weight: [O, I], frozen; or its codes.
        bias: [O] or None.
        block, row, column: 1-D values of each kind, or None.
        plan: where the values lie.
        quantization: of ``weight``, if it holds codes.

    Returns:
        [..., O] in the dtype of ``x``, or autocast's.
    """
    # Within the function gradients are always off.
    has_backward = torch.is_grad_enabled()
    y: Tensor = _SparseLinear.apply(x, weight, bias, block, row, column, plan, quantization, has_backward)
    return y
