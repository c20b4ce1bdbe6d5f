"""Which kernels compute the products with the selected blocks: torch's, or Triton's?"""

import functools
import importlib.util
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_zero.errors import InputError

# auto: Triton's on CUDA, where it is installed; else torch's.
Kernels = Literal["auto", "plain", "triton"]
KERNELS: tuple[Kernels, ...] = get_args(Kernels)

# What the kernels take; they add up in fp32, which would be too few bits for fp64.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_chosen: Kernels = "auto"


class KernelWarning(UserWarning):
    """Triton's kernels were wanted, and torch's are used."""


def set_kernels(kernels: Kernels) -> None:
    """Choose the kernels for the products with selected blocks, in this process, from the next forward on.

    Args:
        kernels: "plain" for torch's products; "triton" for kernels that read strips of the operands where they lie,
            and add up in fp32; "auto", as it is from the start, for Triton's on CUDA, where Triton is installed, with
            a :class:`KernelWarning` where it is not. fp64, other devices, and what torch.compile traces, are always
            computed plainly.

    Raises:
        InputError: there are no such kernels, or Triton is not installed.
    """
    global _chosen
    if kernels not in KERNELS:
        raise InputError(f"kernels is {kernels!r}: choose one of {', '.join(KERNELS)}")
    if kernels == "triton" and not _is_installed():
        raise InputError(
            "kernels is 'triton', which is not installed: pip install 'triton>=3.4', or choose 'auto' or 'plain'"
        )
    _chosen = kernels


def get_kernels() -> Kernels:
    """What was chosen."""
    return _chosen


@functools.cache
def _is_installed() -> bool:
    # Its knobs came with 3.4.
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec("triton.knobs") is not None


@functools.cache
def _interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes tensors of the host."""
    if not _is_installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, KernelWarning, stacklevel=3)


def runs_triton(x: Tensor) -> bool:
    """Whether products into, or of, a tensor like ``x`` are left to Triton's kernels."""
    # torch.compile makes kernels of its own from the plain products.
    if _chosen == "plain" or x.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    # Tensors without data, of a simulated GPU: neither way copies anything.
    if isinstance(x, Tensor) and type(x) is not Tensor:
        return False
    if not x.is_cuda:
        return _chosen == "triton" and _interprets()
    if not _is_installed():
        _warn("Triton is not installed: selected blocks are multiplied by torch; pip install 'triton>=3.4'")
        return False
    return True
