"""How are retired entries stored beside the values of a checkpoint or an adapter?

``retired.safetensors``, only where there are some: of each parameter ``<name>/positions`` (ascending places in its
memory, int32 where they fit) and ``<name>/numbers`` (fp32, in the form of the placement that the header names).
"""

from pathlib import Path

import torch

from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors, write_safetensors
from sparse_zero.layers.retired import Retired, RetiredEntries
from sparse_zero.zero.config import Placement

FORMAT = "sparse_zero.retired"
FILE_NAME = "retired.safetensors"
_LARGEST_INT32 = torch.iinfo(torch.int32).max


def write_retired(folder: Path, retired: Retired) -> None:
    """Write the file into ``folder``; none without retired entries."""
    if not retired.entries:
        return
    tensors = {}
    for name, entries in retired.entries.items():
        fits = int(entries.positions[-1]) <= _LARGEST_INT32
        tensors[f"{name}/positions"] = entries.positions.to(torch.int32 if fits else torch.int64)
        tensors[f"{name}/numbers"] = entries.numbers
    write_safetensors(folder / FILE_NAME, tensors, {"format": FORMAT})


def read_retired(folder: Path, placement: Placement) -> Retired:
    """Read what :func:`write_retired` wrote; empty where it wrote nothing.

    Args:
        folder: of a checkpoint or an adapter.
        placement: whose form the numbers have.

    Raises:
        InputError: the file is damaged.
    """
    if not (folder / FILE_NAME).is_file():
        return Retired(placement=placement)
    tensors, _ = read_safetensors(folder / FILE_NAME, FORMAT)
    entries = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        positions, numbers = tensors.get(f"{name}/positions"), tensors.get(f"{name}/numbers")
        if positions is None or numbers is None or positions.shape != numbers.shape or not len(positions):
            raise InputError(f"{folder / FILE_NAME} has no number for each position of {name}: use another copy")
        entries[name] = RetiredEntries(positions=positions.to(torch.int64), numbers=numbers.float())
    return Retired(placement=placement, entries=entries)
