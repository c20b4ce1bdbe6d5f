"""Which base model is this, by the content of its files?"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from models.weight_files import weight_files
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json


def default_hash_cache() -> Path:
    """The file in the user's cache that remembers the hashes of large files."""
    return Path("~/.cache/sparse_zero/hashes.json").expanduser()


def base_identity(
    folder: Path, gguf_file: str | None = None, *, head: str | None = None, cache: Path | None = None
) -> BaseIdentity:
    """The identity of the base model in a folder: a hash over its weight files and ``config.json``.

    Two folders with the same files have the same hash, wherever they lie and whatever else they hold. The
    name is the folder's, or the hub name when the folder is a snapshot of the hub client. Reading the files
    takes about a second per gigabyte; their hashes are remembered by path, size and time of change.

    Args:
        folder: a model folder.
        gguf_file: name of the GGUF file in it that holds the weights, if that is what is loaded.
        head: of :func:`models.heads.head_text`: what a head is made from that the files lack, which makes another base.
        cache: where hashes are remembered; None is the user's cache. A cache that cannot be read or written
            is not used.

    Raises:
        InputError: the folder has no weights, or a file cannot be read.
    """
    files = weight_files(folder, gguf_file)
    if (folder / "config.json").is_file():
        files.append(folder / "config.json")
    cache = cache or default_hash_cache()
    known = _read_cache(cache)
    num_known = len(known)
    lines = sorted(f"{file.name} {_file_hash(file, known)}\n" for file in files)
    lines += [] if head is None else [head]
    if len(known) > num_known:
        _write_cache(cache, known)
    return BaseIdentity(name=_name(folder), sha256=hashlib.sha256("".join(lines).encode()).hexdigest())


def begin_base_identity(
    folder: Path, gguf_file: str | None = None, *, head: str | None = None, cache: Path | None = None
) -> Callable[[], BaseIdentity]:
    """Begin to find :func:`base_identity` in a thread, and return what waits for it and gives it, or raises as it does.

    Hashing leaves the interpreter to others, and what it reads first from the disk is in memory for whoever loads the
    weights. The thread keeps no process alive.
    """
    found: list[BaseIdentity | BaseException] = []

    def work() -> None:
        try:
            found.append(base_identity(folder, gguf_file, head=head, cache=cache))
        except BaseException as error:  # raised where it is waited for
            found.append(error)

    thread = threading.Thread(target=work, name="base identity", daemon=True)
    thread.start()

    def wait() -> BaseIdentity:
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    return wait


def _file_hash(file: Path, known: dict[str, str]) -> str:
    try:
        real = file.resolve()
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}"
        if key not in known:
            with real.open("rb") as stream:
                known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check the file") from error
    return known[key]


def _read_cache(cache: Path) -> dict[str, str]:
    try:
        content = read_json(cache)
    except InputError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str) and len(value) == 64}


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    try:
        # Another process may have written since: what it found is kept too.
        atomic_write_json(cache, _read_cache(cache) | known)
    except OSError:
        return  # a read-only home; the hash is right without being remembered


def _name(folder: Path) -> str:
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":  # models--owner--name/snapshots/<commit>
        parts = resolved.parent.parent.name.split("--")
        if parts[0] == "models" and len(parts) > 1:
            return "/".join(parts[1:])
    return resolved.name
