"""What becomes of entries that a re-selection dropped: where are they, what are their numbers, and how do they act?

Retired entries are frozen and go on acting. Inplace, their numbers simply stand in the weight. Under delta the weight
is untouched, and a frozen sparse product is added:

    Y[T, O] += X[T, I] @ R.T          dX[T, I] += dY[T, O] @ R

Legend: T = tokens, O = out features, I = in features; R[O, I] holds the retired numbers, and zero elsewhere.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.zero.config import Placement


@dataclass(frozen=True, kw_only=True)
class RetiredEntries:
    """The retired entries of one parameter, on the host; they own an entry that no value owns."""

    # [n] int64, ascending: where in the parameter's memory they lie.
    positions: Tensor
    # [n] fp32: what stands there (inplace), or is added (delta).
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, kw_only=True)
class Retired:
    """The retired entries of a model, in the form of ``placement``."""

    placement: Placement
    # By fully qualified name of the parameter; none of them empty.
    entries: Mapping[str, RetiredEntries] = field(default_factory=dict)

    @property
    def num_entries(self) -> int:
        """Retired entries of all parameters together."""
        return sum(map(len, self.entries.values()))


def find_positions(positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ascending ``positions`` each of ``wanted`` is: (index, found); the index of one not found is any."""
    if not len(positions):
        return torch.zeros_like(wanted), torch.zeros(len(wanted), dtype=torch.bool)
    index = torch.searchsorted(positions, wanted).clamp_(max=len(positions) - 1)
    return index, positions[index] == wanted


def check_entries(name: str, entries: RetiredEntries, numel: int, live: Tensor) -> None:
    """Raise unless ``entries`` are the retired ones of a parameter with ``numel`` entries, and apart from ``live``.

    Args:
        name: of the parameter.
        entries: what is checked.
        numel: entries that the parameter has.
        live: int64 positions of its values, in any order.

    Raises:
        InputError: positions that do not ascend, lie outside or are trained, or not one number for each.
    """
    positions = entries.positions
    if positions.dtype != torch.int64 or positions.dim() != 1 or entries.numbers.shape != positions.shape:
        raise InputError(
            f"the retired entries of {name} have {positions.dtype} positions {tuple(positions.shape)} and "
            f"numbers {tuple(entries.numbers.shape)}: give one int64 position for each number"
        )
    if len(positions) and (int(positions[0]) < 0 or int(positions[-1]) >= numel or bool((positions.diff() <= 0).any())):
        raise InputError(
            f"the retired entries of {name} do not ascend from 0 to {numel - 1}: they belong to another model"
        )
    if bool(find_positions(positions, live)[1].any()):
        raise InputError(f"{name} has entries that are both retired and selected: they belong to different selections")


class RetiredProduct:
    """The matrix R of one linear under delta, and its transpose, built on a device when first used there.

    No buffers: neither a cast of the model nor ZeRO's broadcast may touch the numbers.
    """

    def __init__(self, entries: RetiredEntries, shape: tuple[int, int]) -> None:
        self._entries, self._shape = entries, shape
        self._built: tuple[torch.device, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RetiredProduct":
        return RetiredProduct(self._entries, self._shape)  # torch cannot copy CSR tensors; the entries never change

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(R, R transposed) as fp32 CSR tensors."""
        if self._built is None or self._built[0] != device:
            out_features, in_features = self._shape
            rows, columns = self._entries.positions // in_features, self._entries.positions % in_features
            numbers = self._entries.numbers
            forward = _csr(rows, columns, numbers, (out_features, in_features), device)
            order = torch.argsort(columns, stable=True)
            backward = _csr(columns[order], rows[order], numbers[order], (in_features, out_features), device)
            self._built = (device, forward, backward)
        return self._built[1:]


def _csr(rows: Tensor, columns: Tensor, numbers: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """A CSR matrix from entries sorted by row, then column; int32 indices, as the vendors' kernels want them."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        # torch says once per process that CSR is in beta; what is used of it here is compared with dense products.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            starts.to(device), columns.to(device, torch.int32), numbers.to(device), shape, check_invariants=True
        )


class _Product(torch.autograd.Function):
    """``x @ R.T``; R is frozen, so nothing of ``x`` is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: RetiredProduct, dtype: torch.dtype) -> Tensor:
        matrix, ctx.transposed = product.on(x.device)
        ctx.input_dtype, ctx.input_shape = x.dtype, x.shape
        with torch.autocast(x.device.type, enabled=False):
            y_OT = matrix @ x.reshape(-1, x.shape[-1]).float().T
            return y_OT.T.reshape(*x.shape[:-1], len(y_OT)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        with torch.autocast(dy.device.type, enabled=False):
            dx_IT = ctx.transposed @ dy.reshape(-1, dy.shape[-1]).float().T
            return dx_IT.T.reshape(ctx.input_shape).to(ctx.input_dtype), None, None


def retired_product(x: Tensor, product: RetiredProduct, dtype: torch.dtype) -> Tensor:
    """``x @ R.T`` and its gradient, computed in fp32.

    Args:
        x: [..., I].
        product: the retired entries of the linear.
        dtype: of the result.

    Returns:
        [..., O].
    """
    found: Tensor = _Product.apply(x, product, dtype)
    return found
