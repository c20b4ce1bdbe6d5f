"""Which bytes stand for the hidden states of a token?

Shapes: T tokens, H entries of a hidden state, R bytes of a token.
"""

import torch
from torch import Tensor

from sparse_zero.prefix.config import StoredDtype

_FLOAT8 = torch.float8_e4m3fn
_SCALE_BYTES = torch.float32.itemsize


def bytes_per_token(hidden: int, stored: StoredDtype, compute: torch.dtype) -> int:
    """R, for hidden states of ``hidden`` entries that the model computes in ``compute``."""
    if stored == "float8":
        return hidden + _SCALE_BYTES
    return hidden * (torch.bfloat16 if stored == "bfloat16" else compute).itemsize


def encode(states_TH: Tensor, stored: StoredDtype) -> Tensor:
    """[T, R] uint8, on the same device. float8 fits the largest entry of each token to the largest number there is."""
    if stored != "float8":
        kept_TH = states_TH.to(torch.bfloat16) if stored == "bfloat16" else states_TH
        return kept_TH.contiguous().view(torch.uint8)
    wide_TH = states_TH.float()
    scale_T1 = wide_TH.abs().amax(1, keepdim=True) / torch.finfo(_FLOAT8).max
    # A token of zeros, or of what underflows, has no scale.
    scale_T1 = torch.where(scale_T1 > 0, scale_T1, torch.ones_like(scale_T1))
    small_TH = (wide_TH / scale_T1).to(_FLOAT8)
    return torch.cat([small_TH.view(torch.uint8), scale_T1.view(torch.uint8)], 1)


def decode(bytes_TR: Tensor, stored: StoredDtype, compute: torch.dtype) -> Tensor:
    """[T, H] in ``compute`` of what :func:`encode` made, on the same device."""
    if stored == "float8":
        small_TH = bytes_TR[:, :-_SCALE_BYTES].contiguous().view(_FLOAT8)
        scale_T1 = bytes_TR[:, -_SCALE_BYTES:].contiguous().view(torch.float32)
        return (small_TH.float() * scale_T1).to(compute)
    return bytes_TR.view(torch.bfloat16 if stored == "bfloat16" else compute).to(compute)
