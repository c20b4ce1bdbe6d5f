"""What is told of a run that the machine has ended: a disk that takes no more, or ranks that are gone?"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from launcher.summary import format_bytes

_DISK_ERRORS = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the user's quota is used up",
    errno.EFBIG: "a file would be larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost the file",
}
# As safetensors says it, whose errors are no OSError.
_NUMBER_IN_TEXT = re.compile(r"\(os error (\d+)\)")
# What gloo says in a plain RuntimeError; NCCL and the store have classes of their own.
_LOST = re.compile(r"gloo/transport|Connection (?:closed|reset) by peer|Broken pipe|Socket closed")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def describe_disk_error(error: BaseException, folder: Path) -> str | None:
    """One line about a file that could not be written: where, why, the space there, the remedy; None: another error.

    Args:
        error: what was raised, or what came of it.
        folder: what is written into; named where the error names no file.
    """
    for each in _chain(error):
        found = _NUMBER_IN_TEXT.search(str(each)) if not isinstance(each, OSError) else None
        number = each.errno if isinstance(each, OSError) else int(found[1]) if found else None
        if number not in _DISK_ERRORS:
            continue
        named = each.filename if isinstance(each, OSError) else None
        place = folder if named is None else Path(os.fsdecode(named))
        existing = next(parent for parent in [place, *place.absolute().parents] if parent.exists())
        free = format_bytes(shutil.disk_usage(existing).free)
        return (
            f"writing to {place} failed: {_DISK_ERRORS[number]} ({free} free in {existing}). What was complete before "
            "is still there: make room, or move it to a place that has some, and start again to continue"
        )
    return None


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error says that another rank has gone: the cause is told by that one, or by who started it."""
    return any(
        isinstance(each, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError))
        or (isinstance(each, RuntimeError) and _LOST.search(str(each)) is not None)
        for each in _chain(error)
    )
