"""How do Triton's kernels form the products with selected blocks, without copies of the strips that they read?

They read strips of the operands by number, where they lie; tiles beyond an edge are masked, all sums are in fp32. What
they compute is :func:`~sparse_zero.layers.region_products.block_gradients` and the two sums beside it, which are their
plain reference. Importing this imports Triton.

Legend: T = tokens, O = out features, I = in features, F = either, N = blocks, U = distinct column strips of the blocks,
H, W = height and width of a block, A, B = sides of a block that meet the source and the target.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_zero.layers.kernels import allows_tf32

if TYPE_CHECKING:
    from sparse_zero.layers.region_products import BlockPlan


def _config(first: int, second: int, inner: int, num_warps: int, num_stages: int) -> Any:
    """Sides of a tile of the result, and how much is added up at once."""
    return triton.Config({"FIRST": first, "SECOND": second, "INNER": inner}, num_warps=num_warps, num_stages=num_stages)


# Small tiles for small blocks and where few tiles leave a GPU idle, large ones where there is much to do. They fit the
# shared memory of every GPU since sm_70 in fp32, too. What runs in Triton's interpreter cannot be timed.
CONFIGS = [_config(32, 32, 32, 4, 2), _config(64, 64, 32, 4, 3), _config(64, 64, 64, 4, 2), _config(128, 64, 32, 8, 2)]
if triton.knobs.runtime.interpret:
    CONFIGS = CONFIGS[:1]


@triton.autotune(configs=CONFIGS, key=["height", "width"])
@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    gradients,
    rows,
    columns,
    x_strips,
    num_tokens,
    out_features,
    in_features,
    height,
    width,
    dy_stride,
    x_strip_stride,
    x_stride,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of one block's gradient [N, H, W]: ``dY[:, row strip].T @ X[:, column strip]``."""
    block = tl.program_id(0)
    across = tl.cdiv(width, SECOND)
    h = tl.program_id(1) // across * FIRST + tl.arange(0, FIRST)
    w = tl.program_id(1) % across * SECOND + tl.arange(0, SECOND)
    # int64, as the numbers are: tokens times features may be more than int32 counts.
    out = tl.load(rows + block) * height + h
    inside_h = (h < height) & (out < out_features)
    inside_w = (w < width) & (tl.load(columns + block) * width + w < in_features)
    x += tl.load(x_strips + block) * x_strip_stride
    total = tl.zeros((FIRST, SECOND), dtype=tl.float32)
    for start in range(0, num_tokens, INNER):
        t = start + tl.arange(0, INNER).to(tl.int64)
        inside_t = (t < num_tokens)[:, None]
        dy_tile = tl.load(dy + t[:, None] * dy_stride + out[None, :], mask=inside_t & inside_h[None, :], other=0.0)
        x_tile = tl.load(x + t[:, None] * x_stride + w[None, :], mask=inside_t & inside_w[None, :], other=0.0)
        if WIDENS:
            dy_tile, x_tile = dy_tile.to(tl.float32), x_tile.to(tl.float32)
        total = tl.dot(tl.trans(dy_tile), x_tile, total, input_precision=PRECISION)
    at = gradients + block * height * width + h[:, None] * width + w[None, :]
    tl.store(at, total.to(gradients.dtype.element_ty), mask=(h < height)[:, None] & (w < width)[None, :])


# Each trial adds to the target: it is put back.
@triton.autotune(configs=CONFIGS, key=["source_side", "target_side"], restore_value=["target"])
@triton.jit
def add_kernel(  # type: ignore[no-untyped-def]
    target,
    source,
    blocks,
    target_strips,
    source_strips,
    num_blocks,
    num_tokens,
    target_features,
    source_features,
    target_side,
    source_side,
    target_stride,
    source_stride,
    block_stride,
    source_side_stride,
    target_side_stride,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of ``target[:, strip] += source[:, other strip] @ block``, summed over all blocks of that strip."""
    first = tl.program_id(0)
    strip = tl.load(target_strips + first)
    # The first block of a strip adds up all of it: no two programs write one tile, and it is rounded once.
    num_earlier = 0
    for block in range(0, first):
        num_earlier += (tl.load(target_strips + block) == strip).to(tl.int32)
    if num_earlier == 0:
        t = tl.program_id(1).to(tl.int64) * FIRST + tl.arange(0, FIRST)
        b = tl.program_id(2) * SECOND + tl.arange(0, SECOND)
        inside_t = (t < num_tokens)[:, None]
        total = tl.zeros((FIRST, SECOND), dtype=tl.float32)
        for block in range(first, num_blocks):
            if tl.load(target_strips + block) == strip:
                begin = tl.load(source_strips + block) * source_side
                for start in range(0, source_side, INNER):
                    a = start + tl.arange(0, INNER)
                    inside_a = (a < source_side) & (begin + a < source_features)
                    source_at = source + t[:, None] * source_stride + (begin + a)[None, :]
                    source_tile = tl.load(source_at, mask=inside_t & inside_a[None, :], other=0.0)
                    block_at = blocks + block * block_stride
                    block_at += a[:, None] * source_side_stride + b[None, :] * target_side_stride
                    inside_b = inside_a[:, None] & (b < target_side)[None, :]
                    block_tile = tl.load(block_at, mask=inside_b, other=0.0)
                    if WIDENS:
                        source_tile, block_tile = source_tile.to(tl.float32), block_tile.to(tl.float32)
                    total = tl.dot(source_tile, block_tile, total, input_precision=PRECISION)
        column = strip * target_side + b
        at = target + t[:, None] * target_stride + column[None, :]
        inside = inside_t & ((b < target_side) & (column < target_features))[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, total.to(target.dtype.element_ty), mask=inside)


def _how() -> dict[str, Any]:
    """How tiles are multiplied."""
    return {
        # fp32, as torch's own products are allowed to.
        "PRECISION": "tf32" if allows_tf32() else "ieee",
        # The interpreter multiplies tiles in bf16 as if their bits were whole numbers.
        "WIDENS": triton.knobs.runtime.interpret,
        # As Triton does of itself until 3.9, which warns where it is not said.
        "enable_fp_fusion": True,
    }


def block_gradients(dy_TO: Tensor, x_TI: Tensor | None, x_strips_UTW: Tensor | None, plan: "BlockPlan") -> Tensor:
    """[N, H, W], see :func:`~sparse_zero.layers.region_products.block_gradients`; zeros beyond an edge."""
    dy_TO = dy_TO.contiguous()
    (num_tokens, out_features), num_blocks = dy_TO.shape, len(plan.rows)
    if x_strips_UTW is None:
        assert x_TI is not None
        x, x_strips, in_features = x_TI.contiguous(), plan.columns, x_TI.shape[1]
        strides = (plan.width, x.stride(0))
    else:
        # The strips that were kept have zeros beyond the edge.
        x, x_strips, in_features = x_strips_UTW, plan.strip_of_block, 2**62
        strides = (x.stride(0), x.stride(1))
    gradients = dy_TO.new_empty(num_blocks, plan.height, plan.width)

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        tiles = triton.cdiv(plan.height, chosen["FIRST"]) * triton.cdiv(plan.width, chosen["SECOND"])
        return num_blocks, tiles

    # A kernel is started on the current device, which need not be the operands'.
    with torch.cuda.device_of(dy_TO):
        gradient_kernel[grid](
            dy_TO,
            x,
            gradients,
            plan.rows,
            plan.columns,
            x_strips,
            num_tokens,
            out_features,
            in_features,
            plan.height,
            plan.width,
            dy_TO.stride(0),
            *strides,
            **_how(),
        )
    return gradients


def add_block_products(
    target_TF: Tensor, source_TF: Tensor, blocks_NAB: Tensor, *, target_strips: Tensor, source_strips: Tensor
) -> None:
    """``target[:, target strip] += source[:, source strip] @ block`` for each block, in place.

    Args:
        target_TF: rows contiguous.
        source_TF: in the dtype of the target.
        blocks_NAB: in the same dtype, with any strides.
        target_strips, source_strips: [N] int64, which strips of B and of A columns each block belongs to.
    """
    source_TF = source_TF.contiguous()
    (num_tokens, features), (num_blocks, source_side, target_side) = target_TF.shape, blocks_NAB.shape
    if not num_tokens:
        return  # a grid has at least one program

    def grid(chosen: dict[str, Any]) -> tuple[int, int, int]:
        return num_blocks, triton.cdiv(num_tokens, chosen["FIRST"]), triton.cdiv(target_side, chosen["SECOND"])

    # A kernel is started on the current device, which need not be the operands'.
    with torch.cuda.device_of(target_TF):
        add_kernel[grid](
            target_TF,
            source_TF,
            blocks_NAB,
            target_strips,
            source_strips,
            num_blocks,
            num_tokens,
            features,
            source_TF.shape[1],
            target_side,
            source_side,
            target_TF.stride(0),
            source_TF.stride(0),
            *blocks_NAB.stride(),
            **_how(),
        )
