"""How are files written so that a reader finds the old one or the new one, never a part?"""

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_zero.errors import InputError


def _sync(path: Path) -> None:
    """Wait until ``path``, a file or a folder, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, it takes the place of ``path``.

    The content has reached the disk before the name changes. When the block raises, ``path`` is as it
    was and the temporary file is gone. One writer at a time: two in one process would share the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # Some network file systems cannot sync a folder; the file itself is complete.
        _sync(path.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step. Missing parent folders are created."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, data: str) -> None:
    """Write ``data`` as UTF-8 to ``path`` in one step, line ends unchanged."""
    atomic_write_bytes(path, data.encode("utf-8"))


def _finite(value: object) -> object:
    """``value`` in JSON's own types, with null for every number that JSON cannot say."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_finite(entry) for entry in value]
    raise TypeError(f"{type(value).__name__} is no JSON value")


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON text of ``value``; infinities and NaN become null, so that every JSON reader accepts it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def atomic_write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON to ``path`` in one step; non-finite numbers become null."""
    atomic_write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}): restore or delete it") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and text metadata to ``path`` in one step."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, str(temporary), metadata=dict(metadata))


def read_safetensors(path: Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a file whose metadata say ``format: file_format``.

    Raises:
        InputError: the file is missing, cut off, no safetensors file, or of another format.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file: check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != file_format:
                raise InputError(
                    f"{path} has format {metadata.get('format')!r}, not {file_format!r}: name a file of that format"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no complete safetensors file ({error}): copy or create it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
