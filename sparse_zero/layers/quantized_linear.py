"""The linear over a frozen weight of codes, and how the linears of bitsandbytes become it.

bitsandbytes' own linears are not run: in evaluation on some CPUs its 4-bit one repacks its weight and rounds its
constants, and its 8-bit one computes another product in evaluation, and on GPUs in training, than ``x @ W.T``.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import check_equal_on_all_ranks
from sparse_zero.errors import InputError
from sparse_zero.layers.functional import PLAIN, sparse_linear
from sparse_zero.layers.quantized import (
    Quantization,
    dense_form,
    dense_parameter,
    dtype_of,
    is_quantized_by_bitsandbytes,
    read_quantization,
)
from sparse_zero.zero.same_weights import fingerprint


class QuantizedLinear(nn.Module):
    """``y = x @ W.T + b`` in the dtype of ``x``, where W is the dense form of ``weight``, which nothing keeps.

    Args:
        weight: the codes, in whatever shape they are stored; frozen here.
        bias: [out] or None; frozen here.
        quantization: what the codes stand for.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, quantization: Quantization) -> None:
        super().__init__()
        self.out_features, self.in_features = quantization.shape
        self.quantization = quantization
        self.weight = weight.requires_grad_(False)
        self.register_parameter("bias", bias)
        if bias is not None:
            bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return sparse_linear(x, self.weight, self.bias, None, None, None, PLAIN, self.quantization)

    def effective_weight(self) -> Tensor:
        """[out, in]: the dense form of the codes, in memory of its own."""
        return dense_form(self.weight, self.quantization)

    def extra_repr(self) -> str:
        bits = f"{8 * self.weight.numel() * self.weight.element_size() / (self.in_features * self.out_features):.0f}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits} bits"


@torch.no_grad()
def plain_module(weight: Tensor, bias: nn.Parameter | None, plain_class: type[nn.Module]) -> nn.Module:
    """The module that was quantized, with a dense weight.

    Args:
        weight: [out, in]; taken over, or copied into the layout of ``plain_class``.
        bias: [out] or None; taken over.
        plain_class: ``nn.Linear``, or transformers' Conv1D, which holds W as [in, out].
    """
    out_features, in_features = weight.shape
    made: Any
    with torch.device("meta"):
        if plain_class is nn.Linear:
            made = nn.Linear(in_features, out_features, bias=bias is not None)
        else:
            made = plain_class(out_features, in_features)
            weight = weight.T.contiguous()
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = bias
    found: nn.Module = made
    return found


def dense_module(layer: QuantizedLinear) -> nn.Module:
    """The plain module of a frozen linear, its weight dense."""
    return plain_module(layer.effective_weight(), layer.bias, layer.quantization.plain_class).train(layer.training)


def adopt(model: nn.Module) -> dict[str, nn.Module]:
    """Put a :class:`QuantizedLinear` in the place of every linear of bitsandbytes in ``model``.

    They take over the codes, which are not copied; a weight that several linears have stays one.

    Returns:
        What was there, by name.

    Raises:
        InputError: a linear whose codes cannot be used, see :func:`~sparse_zero.layers.quantized.read_quantization`;
            the model is unchanged then.
    """
    found: dict[str, Any] = {
        name: module for name, module in model.named_modules() if is_quantized_by_bitsandbytes(module)
    }
    dtype = dtype_of(model)
    codes: dict[int, nn.Parameter] = {}
    made: dict[str, nn.Module] = {}
    for name, module in found.items():
        if "forward" in vars(module):
            raise InputError(
                f"{name} has a forward that something else has put there (such as accelerate's offloading), which "
                "would be dropped: load the base on one device"
            )
        quantization = read_quantization(module, name, dtype)
        # A plain parameter: those of bitsandbytes change class and state when they are moved.
        weight = codes.setdefault(id(module.weight), nn.Parameter(module.weight.data, requires_grad=False))
        made[name] = QuantizedLinear(weight, module.bias, quantization).train(module.training)
    for name, module in made.items():
        model.set_submodule(name, module)
    return found


def acting_parameter(model: nn.Module, parameter: str) -> Tensor:
    """The parameter of this name, or, if it is quantized, [out, in] of what acts in its place; without a gradient."""
    name, _, attribute = parameter.rpartition(".")
    module: Any = model.get_submodule(name)
    if attribute == "weight" and getattr(module, "quantization", None) is not None:
        found: Tensor = module.effective_weight()
        return found
    return dense_parameter(model, parameter)


def check_same_constants(model: nn.Module) -> None:
    """Raise on every rank when constants of quantized weights differ between ranks: no broadcast reaches them.

    Collective where there are some.

    Raises:
        RuntimeError: names the ranks.
    """
    quantizations: Iterator[Quantization | None] = (getattr(each, "quantization", None) for each in model.modules())
    sums = [fingerprint(each) for found in quantizations if found is not None for each in found.constants()]
    if sums and dist.is_initialized():
        text = hashlib.sha256(torch.stack(sums).numpy().tobytes()).hexdigest()
        check_equal_on_all_ranks(text, "what belongs to the codes of the quantized weights")


@contextmanager
def adopted(model: nn.Module) -> Iterator[None]:
    """Have a :class:`QuantizedLinear` in the place of every linear of bitsandbytes while the block runs."""
    replaced = adopt(model)
    try:
        yield
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)
