"""How are retired entries stored beside the values of a checkpoint or an adapter?

``retired.safetensors``, only where there are some: of each parameter ``<name>/positions`` (ascending places in its
memory, int32 where they fit) and ``<name>/numbers`` (fp32, in the form of the placement that the header names).
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sparse_zero.checkpoint.headers import CheckpointHeader, check_belongs
from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors, write_safetensors
from sparse_zero.layers.retired import Retired, RetiredEntries
from sparse_zero.zero.config import Placement

FORMAT = "sparse_zero.retired"
FILE_NAME = "retired.safetensors"
_LARGEST_INT32 = torch.iinfo(torch.int32).max
# Of positions and numbers.
_DTYPES = ((torch.int32, torch.float32), (torch.int64, torch.float32))


def write_retired(folder: Path, retired: Retired, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file into ``folder``, with ``metadata``; none without retired entries."""
    if not retired.entries:
        return
    tensors = {}
    for name, entries in retired.entries.items():
        fits = int(entries.positions[-1]) <= _LARGEST_INT32
        tensors[f"{name}/positions"] = entries.positions.to(torch.int32 if fits else torch.int64)
        tensors[f"{name}/numbers"] = entries.numbers
    write_safetensors(folder / FILE_NAME, tensors, {**(metadata or {}), "format": FORMAT})


def read_retired(folder: Path, placement: Placement, header: CheckpointHeader | None = None) -> Retired:
    """Read what :func:`write_retired` wrote; empty where it wrote nothing.

    Args:
        folder: of a checkpoint or an adapter.
        placement: whose form the numbers have.
        header: of the checkpoint, to which the file must belong.

    Raises:
        InputError: the file is damaged, or of another checkpoint.
    """
    if not (folder / FILE_NAME).is_file():
        return Retired(placement=placement)
    tensors, metadata = read_safetensors(folder / FILE_NAME, FORMAT)
    if header is not None:
        check_belongs(metadata, header, folder / FILE_NAME)
    entries = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        positions, numbers = tensors.get(f"{name}/positions"), tensors.get(f"{name}/numbers")
        if positions is None or numbers is None or positions.shape != numbers.shape or positions.shape == (0,):
            raise InputError(f"{folder / FILE_NAME} has no number for each position of {name}: use another copy")
        dtypes = (positions.dtype, numbers.dtype)
        if (
            positions.dim() != 1
            or dtypes not in _DTYPES
            or int(positions[0]) < 0
            or bool((positions.diff() <= 0).any())
        ):
            raise InputError(f"{folder / FILE_NAME} has no ascending positions of {name}: use another copy")
        entries[name] = RetiredEntries(positions=positions.to(torch.int64), numbers=numbers.float())
    return Retired(placement=placement, entries=entries)
