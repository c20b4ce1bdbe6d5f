"""How do inplace values in bf16 or fp16 come from their fp32 masters: rounded to the nearest number, or by chance?

Stochastic rounding takes one of the two neighbours of a number, the nearer one the more probably, so that the
expectation is the number itself (Gupta et al., arXiv 1502.02551). Which one is a hash of the seed, the step, the name
of the values and the place of the entry: equal on all ranks and devices, and the same again after a resume.
"""

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import placement_of, trainable_parameters
from sparse_zero.zero import compat
from sparse_zero.zero.config import ROUNDINGS, Rounding

LOW_PRECISION = (torch.bfloat16, torch.float16)
_MASK = 0xFFFFFFFF
# Distance between neighbouring fp16 below 2**-14.
_FP16_SMALLEST = 2.0**-24


def uniform_bits(length: int, key: int, offset: int = 0, device: torch.device | None = None) -> Tensor:
    """[length] int64 in [0, 2**32) for the places from ``offset`` on: a hash of place and key, equal on every device.

    The mixing function is the 32-bit one with the constants 0x21f0aaad and 0x735a2d97 of Ellis and Wellons
    (https://github.com/skeeto/hash-prospector); its products stay below 2**63.
    """
    places = torch.arange(offset, offset + length, dtype=torch.int64, device=device)
    x = (places * 0x9E3779B1 + key) & _MASK
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 15)


def key_of(seed: int, step: int, name: str) -> int:
    """32 bits that differ between seeds, steps and names."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {name}".encode()).digest()[:4], "little")


def _to_bf16(numbers: Tensor, bits: Tensor) -> Tensor:
    """The upper half of a fp32's bits is a bf16: noise below it carries into it as often as it should."""
    noisy = numbers.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (noisy & -0x10000).view(torch.float32).to(torch.bfloat16)


def _to_fp16(numbers: Tensor, bits: Tensor) -> Tensor:
    """In units of the distance between neighbours, whose power of two ends at that of the subnormal ones."""
    power = (numbers.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = (power * 2.0**-10).clamp(min=_FP16_SMALLEST)
    scaled = numbers.abs() / unit
    below = scaled.floor()
    up = (bits >> 8).to(torch.float32) * 2.0**-24 < scaled - below
    return ((below + up) * unit).copysign(numbers).to(torch.float16)


def round_stochastic(numbers: Tensor, dtype: torch.dtype, key: int, offset: int = 0) -> Tensor:
    """fp32 ``numbers`` [n] in ``dtype``, each one of its two neighbours, with ``numbers`` as the expectation.

    Numbers that ``dtype`` has stay what they are. What is not finite, or beyond the largest number of ``dtype``, is
    rounded to nearest.

    Args:
        numbers: fp32, 1-D.
        dtype: bf16 or fp16.
        key: see :func:`key_of`.
        offset: place of the first of them, where they are a part of something.

    Raises:
        InputError: another dtype.
    """
    if dtype not in LOW_PRECISION:
        raise InputError(f"stochastic rounding is to bf16 or fp16, not to {dtype}: use rounding nearest")
    bits = uniform_bits(numbers.numel(), key, offset, numbers.device)
    numbers = numbers.contiguous()
    rounded = _to_bf16(numbers, bits) if dtype == torch.bfloat16 else _to_fp16(numbers, bits)
    largest = torch.finfo(dtype).max
    return torch.where(numbers.abs() <= largest, rounded, numbers.to(dtype))


def _rounded(numbers: Tensor, offset: int, *, dtype: torch.dtype, key: int) -> Tensor:
    return round_stochastic(numbers, dtype, key, offset)


@torch.no_grad()
def round_values(engine: Any, seed: int, step: int) -> None:
    """Set low-precision values to their fp32 masters, rounded stochastically. Collective.

    Up to stage 2 every rank needs the masters whole, which are gathered in fp32: 4 bytes more per value and step than
    with rounding to nearest. At stage 3 each rank rounds its own part.
    """
    for name, parameter in trainable_parameters(engine.module).items():
        key = key_of(seed, step, name)
        if compat.is_sharded(parameter):
            compat.set_shard(parameter, partial(_rounded, dtype=parameter.dtype, key=key))
        else:
            parameter.copy_(round_stochastic(compat.full_master(engine, parameter).view(-1), parameter.dtype, key))


def check_rounding(model: nn.Module, rounding: Rounding, *, is_cast: bool = False) -> None:
    """Raise unless ``rounding`` has something to round in ``model``.

    Args:
        model: sparsified.
        rounding: what is asked for.
        is_cast: whether DeepSpeed will cast the values to bf16 or fp16, so that theirs is no matter.

    Raises:
        InputError: an unknown name; stochastic where values are in fp32, or are not written into the weights.
    """
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding is {rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    if rounding == "nearest":
        return
    dtypes = {parameter.dtype for parameter in trainable_parameters(model).values()}
    if placement_of(model) != "inplace" or not (is_cast or dtypes <= set(LOW_PRECISION)):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InputError(
            f"rounding is 'stochastic', for inplace values in bf16 or fp16; here are {placement_of(model)} values in "
            f"{found}: use rounding nearest"
        )
