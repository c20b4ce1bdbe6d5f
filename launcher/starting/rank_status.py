"""Where, and in which form, does a rank say how far it is? See :mod:`launcher.pulse`, which writes it."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of a status: it is written over, in one call, so that a reader never sees half of it.
STATUS_BYTES = 1024


def status_file(folder: Path, rank: int) -> Path:
    """The file of a rank's status in the folder of its node's guard."""
    return folder / f"rank-{rank}.status"


def write_status(descriptor: int, status: Mapping[str, Any]) -> None:
    """Write a status into its open file; on a full disk nothing, which is told by those who have something to save."""
    text = json.dumps(status).encode()
    assert len(text) <= STATUS_BYTES, text
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, text.ljust(STATUS_BYTES), 0)


def read_status(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank says; None before it has said anything."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(status_file(folder, rank).read_bytes())
        return found if isinstance(found, dict) else None
    return None
