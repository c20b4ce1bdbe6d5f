"""Where are dense gradients summed up while calibration runs, and how does one rank get a weight's whole sum?

One accumulator per weight on the host: in memory, or in a file that is mapped into it. After the last micro-batch they
are reduced one weight at a time, each to the rank that scores it.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_zero.collectives import collective_device
from sparse_zero.errors import InputError
from sparse_zero.selection.config import AccumulatorDtype

# Elements that travel at once: the fp64 copy of a piece takes 32 MiB on the ranks that do not own the weight.
_PIECE_ELEMENTS = 2**22
_REMEDY = "set selection.accumulator_dtype: bfloat16, or selection.accumulate: per_step, which keeps none"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _available_memory() -> int | None:
    """Bytes that new allocations may take, where the kernel tells."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _mapped_file(folder: Path, num_elements: int, dtype: torch.dtype, rank: int) -> Tensor:
    """A 1-D tensor of zeros in a new file of ``folder``; the file has lost its name already, so nothing can be left.

    Raises:
        InputError: no such folder, one that cannot be written, or one without enough space.
    """
    field, num_bytes = f"selection.accumulator_folder is {folder}", num_elements * dtype.itemsize
    if not folder.is_dir():
        raise InputError(f"{field}, which is not a folder: create it, or name another")
    free = shutil.disk_usage(folder).free
    too_small = (
        f"rank {rank} needs {_gib(num_bytes)} there and {_gib(free)} are free: name another folder, or {_REMEDY}"
    )
    if free < num_bytes:
        raise InputError(f"{field}: {too_small}")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f"sparse_zero_gradients_rank{rank}_", dir=folder)
    except OSError as error:
        raise InputError(f"{field}, and no file can be made there ({error.strerror}): name another folder") from error
    try:
        # Really taken, not only promised: writing to a mapping of a full disk would kill the process.
        os.posix_fallocate(descriptor, 0, num_bytes)
        return torch.from_file(name, shared=True, size=num_elements, dtype=dtype)
    except OSError as error:
        raise InputError(f"{field}: {too_small} ({error.strerror})") from error
    finally:
        os.close(descriptor)
        # The mapping keeps the space until it goes, however this process ends.
        with suppress(FileNotFoundError):
            os.unlink(name)


class Accumulators:
    """Sums of dense gradients on the host, one for each weight; a context manager that frees them.

    Args:
        shapes: (out, in) of each weight, by name.
        dtype: of the sums; ``float32``, ``float64`` or ``bfloat16``. Every addition rounds to it.
        folder: for one file per rank, mapped into memory instead of held in it; the file has no name from the start,
            and its space is free again when the accumulators are closed or the process ends. None: in memory.

    Raises:
        InputError: the folder or the memory cannot hold them. Raised before anything is computed.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], dtype: AccumulatorDtype, folder: str | Path | None = None
    ) -> None:
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        sizes = {name: shape[0] * shape[1] for name, shape in shapes.items()}
        total, torch_dtype = sum(sizes.values()), getattr(torch, dtype)
        self.num_bytes = total * torch_dtype.itemsize
        self._sums: dict[str, Tensor] = {}
        if not total:
            return
        if folder is not None:
            pieces = _mapped_file(Path(folder), total, torch_dtype, self._rank).split(list(sizes.values()))
            self._sums = {name: piece.view(shapes[name]) for name, piece in zip(sizes, pieces, strict=True)}
            return
        available = _available_memory()
        if available is not None and available < self.num_bytes:
            raise InputError(
                f"accumulators of {len(sizes)} weights take {_gib(self.num_bytes)} of host memory on every rank, and "
                f"{_gib(available)} are available on rank {self._rank}: set selection.accumulator_folder to map them "
                f"from disk, or {_REMEDY}"
            )
        self._sums = {name: torch.zeros(shape, dtype=torch_dtype) for name, shape in shapes.items()}

    def __enter__(self) -> "Accumulators":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all that is left, in memory and on disk."""
        self._sums.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def add(self, name: str, gradient_OI: Tensor) -> None:
        """Add a [out, in] gradient of any dtype and device to the sum of its weight."""
        # In fp32, or fp64, and then rounded once: torch promotes the operands of an addition in place.
        self._sums[name].add_(gradient_OI.to("cpu"))

    def take(self, name: str, owner: int) -> Tensor | None:
        """The sum of a weight's gradients over all ranks; collective. Its accumulator is freed.

        Args:
            name: of the weight.
            owner: rank that gets the sum.

        Returns:
            [out, in] fp64 on the host; None on the other ranks.
        """
        own_OI = self._sums.pop(name)
        if self._world_size == 1:
            return own_OI.to(torch.float64, copy=True)
        whole = torch.empty(own_OI.numel(), dtype=torch.float64) if self._rank == owner else None
        offset = 0
        for piece in own_OI.view(-1).split(_PIECE_ELEMENTS):
            wide = piece.to(collective_device(), torch.float64, copy=True)
            dist.reduce(wide, dst=owner)
            if whole is not None:
                whole[offset : offset + len(piece)] = wide.cpu()
            offset += len(piece)
        return None if whole is None else whole.view(own_OI.shape)
