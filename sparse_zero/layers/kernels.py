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

# They have not run on a GPU yet.
_chosen: Kernels = "plain"


class KernelWarning(UserWarning):
    """Triton's kernels were wanted, and torch's are used."""


def set_kernels(kernels: Kernels) -> None:
    """Choose the kernels for the products with selected blocks, in this process, from the next forward on.

    Args:
        kernels: "plain", as it is from the start, for torch's products; "triton" for kernels that read strips of the
            operands where they lie, and add up in fp32; "auto" for Triton's on CUDA, where Triton is installed, with
            a :class:`KernelWarning` where it is not, or is older than 3.4. fp64, other devices, and what torch.compile
            traces, are always computed plainly.

    Raises:
        InputError: there are no such kernels, or Triton is not installed.
    """
    global _chosen
    _check(kernels, "kernels")
    _chosen = kernels


def check_kernels_here(kernels: Kernels) -> None:
    """Refuse, before anything is loaded, a run's kernels that could not run on this machine.

    Args:
        kernels: training.region_kernels.

    Raises:
        InputError: Triton is not installed, or there is no GPU for it.
    """
    _check(kernels, "training.region_kernels")
    if kernels == "triton" and not torch.cuda.is_available() and not _interprets():
        raise InputError("training.region_kernels is 'triton', which needs a GPU, and there is none: set it to plain")


def _check(kernels: Kernels, field: str) -> None:
    if kernels not in KERNELS:
        raise InputError(f"{field} is {kernels!r}: choose one of {', '.join(KERNELS)}")
    if kernels == "triton" and not _is_installed():
        raise InputError(
            f"{field} is 'triton', of which 3.4 or newer is not installed (it comes with torch for CUDA from 2.8 on): "
            "choose 'auto' or 'plain'"
        )


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


def allows_tf32() -> bool:
    """Whether torch may multiply fp32 as TF32 on CUDA: by the older settings or, where torch has them, the newer ones.

    To read the older ones after the newer were set is an error.
    """
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


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
        _warn("Triton 3.4 or newer is not installed (torch brings it from 2.8 on): torch multiplies selected blocks")
        return False
    return True
