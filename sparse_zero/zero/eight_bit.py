"""How are the 8-bit states of bitsandbytes' optimizers read and written as fp32?

A state ``state1`` is held as codes (uint8, one per entry), the largest magnitude of each 256 entries (``absmax1``) and
the 256 numbers that the codes stand for (``qmap1``). Tensors below 4,096 entries stay in fp32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK_SIZE = 256


def _numbered(name: str, what: str) -> str:
    return f"{what}{name.removeprefix('state')}"


def companions(state: Mapping[str, Any]) -> set[str]:
    """Names of tensors that only say how others are to be read."""
    codes = [name for name, held in state.items() if isinstance(held, Tensor) and held.dtype == torch.uint8]
    return {_numbered(name, what) for name in codes for what in ("absmax", "qmap")}


def dequantize(state: Mapping[str, Any], name: str) -> Tensor:
    """The state ``name`` as fp32, of the same shape."""
    from bitsandbytes import functional

    codes: Tensor = state[name]
    found: Tensor = functional.dequantize_blockwise(
        codes,
        absmax=state[_numbered(name, "absmax")],
        code=state[_numbered(name, "qmap")],
        blocksize=_BLOCK_SIZE,
    )
    return found.float()


def quantize(state: Mapping[str, Any], name: str, numbers: Tensor) -> None:
    """Let the state ``name`` hold fp32 ``numbers``, each rounded to the nearest of its block's codes."""
    from bitsandbytes import functional

    code = state[_numbered(name, "qmap")]
    codes, how = functional.quantize_blockwise(numbers, code=code, blocksize=_BLOCK_SIZE)
    state[name].copy_(codes.view_as(state[name]))
    state[_numbered(name, "absmax")].copy_(how.absmax)
