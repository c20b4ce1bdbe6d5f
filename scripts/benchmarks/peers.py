"""How do the published ways train a part of a weight? Each as a small module of plain torch, to be compared with.

All stand in for one ``nn.Linear``, whose parameters they take over and freeze, and train ``values`` only. What is
trained lies where the way can have it: the first rows for the concatenation, the diagonal for the einsum.

Legend: T = tokens, O = out features, I = in features, N = number of blocks, S = side of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """A linear of which ``values`` are trained."""

    values: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        linear.requires_grad_(False)

    def pick(self, dense: Tensor) -> Tensor:
        """The entries of ``dense`` [O, I] that the values stand for, in their shape."""
        raise NotImplementedError

    @property
    def num_trained(self) -> int:
        """Entries of the weight that are trained."""
        return self.values.numel()


class _LinearOfBlocks(torch.autograd.Function):
    """``x @ W.T``; backward forms one product for every block, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, blocks: list[tuple[int, int]]
    ) -> Tensor:
        size = values.shape[-1]
        x_TI = x.reshape(-1, x.shape[-1])
        strips = [x_TI[:, column * size : (column + 1) * size] for _, column in blocks]
        ctx.save_for_backward(weight, *strips)
        ctx.blocks, ctx.input_shape = blocks, x.shape
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        weight, *strips = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx = (dy_TO @ weight).view(ctx.input_shape) if ctx.needs_input_grad[0] else None
        size = strips[0].shape[1]
        blocks = zip(ctx.blocks, strips, strict=True)
        dvalues = [dy_TO[:, row * size : (row + 1) * size].T @ strip for (row, _), strip in blocks]
        return dx, None, None, torch.stack(dvalues), None


class CopiedBlocks(Peer):
    """SMT (arXiv 2405.15525): before every forward each block is copied into the frozen weight.

    Args:
        linear: taken over.
        blocks: (i, j) of each block, in a grid of ``size``.
        size: side of a block; divides both sides of the weight.
    """

    def __init__(self, linear: nn.Linear, blocks: Sequence[tuple[int, int]], size: int) -> None:
        super().__init__(linear)
        self.blocks, self.size = list(blocks), size
        self.values = nn.Parameter(self.pick(linear.weight.detach()))  # [N, S, S]

    def _block(self, dense: Tensor, row: int, column: int) -> Tensor:
        size = self.size
        return dense[row * size : (row + 1) * size, column * size : (column + 1) * size]

    def pick(self, dense: Tensor) -> Tensor:
        return torch.stack([self._block(dense, *block) for block in self.blocks])

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        for value, block in zip(self.values.detach(), self.blocks, strict=True):
            self._block(self.weight.data, *block).copy_(value)
        y: Tensor = _LinearOfBlocks.apply(x, self.weight, self.bias, self.values, self.blocks)
        return y


class ConcatenatedRows(Peer):
    """RoCoFT (arXiv 2410.10075): before every forward the trained rows and the frozen rest become one weight.

    Args:
        linear: taken over.
        num_rows: the first rows, which are trained.
    """

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__(linear)
        self.num_rows = num_rows
        self.values = nn.Parameter(self.pick(linear.weight.detach()))  # [num_rows, I]
        self.weight = nn.Parameter(linear.weight.detach()[num_rows:], requires_grad=False)  # the rest

    def pick(self, dense: Tensor) -> Tensor:
        return dense[: self.num_rows].clone()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return torch.nn.functional.linear(x, torch.cat((self.values, self.weight)), self.bias)


class MaskedLinear(Peer):
    """The dense weight is trained, its gradient multiplied by a mask; the optimizer holds all of it.

    Args:
        linear: taken over.
        mask: [O, I] of ones and zeros.
    """

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        super().__init__(linear)
        self.mask = mask.to(linear.weight)
        self.weight = self.values = nn.Parameter(linear.weight.detach())  # [O, I]
        self.values.register_hook(lambda gradient: gradient * self.mask)

    def pick(self, dense: Tensor) -> Tensor:
        return dense * self.mask

    @property
    def num_trained(self) -> int:
        return int(self.mask.count_nonzero())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return torch.nn.functional.linear(x, self.values, self.bias)


class DiagonalBlocks(Peer):
    """DiaBlo (arXiv 2506.03230): the product with trained diagonal blocks, which start at zero, is added.

    Args:
        linear: taken over.
        num_blocks: along the diagonal; divides both sides of the weight.
    """

    def __init__(self, linear: nn.Linear, num_blocks: int) -> None:
        super().__init__(linear)
        height, width = linear.out_features // num_blocks, linear.in_features // num_blocks
        self.values = nn.Parameter(linear.weight.new_zeros(num_blocks, width, height))

    def pick(self, dense: Tensor) -> Tensor:
        num_blocks, width, height = self.values.shape
        grid = dense.reshape(num_blocks, height, num_blocks, width)
        return torch.stack([grid[number, :, number].T for number in range(num_blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        num_blocks, width, _ = self.values.shape
        x_TNI = x.reshape(-1, num_blocks, width)
        added = torch.einsum("tni,nio->tno", x_TNI, self.values)
        return torch.nn.functional.linear(x, self.weight, self.bias) + added.reshape(*x.shape[:-1], -1)
