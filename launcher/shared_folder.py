"""Do all ranks see the same run folder, and what is done where nodes have disks of their own?

Every rank puts a file of its own where the run folder is or will be, and looks whose files it sees: ranks that see the
same share a folder. Host names and what launchers say of nodes are not asked: containers, batch systems and
mounts make them wrong.

Where there are several folders, the first rank of each keeps a whole copy of what a start needs: the config, the
selection, the metrics and the checkpoints. A start continues from the newest whole checkpoint that any of them has: its
bytes travel to the others first. So any node may be lost, and any other be the first one.
"""

import time
import uuid
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from launcher.config import RunConfig
from launcher.resuming import read_run_checkpoint
from launcher.run_folder import RunFolder, check_writable, kept_folder
from launcher.world import World
from models.gather import gather_json
from sparse_zero.checkpoint.folders import MANIFEST, file_sha256, new_folder
from sparse_zero.collectives import collective_device, failing_together
from sparse_zero.errors import InputError

# A file system that needs longer to show a new file to other nodes is not one to share a run folder on.
_PATIENCE_SECONDS, _POLL_SECONDS = 3.0, 0.2
# Of a file, in one broadcast.
_PIECE_BYTES = 1 << 26


class OwnFoldersWarning(UserWarning):
    """The run folder is not the same on all nodes: each keeps checkpoints of its own."""


def folders_of_ranks(folder: Path, setting: str = "output.folder") -> list[int]:
    """For each rank, the first rank that sees the same ``folder``, which need not exist. Collective.

    The nearest parent that exists is tried, and is afterwards as it was.

    Args:
        folder: on each rank, of the same name.
        setting: that names it, for the error.

    Raises:
        InputError: a rank cannot write there.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())
    rank = dist.get_rank()
    name = gather_json(uuid.uuid4().hex)[0]
    parents = gather_json(str(existing))
    mark = existing / f".sparse-zero-{name}-{rank}"
    try:
        with failing_together():
            try:
                mark.touch(exist_ok=False)
            except OSError as error:
                raise InputError(
                    f"{setting} is {folder}, but a file cannot be made in {existing} ({error.strerror}): name "
                    "another place"
                ) from error
        # Only ranks that found the same place can share it.
        others = [other for other, parent in enumerate(parents) if parent == str(existing)]
        first = _first_seen([existing / f".sparse-zero-{name}-{other}" for other in others])
        return [int(found) for found in gather_json(others[first])]
    finally:
        with suppress(OSError):
            mark.unlink()


def _first_seen(marks: Sequence[Path]) -> int:
    """Which of the files is the first that is seen, at the latest one's own.

    Each is asked for by its name, and for the first time when it is there: a network file system may answer from an
    old listing of the folder, or remember that there was no such file.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        found = next(number for number, mark in enumerate(marks) if mark.exists())
        if found == 0 or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_SECONDS)


def find_folders(config: RunConfig, world: World) -> World:
    """``world`` with its copies of the run folder found. Collective; what it writes is gone afterwards.

    Raises:
        InputError: ``output.shared`` is true and the folder is not; or the run keeps weights, which only one has.
    """
    folder = Path(config.output.folder)
    if world.world_size == 1:
        return world
    with failing_together():
        check_writable(RunFolder(folder))
    first = folders_of_ranks(folder)
    if not any(first):
        return world
    others = [rank for rank, keeper in enumerate(first) if keeper]
    where = f"output.folder {folder.absolute()} of ranks {', '.join(map(str, others))} is not that of rank 0"
    if config.output.shared is True:
        raise InputError(
            f"output.shared is true, but {where}: put it on a file system that all nodes share, or set output.shared "
            "to auto, which keeps a copy of the checkpoints on each node"
        )
    kept = kept_folder(config)
    if kept is not None:
        raise InputError(
            f"selection.full_calibration.keep_weights_in is {kept}, but {where}, and only one node would have the "
            "weights: use a file system that all nodes share, or select first and name selection.file"
        )
    if config.output.shared == "auto":
        warnings.warn(
            f"{where}: each node keeps a copy of config, selection, metrics and checkpoints there, and rank 0's all "
            "else; output.shared: false says that this is meant",
            OwnFoldersWarning,
            stacklevel=2,
        )
    return replace(world, keepers=tuple(sorted(set(first))))


@dataclass(frozen=True)
class _Newest:
    """The newest whole checkpoint of one copy."""

    name: str
    step: int
    # Of its manifest, hence of all its bytes.
    digest: str


def _newest(folder: RunFolder) -> _Newest | None:
    for path in reversed(folder.complete_checkpoints()):
        with suppress(InputError, OSError):  # A damaged one; `choose_start` names it.
            checkpoint = read_run_checkpoint(path)
            return _Newest(path.name, int(checkpoint.extra["step"]), file_sha256(path / MANIFEST))
    return None


def share_newest(folder: RunFolder, world: World) -> None:
    """Give every copy of the run folder the newest whole checkpoint of any. Collective; nothing where there is one.

    Raises:
        Exception: it cannot be read or written, on all ranks together.
    """
    if world.keepers == (0,):
        return
    found: _Newest | None = None
    with failing_together():
        if world.keeps_folder:
            found = _newest(folder)
    everyone = gather_json(None if found is None else [found.name, found.step, found.digest])
    having = [rank for rank in world.keepers if everyone[rank] is not None]
    if not having:
        return
    source = max(having, key=lambda rank: (everyone[rank][1], -rank))
    needing = [rank for rank in world.keepers if everyone[rank] != everyone[source]]
    if not needing:
        return
    checkpoint = folder.checkpoints / everyone[source][0]
    names: list[tuple[str, int]] = []
    with failing_together():
        if world.rank == source:
            names = [(path.name, path.stat().st_size) for path in sorted(checkpoint.iterdir()) if path.is_file()]
    files = [(str(name), int(size)) for name, size in gather_json(names)[source]]
    if world.is_main:
        print(
            f"sparse-zero: {checkpoint.name} travels from rank {source} to the copies of the run folder at ranks "
            f"{', '.join(map(str, needing))}",
            flush=True,
        )
    _copy(checkpoint, files, source, receives=world.rank in needing, is_source=world.rank == source)


def _copy(checkpoint: Path, files: Sequence[tuple[str, int]], source: int, *, receives: bool, is_source: bool) -> None:
    """Send the files of a checkpoint to the ranks that receive it. Collective."""
    received: dict[str, np.ndarray] = {}
    for name, size in files:
        whole = np.empty(size if receives else 0, dtype=np.uint8)
        with ExitStack() as stack:
            with failing_together():
                file = stack.enter_context((checkpoint / name).open("rb")) if is_source else None
            for start in range(0, size, _PIECE_BYTES):
                piece = torch.zeros(min(_PIECE_BYTES, size - start), dtype=torch.uint8)
                with failing_together():
                    if file is not None:
                        piece = torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8)
                travelling = piece.to(collective_device())
                dist.broadcast(travelling, src=source)
                if receives:
                    whole[start : start + len(piece)] = travelling.cpu().numpy()
        received[name] = whole
    with failing_together():
        if receives:
            # The manifest is that of the source: a reader compares every byte with it.
            with new_folder(checkpoint, manifest=False) as temporary:
                for name, content in received.items():
                    (temporary / name).write_bytes(content.tobytes())
