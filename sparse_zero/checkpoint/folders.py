"""How does a folder of files appear on disk complete or not at all, and how is it checked when read?"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json

MANIFEST = "manifest.json"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_files(folder: Path) -> None:
    """Wait until every file below ``folder`` has reached the disk."""
    for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # Some network file systems cannot sync a folder.
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed writer of ``folder`` left, and put back an old folder it had moved aside."""
    for old in folder.parent.glob(f".{folder.name}.*.old"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, folder)
    for part in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_folder(folder: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; when the block ends well, it takes the place of ``folder``.

    A manifest of sizes and hashes is added, unless the folder is for others' programs. An older folder of that name
    is replaced; a reader finds the old or the new one, or (between two renames) none, never a part. When the block
    raises, nothing changes; what a killed process leaves is cleared by the next writer of the same folder. One writer
    at a time.

    Raises:
        InputError: ``folder`` is a file, or holds what no manifest of this kind describes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    if folder.exists() and (not folder.is_dir() or (manifest and not _may_replace(folder))):
        raise InputError(f"{folder} exists and was not written by this program: name another folder, or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        if manifest:
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            entries = {
                str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in files
            }
            atomic_write_json(temporary / MANIFEST, {"files": entries})
        _sync_files(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _may_replace(folder: Path) -> bool:
    """Whether ``folder`` is empty or of the kind that :func:`new_folder` writes."""
    return (folder / MANIFEST).is_file() or not any(folder.iterdir())


def check_folder(folder: Path, what: str) -> None:
    """Raise unless every file of the manifest is there, with its size and hash.

    Raises:
        InputError: names the first file that is missing or differs.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is no {what}: it has no {MANIFEST}; name the folder that a run has written")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()
    ):
        raise InputError(f"{folder / MANIFEST} is no manifest: the {what} is damaged; use another")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing from the {what}: copy the folder again, or use an older one")
        if path.stat().st_size != entry["bytes"]:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}: the {what} is cut off; "
                "copy the folder again, or use an older one"
            )
        if file_sha256(path) != entry["sha256"]:
            raise InputError(f"{path} does not have the content that was written: the {what} is damaged; use another")
