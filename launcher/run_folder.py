"""What lies in a run folder, which run is it, and where does a start continue?"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.config import RunConfig, resolved_yaml
from sparse_zero.checkpoint.folders import MANIFEST
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_text

# Sections in which a run may differ from the one that it continues: they do not change what is learned.
FREE_SECTIONS = ("checkpoint", "output", "cluster")


class RunFolder:
    """Paths of one run."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = self.path / "config.yaml"
        self.selection = self.path / "selection.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.evaluation = self.path / "evaluation"
        self.summary = self.path / "summary.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def complete_checkpoints(self) -> list[Path]:
        """Folders that were committed whole, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if re.fullmatch(r"step-\d+", path.name)]
        return sorted((path for path in found if (path / MANIFEST).is_file()), key=lambda path: int(path.name[5:]))

    def mark_latest(self, checkpoint: Path, keep: int) -> None:
        """Point ``checkpoints/latest`` to a committed checkpoint, then delete all but the ``keep`` newest."""
        atomic_write_text(self.checkpoints / "latest", checkpoint.name + "\n")
        for old in self.complete_checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def size_of(self, folder: Path) -> int:
        """Bytes of all files below ``folder``; 0 if there is none."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r} and is now {new!r}"


def check_same_run(folder: RunFolder, config: RunConfig) -> None:
    """Raise unless the folder is new or holds this very run (outputs, checkpoints and cluster aside).

    Raises:
        InputError: names the first setting that differs.
    """
    if not folder.config.is_file():
        return
    if folder.path.is_dir() and not folder.complete_checkpoints() and not folder.summary.is_file():
        return  # Nothing was trained yet: the folder may be taken over.
    old = yaml.safe_load(folder.config.read_text())
    new = yaml.safe_load(resolved_yaml(config))
    for section in FREE_SECTIONS:
        old.pop(section, None)
        new.pop(section, None)
    difference = _first_difference(old, new)
    if difference:
        raise InputError(
            f"output.folder {folder.path} holds another run ({difference}): name another folder, or delete this one"
        )


def find_start(folder: RunFolder, config: RunConfig) -> Path | None:
    """The checkpoint to continue from, or None for a start from the base.

    Raises:
        InputError: resume is never and the folder has checkpoints, or the named checkpoint does not exist.
    """
    resume = config.checkpoint.resume
    complete = folder.complete_checkpoints()
    if resume == "never":
        if complete:
            raise InputError(
                f"checkpoint.resume is 'never' and {folder.path} has checkpoints: name another output.folder, "
                "delete this one, or set checkpoint.resume to auto"
            )
        return None
    if resume == "auto":
        return complete[-1] if complete else None
    path = Path(resume)
    if not (path / MANIFEST).is_file():
        raise InputError(f"checkpoint.resume is {resume}: no complete checkpoint there; name a step-… folder, or auto")
    return path
