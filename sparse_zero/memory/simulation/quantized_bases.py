"""What does a quantized base store beside its parameters, and how is it made of tensors without data?

The codes are parameters; the constants that belong to them are not, see :mod:`sparse_zero.layers.quantized`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparse_zero.layers.quantized import EightBit, FourBit, Quantization, is_quantized_by_bitsandbytes


class Params4bit(FakeTensor):
    """bitsandbytes' codes of 4 bits without data: PEFT looks at the name of the class, and for their constants."""


def _tensors(state: Any) -> Iterator[Tensor]:
    """Of bitsandbytes' QuantState: constants, and the tables of what codes stand for."""
    if state is not None:
        yield from (each for each in (state.absmax, state.code, state.offset) if each is not None)
        yield from _tensors(state.state2)


def _changed(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same QuantState of other tensors."""
    if state is None:
        return None
    made = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        tensor = getattr(state, name)
        setattr(made, name, None if tensor is None else change(tensor))
    made.state2 = _changed(state.state2, change)
    return made


def constants_of(model: nn.Module) -> list[Tensor]:
    """Everything that is stored beside the codes of a model's quantized linears, bitsandbytes' own ones or ours."""
    found: list[Tensor] = []
    for module in model.modules():
        quantization = getattr(module, "quantization", None)
        if isinstance(quantization, FourBit):
            found += _tensors(quantization.state)
        elif isinstance(quantization, Quantization):
            found += quantization.constants()
        elif is_quantized_by_bitsandbytes(module):
            weight: Any = module.weight
            scales = getattr(weight, "SCB", None)
            found += _tensors(getattr(weight, "quant_state", None)) if scales is None else [scales]
    return found


def make_constants_fake(model: nn.Module, device: torch.device) -> None:
    """Give quantized linears whose constants are on the meta device fake ones.

    Args:
        model: its parameters are fake already.
        device: of the constants.
    """

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device)

    for module in model.modules():
        quantization = getattr(module, "quantization", None)
        if isinstance(quantization, FourBit):
            made: Any = dataclasses.replace(quantization, state=_changed(quantization.state, fake))
            vars(module)["quantization"] = made
        elif isinstance(quantization, EightBit):
            made = dataclasses.replace(quantization, scales=fake(quantization.scales))
            vars(module)["quantization"] = made


def fake_codes(codes: Any, device: torch.device) -> nn.Parameter:
    """A frozen parameter in the place of bitsandbytes' own, with constants of its own where it has some.

    Args:
        codes: Params4bit on the meta device.
        device: of the new one.
    """
    made: Any = nn.Parameter(torch.empty(codes.shape, dtype=codes.dtype, device=device), requires_grad=False)
    made.__class__ = Params4bit
    made.quant_state = _changed(codes.quant_state, lambda tensor: torch.empty_like(tensor, device=device))
    for name in ("compress_statistics", "quant_type", "quant_storage", "blocksize", "bnb_quantized"):
        setattr(made, name, getattr(codes, name))
    found: nn.Parameter = made
    return found


def product_with_codes(
    x: Tensor,
    codes: Tensor,
    shape: list[int],
    constants: Tensor,
    group: int,
    form: str,
    bias: Tensor | None = None,
    coded_constants: Tensor | None = None,
    table: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes' ``gemm_4bit`` in the operations that it takes for more than some hundred tokens.

    It makes the weight dense inside of one operation, where nobody sees what that takes.

    Args:
        x: [..., in].
        codes: of the weight.
        shape: (out, in).
        constants: of each group of entries; those of the constants' groups where these are codes, too.
        group: entries with a constant in common.
        form: nf4 or fp4.
        bias: [out].
        coded_constants: of each group of entries, in 8 bits.
        table: what these stand for.
        offset: added to them.
    """
    ops = torch.ops.bitsandbytes
    if coded_constants is not None:
        assert offset is not None
        constants = ops.dequantize_blockwise.default(coded_constants, constants, table, 256, torch.float32) + offset
    dense = ops.dequantize_4bit.default(codes, constants, group, form, shape, x.dtype)
    return nn.functional.linear(x, dense, bias)


def is_codes(parameter: Tensor) -> bool:
    """Whether a parameter is bitsandbytes' own, with codes of 4 bits and their constants."""
    return getattr(parameter, "quant_state", None) is not None
