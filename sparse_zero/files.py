"""How are files written so that a reader finds the old one or the new one, never a part, and read whoever wrote them?

What is read may come from anywhere: sizes, depths and the numbers of entries are bounded before a parser sees them, and
what does not hold is an :class:`~sparse_zero.errors.InputError`.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import stat
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Of a whole JSON file: answers to some hundred thousand questions. Python's objects take up to 30 times as much memory.
MAX_JSON_BYTES = 256 * 2**20
# Lists and objects inside of each other. Ours have 5; recursive readers of what is parsed are safe up to hundreds.
MAX_JSON_DEPTH = 64
# Of safetensors: the header (the format's own limit is 100 MB), how many tensors, and dimensions of one.
MAX_TENSORS_HEADER_BYTES, MAX_TENSORS, MAX_DIMENSIONS = 64 * 2**20, 1_000_000, 8
# Entries of a tensor, and what JSON's whole numbers are kept below in strict reading.
_MAX_ENTRIES, _MAX_INTEGER = 2**53, 2**63
# Bytes of an entry, by the format's name for the dtype; no other occurs in a file of ours.
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def sync(path: Path) -> None:
    """Wait until ``path``, a file or the names in a folder, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Wait until the names in a folder have reached the disk, where its file system can say so."""
    with suppress(OSError):  # Some network file systems cannot sync a folder; the files in it are complete.
        sync(folder)


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
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def _mode_of_files(folder: Path) -> int:
    """The mode that the umask, or the folder's own rules, give a new file there.

    By making one: the umask can only be read by setting it, for all threads.
    """
    probe = folder / f".mode.{os.getpid()}.{threading.get_ident()}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # File systems without modes.
            path.chmod(mode)


def follow_umask(folder: Path) -> None:
    """Give all files below ``folder``, which was made with ``mkdir``, the modes that the umask grants.

    Others write for the owner alone, or copy modes: safetensors makes every file with 0600, whatever the umask.
    """
    usual, of_folders = _mode_of_files(folder), stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        is_run = not path.is_dir() and path.stat().st_mode & stat.S_IXUSR
        _set_mode(path, of_folders if path.is_dir() else usual | (of_folders & 0o111 if is_run else 0))


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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A file to read, and its size; neither a folder nor a pipe or device, which could go on for ever.

    Raises:
        InputError: it cannot be read.
    """
    try:
        # A pipe without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:  # A name that no file can have.
        raise InputError(f"{str(path)!r} cannot be read ({error}): check the path") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(f"{path} cannot be read (it is no regular file): check the path")
    with open(descriptor, "rb") as file:
        try:
            yield file, status.st_size
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): check the disk") from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a file that has at most ``max_bytes``.

    Raises:
        InputError: the file is missing, unreadable or larger.
    """
    with _opened(path) as (file, size):
        data = file.read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(data) > max_bytes:
        raise InputError(f"{path} has {max(size, len(data)):,} bytes, more than the {max_bytes:,} that it may have")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:100]!r} stands twice")
        found[name] = value
    return found


def _check_json(value: Any, strict: bool) -> None:
    """Raise ValueError for what is nested too deeply or, if ``strict``, no other JSON reader would take."""
    left = [(value, 0)]
    while left:
        entry, depth = left.pop()
        if isinstance(entry, (dict, list)):
            if depth >= MAX_JSON_DEPTH:
                raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep")
            left += [(each, depth + 1) for each in (entry.values() if isinstance(entry, dict) else entry)]
            if isinstance(entry, dict) and strict:
                "".join(entry).encode()  # A lone half of a surrogate pair raises.
        elif strict and isinstance(entry, str):
            entry.encode()
        elif strict and isinstance(entry, float) and not math.isfinite(entry):
            raise ValueError("a number is infinite or NaN")
        elif strict and isinstance(entry, int) and abs(entry) >= _MAX_INTEGER:
            raise ValueError("a whole number has more than 63 bits")


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """The content of a JSON text, at most :data:`MAX_JSON_DEPTH` levels deep.

    Args:
        text: bytes are UTF-8.
        strict: refuse what our writers never write: keys that stand twice, NaN, infinities, whole numbers beyond 63
            bits, text that has no UTF-8.

    Raises:
        ValueError: it is none.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_unique if strict else None)
    except RecursionError as error:
        raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep") from error
    _check_json(value, strict)
    return value


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, strict: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        max_bytes: what it may have at most.
        strict: see :func:`parse_json`.

    Raises:
        InputError: the file is missing, unreadable, too large or no JSON.
    """
    data = read_bytes(path, max_bytes)
    try:
        return parse_json(data, strict=strict)
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}): restore or delete it") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and text metadata to ``path`` in one step."""
    from safetensors.torch import save_file  # heavy: torch

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, str(temporary), metadata=dict(metadata))
        _set_mode(temporary, _mode_of_files(path.parent))


class TensorEntry(NamedTuple):
    """One tensor in the header of a safetensors file."""

    # As the format names it: F32, BF16, ...
    dtype: str
    shape: tuple[int, ...]
    # Of its first byte, and the one after its last, behind the header.
    begin: int
    end: int


def _tensor_entry(name: str, entry: Any) -> TensorEntry:
    """A checked entry of a header; ValueError for anything else."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {name[:100]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"the tensor {name[:100]!r} has the dtype {str(dtype)[:100]!r}")
    whole = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in whole):
        raise ValueError(f"the tensor {name[:100]!r} has a shape or offsets that are no counts")
    # Sizes of zero as one: strides must not overflow either.
    extent = math.prod(max(size, 1) for size in shape) if len(shape) <= MAX_DIMENSIONS else _MAX_ENTRIES
    if len(offsets) != 2 or extent >= _MAX_ENTRIES:
        raise ValueError(f"the tensor {name[:100]!r} has a shape or offsets that no tensor has")
    if math.prod(shape) * _ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"the tensor {name[:100]!r} has a shape of another size than its bytes")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of a safetensors file, by its header alone, which is checked against the file's size.

    Raises:
        InputError: the file is missing, cut off, or its header is not what the format asks for.
    """
    try:
        with _opened(path) as (file, size):
            prefix = file.read(8)
            num_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if num_bytes > size - 8:
                raise ValueError(f"{size} bytes, of which the header would take {num_bytes}")
            if num_bytes > MAX_TENSORS_HEADER_BYTES:
                raise ValueError(f"a header of {num_bytes} bytes, more than {MAX_TENSORS_HEADER_BYTES}")
            header = parse_json(file.read(num_bytes), strict=True)
        if not isinstance(header, dict) or len(header) > MAX_TENSORS + 1:
            raise ValueError("a header that is no object, or has too many tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are no texts")
        entries = {name: _tensor_entry(name, entry) for name, entry in header.items()}
        end = 0
        for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end:
                raise ValueError("tensors that overlap, or leave bytes between them")
            end = entry.end
        if 8 + num_bytes + end != size:
            raise ValueError(f"{size} bytes, where its header needs {8 + num_bytes + end}")
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no complete safetensors file ({error}): copy or create it again") from error
    return entries, metadata


def read_safetensors(path: Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a file whose metadata say ``format: file_format``.

    The tensors are in memory of their own: whatever becomes of the file afterwards, they stay what was read.

    Raises:
        InputError: the file is missing, cut off, no safetensors file, or of another format.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file: check the path")
    _, metadata = read_safetensors_header(path)
    if metadata.get("format") != file_format:
        raise InputError(
            f"{path} has format {metadata.get('format')!r}, not {file_format!r}: name a file of that format"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            # What safetensors gives is a view of the mapped file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no complete safetensors file ({error}): copy or create it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
