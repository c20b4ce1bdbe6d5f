"""Where are dense gradients summed up while calibration runs, and how does one rank get a weight's whole sum?

One accumulator per weight on the host: in memory, or in a file that is mapped into it. After the last micro-batch they
are reduced one weight at a time, each to the rank that scores it.
"""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_zero.collectives import collective_device, digests_of_all_ranks, failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.selection.config import AccumulatorDtype

# Elements that travel at once: the fp64 copy of a piece takes 32 MiB on the ranks that do not own the weight.
_PIECE_ELEMENTS = 2**22
_REMEDY = "set selection.accumulate: per_step, which keeps none"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _ranks_on_this_host() -> int:
    """How many ranks share this host's memory. Collective."""
    if not dist.is_initialized():
        return 1
    hosts = digests_of_all_ranks(socket.gethostname())
    return sum(torch.equal(each, hosts[dist.get_rank()]) for each in hosts)


def _number_in(file: Path, pattern: str = r"^(\d+)$") -> int | None:
    """The number that a line of a kernel's file tells; None where it tells none (no file, or "max")."""
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _left_in_groups(groups: Path, mounted: Path) -> int | None:
    """Bytes that the memory limits of this process's cgroups leave, in either version; None without a limit.

    Args:
        groups: as ``/proc/self/cgroup``: a line of id, controllers and path for each hierarchy.
        mounted: as ``/sys/fs/cgroup``.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return None
    left = []
    for _, controllers, path in lines:
        if controllers == "":
            root, limit_file, usage_file, prefix = mounted, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, prefix = mounted / "memory", "total_"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Every group above binds, too; inside a container, only the lower end of the path may be there, or the root.
        own = root / path.strip("/")
        for folder in [own, *own.parents][: len(own.parts) - len(root.parts) + 1]:
            limit, usage = _number_in(folder / limit_file), _number_in(folder / usage_file)
            if limit is not None and usage is not None:
                # Cached files count as used, and give way: a base that was just read is in them.
                cached = [
                    _number_in(folder / "memory.stat", rf"^{prefix}{kind}_file (\d+)$")
                    for kind in ("inactive", "active")
                ]
                left.append(max(0, limit - usage + sum(number or 0 for number in cached)))
    return min(left, default=None)


def _available_memory() -> int | None:
    """Bytes that new allocations of all processes on this host may take, where the kernel tells."""
    free_kib = _number_in(Path("/proc/meminfo"), r"^MemAvailable:\s*(\d+) kB$")
    limits = [
        None if free_kib is None else free_kib * 1024,
        _left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")),
    ]
    return min((limit for limit in limits if limit is not None), default=None)


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
    """Sums of dense gradients on the host, one for each weight; a context manager that frees them. Made collectively.

    Args:
        shapes: (out, in) of each weight, by name.
        dtype: of the sums; ``float32`` or ``float64``. Every addition rounds to it.
        folder: for one file per rank, mapped into memory instead of held in it; the file has no name from the start,
            and its space is free again when the accumulators are closed or the process ends. None: in memory.

    Raises:
        InputError: the folder or the memory cannot hold them, on any rank. Raised before anything is computed.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], dtype: AccumulatorDtype, folder: str | Path | None = None
    ) -> None:
        self._rank, self._world_size = rank_and_world_size()
        sizes = {name: shape[0] * shape[1] for name, shape in shapes.items()}
        total, torch_dtype = sum(sizes.values()), getattr(torch, dtype)
        self.num_bytes = total * torch_dtype.itemsize
        self._sums: dict[str, Tensor] = {}
        if not total:
            return
        num_ranks = _ranks_on_this_host()
        with failing_together():
            if folder is None:
                self._check_memory(len(sizes), num_ranks)
            else:
                pieces = _mapped_file(Path(folder), total, torch_dtype, self._rank).split(list(sizes.values()))
                self._sums = {name: piece.view(shapes[name]) for name, piece in zip(sizes, pieces, strict=True)}
        if folder is None:
            # Only now: what one rank has taken would be missing in the others' sums.
            self._sums = {name: torch.zeros(shape, dtype=torch_dtype) for name, shape in shapes.items()}

    def _check_memory(self, num_weights: int, num_ranks: int) -> None:
        available = _available_memory()
        if available is not None and available < self.num_bytes * num_ranks:
            shared = f", shared by {num_ranks} ranks" if num_ranks > 1 else ""
            raise InputError(
                f"accumulators of {num_weights} weights take {_gib(self.num_bytes)} of host memory on every rank, and "
                f"{_gib(available)} are available on the host of rank {self._rank}{shared}: set "
                f"selection.accumulator_folder to map them from disk, or {_REMEDY}"
            )

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
