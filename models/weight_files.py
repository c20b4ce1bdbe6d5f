"""Which files of a model folder hold its weights, are they complete, and where in them is which tensor?"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_zero.errors import InputError
from sparse_zero.files import parse_json, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise :class:`InputError` naming the file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} instead of a JSON object: restore the file")
    return value


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: contiguous, row by row, little-endian."""

    path: Path
    # Of its first byte in the file.
    offset: int
    # As the format names it: F32, BF16, ...
    dtype: str
    shape: tuple[int, ...]


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file and check that the file is as long as the header says.

    Returns:
        tensor name -> ``{"dtype", "shape", "data_offsets"}``, without the metadata entry.

    Raises:
        InputError: the file is missing, cut off or not in the safetensors format.
    """
    return _read_header(path)[0]


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Where every tensor of safetensors files lies, by name; of two with one name, the later file's.

    Raises:
        InputError: a file is missing, cut off or not in the safetensors format.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        tensors, start = _read_header(path)
        try:
            for name, entry in tensors.items():
                found[name] = StoredTensor(
                    path=path,
                    offset=start + int(entry["data_offsets"][0]),
                    dtype=str(entry["dtype"]),
                    shape=tuple(int(size) for size in entry["shape"]),
                )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} has a damaged header ({name}): copy or download it again") from error
    return found


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors of :func:`read_safetensors_header`, and where in the file their bytes start."""
    broken = f"{path} is cut off or not a safetensors file"
    remedy = "copy or download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise InputError(f"{broken} ({size} bytes): {remedy}")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(f"{broken} (header of {header_bytes} bytes in a file of {size}): {remedy}")
            header = parse_json(file.read(header_bytes))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except InputError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{broken} (its header is damaged): {remedy}") from error
    if 8 + header_bytes + end != size:
        raise InputError(f"{broken} ({size} bytes where its header needs {8 + header_bytes + end}): {remedy}")
    return tensors, 8 + header_bytes


def weight_files(folder: Path, gguf_file: str | None = None) -> list[Path]:
    """List the files that hold the weights of a model folder, in name order.

    Raises:
        InputError: there are none, a shard is missing, or they are pickles.
    """
    if gguf_file is not None:
        path = folder / gguf_file
        if not path.is_file():
            raise InputError(f"model.gguf_file is {gguf_file!r}, which {folder} does not hold: check the name")
        return [path]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        return _shards(index)
    if any(any(folder.glob(pattern)) for pattern in PICKLES):
        raise InputError(
            f"{folder} has its weights as pickles only, which can run code when read: convert them to "
            "safetensors with save_pretrained on a machine that trusts them"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        raise InputError(f"{folder} has its weights as GGUF: set model.gguf_file, for example to {ggufs[0]!r}")
    raise InputError(f"{folder} holds no weights ({WEIGHTS} or {INDEX}): copy or download the model again")


def check_weights(folder: Path, gguf_file: str | None = None) -> list[Path]:
    """Like :func:`weight_files`, and check that every file is complete, without reading the tensors."""
    files = weight_files(folder, gguf_file)
    for path in files:
        if gguf_file is None:
            read_safetensors_header(path)
        else:
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise InputError(f"{path} is not a GGUF file: copy or download it again")
    return files


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: restore the file")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}, which is not a safetensors file of its folder: restore it")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent} lacks {name}, one of the {len(names)} files of its index: copy it again")
    return [index.parent / name for name in names]
