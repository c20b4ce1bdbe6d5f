"""Where do the bytes of each sample lie on disk, and which of them can be believed?

Every rank writes one file, ``rank-00000.bin``, and reads those of all: what several nodes write into one file of a
network file system gets lost. A sample has the same place in each of them, behind the samples before it, so that no
index is needed, and file systems store nothing for the holes. ``rank-00000.done`` has one bit per sample, and gets a
new bit only after the bytes have reached the disk: what a killed process has left half written is written anew.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_zero.files import atomic_write_bytes

# Files open for reading at a time: far below the usual limit of a process, 1024.
_MAX_OPEN = 128
# What is written between two syncs, in bytes. A sync that has more to do, after an epoch of 100 GiB say, would stand in
# the way of a checkpoint for minutes; this much is some seconds on a slow disk.
_SYNC_BYTES = 2 * 2**30
# Files of a store by their ends: those of others, rank-1.bin say, are never touched.
_RANK_FILES = "rank-[0-9][0-9][0-9][0-9][0-9]"


class SampleStore:
    """Samples of known lengths, of which each is written once and read often.

    Args:
        folder: that is there; of these samples only.
        rank: whose file this process writes.
        lengths: tokens of each sample.
        token_bytes: of each token.
        max_bytes: of all files together; None: as much as there is. The first samples of the data come in.
        reserve_bytes: of the disk that stay free for others; as the file system says, which knows of no quota.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        lengths: Sequence[int],
        token_bytes: int,
        max_bytes: int | None = None,
        reserve_bytes: int = 0,
    ) -> None:
        self._folder, self._rank, self._token_bytes = folder, rank, token_bytes
        self._reserve_bytes = reserve_bytes
        sizes = np.asarray(lengths, dtype=np.int64) * token_bytes
        self._sizes, self._offsets = sizes, np.concatenate([[0], np.cumsum(sizes)])
        # The samples before this one may be stored.
        self.num_storable = num_storable(lengths, token_bytes, max_bytes)
        self._own = np.zeros(len(sizes), dtype=bool)
        self._unsynced = np.zeros(len(sizes), dtype=bool)
        self._unsynced_bytes = 0
        # For each sample the rank whose file has it; -1: none. The own ones join at refresh, like all others.
        self._rank_of = np.full(len(sizes), -1, dtype=np.int32)
        self._open: dict[int, int] = {}
        # What has kept this rank from storing; nothing is stored from then on.
        self.problem: OSError | None = None
        self._writes: int | None = None
        self._own |= self._read_done(rank)

    @property
    def needed_bytes(self) -> int:
        """Of all samples that may be stored."""
        return int(self._offsets[self.num_storable])

    @property
    def own_bytes(self) -> int:
        """Of the samples that this rank's file has for sure."""
        return int(self._sizes[self._own].sum())

    def num_bytes(self) -> int:
        """Of the samples that the files of all ranks have, also of ranks of an earlier start; read from the disk."""
        return sum(int(self._sizes[self._read_done(rank)].sum()) for rank in self._ranks())

    # --- reading ---------------------------------------------------------------------------------------------

    def _path(self, rank: int, suffix: str) -> Path:
        return self._folder / f"rank-{rank:05d}.{suffix}"

    def _ranks(self) -> list[int]:
        """Whose files are there."""
        return sorted(int(path.stem.removeprefix("rank-")) for path in self._folder.glob(f"{_RANK_FILES}.done"))

    def _read_done(self, rank: int) -> np.ndarray:  # [samples] bool
        """Which samples a rank's file has; none where it cannot be told."""
        nothing, num = np.zeros(len(self._sizes), dtype=bool), len(self._sizes)
        try:
            bits = np.fromfile(self._path(rank, "done"), dtype=np.uint8)
            size = self._path(rank, "bin").stat().st_size
        except OSError:
            return nothing
        if len(bits) != -(-num // 8):
            return nothing
        done = np.unpackbits(bits, count=num).astype(bool)
        # Somebody has cut or exchanged the file.
        return done & (self._offsets[1:] <= size)

    def refresh(self) -> None:
        """See what all ranks have stored. Others' files show what was there when they last called :meth:`sync`."""
        # Opened anew: a network file system looks then what others have written.
        self._close_readers()
        self._rank_of.fill(-1)
        for rank in self._ranks():
            self._rank_of[self._read_done(rank) & (self._rank_of < 0)] = rank

    def read(self, indices: Sequence[int]) -> Tensor | None:
        """[tokens, bytes] uint8 of the samples one behind the other; None if one is not there, or cannot be read."""
        ranks = self._rank_of[list(indices)]
        if (ranks < 0).any():
            return None
        found = np.empty(int(self._sizes[list(indices)].sum()), dtype=np.uint8)
        start = 0
        for index, rank in zip(indices, ranks.tolist(), strict=True):
            end = start + int(self._sizes[index])
            if not self._read_into(found[start:end].data, rank, int(self._offsets[index])):
                self._rank_of[index] = -1  # Computed from now on, and stored again.
                self._own[index] = False
                return None
            start = end
        return torch.from_numpy(found).view(len(found) // self._token_bytes, self._token_bytes)

    def _read_into(self, target: memoryview, rank: int, offset: int) -> bool:
        try:
            descriptor = self._open.get(rank)
            if descriptor is None:
                if len(self._open) >= _MAX_OPEN:
                    self._close_readers()
                descriptor = self._open[rank] = os.open(self._path(rank, "bin"), os.O_RDONLY)
            while len(target):
                num_read = os.preadv(descriptor, [target], offset)
                if not num_read:
                    return False
                target, offset = target[num_read:], offset + num_read
        except OSError:
            return False
        return True

    # --- writing ---------------------------------------------------------------------------------------------

    def is_wanted(self, index: int) -> bool:
        """Whether this rank shall store a sample: it may be, nobody has it, and the disk still takes something."""
        is_new = self._rank_of[index] < 0 and not self._own[index] and not self._unsynced[index]
        return bool(is_new and index < self.num_storable and self.problem is None)

    def write(self, samples: Mapping[int, Tensor]) -> int:
        """Store samples, [length, bytes] uint8 on the host each; how many the disk took (see ``problem``)."""
        num_written = 0
        try:
            self._keep_reserve(int(self._sizes[list(samples)].sum()))
            for index, rows in samples.items():
                self._write(index, rows)
                num_written += 1
        except OSError as error:
            self.problem = error
        if self._unsynced_bytes >= _SYNC_BYTES:
            self.sync()
        return num_written

    def _keep_reserve(self, num_bytes: int) -> None:
        """Raise OSError if so many bytes more would take of the reserve. Other ranks, and others, write meanwhile."""
        if not self._reserve_bytes:
            return
        disk = os.statvfs(self._folder)
        if disk.f_bavail * disk.f_frsize - num_bytes < self._reserve_bytes:
            raise OSError(errno.ENOSPC, "what is left of the disk stays free for checkpoints and metrics")

    def _write(self, index: int, rows: Tensor) -> None:
        data = rows.contiguous().numpy().data.cast("B")
        assert len(data) == self._sizes[index]
        offset = int(self._offsets[index])
        if self._writes is None:
            self._writes = os.open(self._path(self._rank, "bin"), os.O_WRONLY | os.O_CREAT, 0o666)
        while len(data):
            written = os.pwrite(self._writes, data, offset)
            data, offset = data[written:], offset + written
        self._unsynced[index] = True
        self._unsynced_bytes += int(self._sizes[index])

    def sync(self) -> None:
        """Wait until what was written is on the disk, and say so in the file beside it."""
        if self._writes is None or not self._unsynced.any():
            return
        try:
            os.fsync(self._writes)
            done = self._own | self._unsynced
            atomic_write_bytes(self._path(self._rank, "done"), np.packbits(done).tobytes())
        except OSError as error:
            # Nobody knows what of it is there.
            self.problem = error
        else:
            self._own = done
        self._unsynced[:] = False
        self._unsynced_bytes = 0

    # --- ending ----------------------------------------------------------------------------------------------

    def _close_readers(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def close(self) -> None:
        """Close all files; what was not synced is not believed by anybody."""
        self._close_readers()
        if self._writes is not None:
            os.close(self._writes)
            self._writes = None


def num_storable(lengths: Sequence[int], token_bytes: int, max_bytes: int | None) -> int:
    """How many samples, from the first one on, have room in ``max_bytes``; None: all."""
    if max_bytes is None:
        return len(lengths)
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64) * token_bytes)
    return int(np.searchsorted(ends, max_bytes, side="right"))


def stored_bytes(folder: Path) -> int:
    """What the files of a store take of the disk, without their holes; 0 where there is none."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(f"{_RANK_FILES}.bin"))


def rank_files(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that are called like those of a store."""
    return sorted(path.name for end in ("bin", "done") for path in folder.glob(f"{_RANK_FILES}.{end}"))


def remove_store(folder: Path) -> None:
    """Delete all ranks' files; the maps first, so that nothing is believed that is half deleted."""
    for pattern in (f".{_RANK_FILES}.done.*.tmp", f"{_RANK_FILES}.done", f"{_RANK_FILES}.bin"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
