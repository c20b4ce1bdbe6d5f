"""How does a folder of files appear on disk complete or not at all, and how is it checked when read?"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, follow_umask, sync, sync_names

if TYPE_CHECKING:
    from sparse_zero.checkpoint.headers import ManifestEntry

MANIFEST = "manifest.json"
# What a killed writer leaves: of a folder (part of a new one, an old one moved aside) or of a file.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe would be waited for, a device never ends.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def clear_leftovers(parent: Path, names: str) -> list[str]:
    """Remove what killed writers left in ``parent``, and put back old folders that they had moved aside.

    Nobody may be writing there.

    Args:
        parent: of the folders, or files, that were written.
        names: regular expression of their names; others' leftovers stay.

    Returns:
        The names of what was put back.
    """
    put_back = []
    # "old" before "tmp": what lay there before is kept where nothing has taken its place yet.
    for path in sorted(parent.glob(".*.old")) + sorted(parent.glob(".*.tmp")):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or not re.fullmatch(names, found["name"]):
            continue
        if found["kind"] == "old" and not (parent / found["name"]).exists():
            os.replace(path, parent / found["name"])
            put_back.append(found["name"])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return put_back


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write sizes and hashes of ``files``, which lie in ``folder``."""
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    atomic_write_json(folder / MANIFEST, {"files": entries})


@contextmanager
def new_folder(folder: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; when the block ends well, it takes the place of ``folder``.

    A manifest of sizes and hashes is added, unless the folder is for others' programs. An older folder of that name
    is replaced; a reader finds the old or the new one, or (between two renames) none, never a part. Files and names
    have reached the disk when this returns. When the block raises, nothing changes; what a killed process leaves is
    cleared by the next writer of the same folder. One writer at a time.

    Raises:
        InputError: ``folder`` is a file, or holds what no manifest of this kind describes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder.parent, re.escape(folder.name))
    if folder.exists() and (not folder.is_dir() or (manifest and not _may_replace(folder))):
        raise InputError(f"{folder} exists and was not written by this program: name another folder, or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        follow_umask(temporary)
        if manifest:
            write_manifest(temporary, _files_in(temporary))
        for path in _files_in(temporary):
            sync(path)
        sync_names(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_names(folder.parent)
    with suppress(OSError):
        # What cannot be removed at once must not be taken for a folder that is to be put back.
        os.replace(old, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Move away what lies where ``folder`` is to be written and has no manifest: a damaged copy, say.

    It is called ``damaged-NAME.NUMBER`` then. Nothing happens where there is a manifest, or nothing at all.
    """
    if os.path.lexists(folder) and not (folder / MANIFEST).is_file():
        number = 1
        while os.path.lexists(aside := folder.with_name(f"damaged-{folder.name}.{number}")):
            number += 1
        os.replace(folder, aside)


def moved_aside(folder: Path) -> Path | None:
    """Where a save that was killed while it replaced ``folder`` has left the old one; None: nowhere."""
    leftovers = {path: _LEFTOVER.fullmatch(path.name) for path in folder.parent.glob(".*.old")}
    found = [path for path, match in leftovers.items() if match is not None and match["name"] == folder.name]
    return None if folder.exists() or not found else found[0]


def remove_folder(folder: Path) -> None:
    """Delete what :func:`new_folder` made: at once for every reader, whatever interrupts it.

    Raises:
        OSError: it could not be moved aside; it is as it was then.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _may_replace(folder: Path) -> bool:
    """Whether ``folder`` is empty or of the kind that :func:`new_folder` writes."""
    return (folder / MANIFEST).is_file() or not any(folder.iterdir())


def check_folder(folder: Path, what: str, *, reads: Collection[str] = ()) -> dict[str, ManifestEntry]:
    """Raise unless every file of the manifest is there, inside of the folder, with its size and hash.

    Other files may lie beside them; they are not read.

    Args:
        folder: what :func:`new_folder` wrote.
        what: it is, for errors.
        reads: names of files that the caller reads: where one exists, the manifest must list it.

    Returns:
        What the manifest says of each of its files, by name.

    Raises:
        InputError: names the first file that is missing, differs, or lies elsewhere.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is no {what}: it has no {MANIFEST}; name the folder that a run has written")
    from sparse_zero.checkpoint.headers import parse_manifest, path_inside, read_header  # heavy: torch

    manifest_path = path_inside(folder, MANIFEST)
    files = parse_manifest(read_header(manifest_path), manifest_path)
    for name in reads:
        if name not in files and os.path.lexists(folder / name):
            raise InputError(f"{manifest_path} does not list {name}: the {what} is damaged; use another copy")
    for name, entry in files.items():
        path = path_inside(folder, name)
        if not path.is_file():
            raise InputError(f"{path} is missing from the {what}: copy the folder again, or use an older one")
        try:
            num_bytes = path.stat().st_size
            is_same = num_bytes == entry.num_bytes and file_sha256(path) == entry.sha256
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        if num_bytes != entry.num_bytes:
            raise InputError(
                f"{path} has {num_bytes} bytes instead of {entry.num_bytes}: the {what} is cut off; "
                "copy the folder again, or use an older one"
            )
        if not is_same:
            raise InputError(f"{path} does not have the content that was written: the {what} is damaged; use another")
    return files
