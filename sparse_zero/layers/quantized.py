"""What is the dense form of a weight that is stored as codes: 4 bits (NF4, FP4) or 8, as bitsandbytes makes them?

    4 bit   W[k] = number[code[k]] * constant[k // group]    the constants may be codes of 8 bits themselves
    int8    W[o, i] = code[o, i] * scale[o] / 127            computed in fp32, rounded once

The codes are the parameter: whole numbers, which no cast of a model and no broadcast changes. The constants are no
parameters and no buffers, for those would be cast. The dense form is computed anew wherever it is read, forward and
backward, and kept nowhere.

Of LLM.int8() (arXiv 2208.07339) the weights are taken, and not its product, which rounds the activations to 8 bits as
well and multiplies those beyond a threshold apart: that is not a function whose gradient anyone computes (the gradient
of its weights, and bitsandbytes' own backward, are those of the plain product ``x @ W.T``), and a merged model, which
has the dense weights, would compute another one.
"""

import copy
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.optional import require

EXTRA = "quant"


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantization(ABC):
    """How the dense form of one linear's weight comes from its codes."""

    # (out, in) of the weight.
    shape: tuple[int, int]
    # Of the dense form; the codes were made of a weight in it.
    dtype: torch.dtype
    # In which the values of the weight are trained, unless another is asked for.
    compute_dtype: torch.dtype
    # Of the module that the quantized one has replaced: nn.Linear, or transformers' Conv1D, which holds W transposed.
    plain_class: type[nn.Module] = nn.Linear

    @abstractmethod
    def dense(self, codes: Tensor) -> Tensor:
        """[out, in] in ``dtype``, on the device of ``codes``; memory of its own."""

    @abstractmethod
    def constants(self) -> list[Tensor]:
        """What is stored beside the codes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBit(Quantization):
    """NF4 or FP4: two codes to a byte, and a constant for each group of entries."""

    # bitsandbytes' QuantState: constants, what the codes stand for, the size of a group. Its shape is one row of all
    # codes: where groups do not end with the rows, the kernel of bitsandbytes 0.50 for CPUs with AVX512 mistakes them.
    state: Any

    def dense(self, codes: Tensor) -> Tensor:
        bitsandbytes = require("bitsandbytes", extra=EXTRA, purpose="compute with a quantized base")
        if self.state.absmax.device != codes.device:
            self.state.to(codes.device)
        dense: Tensor = bitsandbytes.functional.dequantize_4bit(codes, self.state)
        return dense.view(-1)[: math.prod(self.shape)].view(self.shape)

    def constants(self) -> list[Tensor]:
        inner = [] if self.state.state2 is None else [self.state.offset, self.state.state2.absmax]
        return [self.state.absmax, *inner]


@dataclass(frozen=True, kw_only=True, eq=False)
class EightBit(Quantization):
    """int8: one code for each entry, and a scale for each row: the largest magnitude in it."""

    # [out] fp32.
    scales: Tensor

    def dense(self, codes: Tensor) -> Tensor:
        factors = (self.scales.to(codes.device) / 127).unsqueeze(1)
        return torch.mul(codes, factors, out=torch.empty(self.shape, dtype=self.dtype, device=codes.device))

    def constants(self) -> list[Tensor]:
        return [self.scales]


def dense_form(weight: Tensor, quantization: Quantization | None) -> Tensor:
    """The numbers of a weight: itself, or, where it holds codes, what they stand for.

    Args:
        weight: [out, in], or codes in whatever shape they are stored.
        quantization: of the codes; None for a weight that is dense.

    Returns:
        [out, in]; the weight itself if it is dense, else memory of its own, without a gradient.
    """
    if quantization is None:
        return weight
    with torch.no_grad():
        return quantization.dense(weight.detach())


def is_quantized_by_bitsandbytes(module: nn.Module) -> bool:
    """Whether ``module`` is a linear of bitsandbytes."""
    # Where it has not been imported, nobody has made one.
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of what is not quantized in ``model``: of its first parameter that holds numbers; else fp32."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or type(parameter).__module__.partition(".")[0] == "bitsandbytes":
                continue
            if parameter.is_floating_point() and parameter.element_size() > 1:
                return parameter.dtype
    return torch.float32


def read_quantization(module: Any, name: str, dtype: torch.dtype) -> Quantization:
    """What a linear of bitsandbytes says of its codes.

    Args:
        module: for which :func:`is_quantized_by_bitsandbytes` holds.
        name: of the module, for messages.
        dtype: of the dense form of int8 codes, which do not tell it.

    Raises:
        InputError: there are no codes yet, or they are not those that were loaded, or would not stay as they are.
    """
    weight, shape = module.weight, (int(module.out_features), int(module.in_features))
    plain_class = getattr(module, "source_cls", nn.Linear)
    is_four_bit = hasattr(weight, "quant_type")
    if not is_four_bit and module.state.has_fp16_weights:
        raise InputError(
            f"{name} keeps its weight in {weight.dtype} and quantizes it in every forward: make it with "
            "has_fp16_weights=False"
        )
    if not (weight.bnb_quantized if is_four_bit else weight.dtype == torch.int8):
        raise InputError(f"{name} is to be quantized and has not been yet: move the model to its device first")
    if weight.is_floating_point():
        raise InputError(
            f"{name} stores its codes as {weight.dtype}, which a cast of the model would change: quantize it with "
            "quant_storage=torch.uint8"
        )
    if not is_four_bit:
        # A forward moves the scales from the weight to the module's state.
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return EightBit(
            shape=shape, dtype=dtype, compute_dtype=dtype, plain_class=plain_class, scales=scales.detach().float()
        )
    state = weight.quant_state if weight.quant_state is not None else module.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise InputError(
            f"{name} was repacked by bitsandbytes when the model was evaluated on this CPU, which rounds its "
            "constants: load the base again, and sparsify it before it is evaluated"
        )
    if tuple(state.shape) != shape:
        raise InputError(
            f"{name} was quantized as {tuple(state.shape)}, not as {shape}: quantize the weight as [out, in]"
        )
    state = copy.copy(state)
    state.shape = torch.Size([2 * weight.numel()])
    compute_dtype = module.compute_dtype if module.compute_type_is_set and module.compute_dtype else state.dtype
    return FourBit(shape=shape, dtype=state.dtype, compute_dtype=compute_dtype, plain_class=plain_class, state=state)


def quantization_of(model: nn.Module, parameter: str) -> Quantization | None:
    """How the parameter of this name is quantized; None where it holds its numbers themselves.

    Raises:
        InputError: see :func:`read_quantization`.
    """
    name, _, attribute = parameter.rpartition(".")
    module = model.get_submodule(name)
    if attribute != "weight":
        return None
    if is_quantized_by_bitsandbytes(module):
        return read_quantization(module, name, dtype_of(model))
    found: Quantization | None = getattr(module, "quantization", None)
    return found


def dense_parameter(model: nn.Module, parameter: str) -> Tensor:
    """The dense form of the parameter of this name: [out, in] of a quantized weight, else as it is stored."""
    return dense_form(model.get_parameter(parameter).detach(), quantization_of(model, parameter))
