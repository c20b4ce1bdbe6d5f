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


@contextmanager
def new_folder(folder: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; when the block ends well, it takes the place of ``folder``.

    A manifest of sizes and hashes is added, unless the folder is for others' programs. An older folder of that name
    is replaced; a reader finds the old or the new one, or (between two renames) none, never a part. When the block
    raises, nothing changes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
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
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with suppress(OSError):  # Some network file systems cannot sync a folder.
        descriptor = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_folder(folder: Path, what: str) -> None:
    """Raise unless every file of the manifest is there, with its size and hash.

    Raises:
        InputError: names the first file that is missing or differs.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is no {what}: it has no {MANIFEST}; name the folder that a run has written")
    for name, entry in read_json(folder / MANIFEST)["files"].items():
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
