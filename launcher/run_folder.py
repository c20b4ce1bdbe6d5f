"""What lies in a run folder, and which run is it?"""

import fcntl
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.config import RunConfig, parse_config, resolved_yaml
from launcher.yaml_files import parse_yaml, read_mapping
from sparse_zero.checkpoint.folders import MANIFEST, remove_folder
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_text

# Sections and settings in which a start may differ from the run that it continues: they change how it runs and what
# is measured, not what is learned. (Stored state is converted to another ZeRO stage or placement. A prefix_cache at
# bfloat16 or float8 rounds what later epochs read: as much a choice of the start as the kernels are.)
FREE_KEYS = (
    "checkpoint",
    "output",
    "cluster",
    "batch",
    "memory",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.loss_chunk",
    "training.kernels",
    "training.region_kernels",
    "training.max_nonfinite_steps",
    "training.validation_every",
    "training.prefix_cache",
    "data.validation",
    "data.validation_split",
    "zero.stage",
    "zero.options",
    "zero.config",
    "zero.placement",
    "zero.offload_optimizer",
    "zero.offload_base",
    "zero.nvme_path",
)


SELECTION_NAME, SCORES_NAME = "selection.safetensors", "scores.safetensors"
# Of the folders of checkpoints, and of the files that point to some of them: a regular expression.
_STEP_NAME = r"step-\d+"
CHECKPOINT_NAMES = rf"{_STEP_NAME}|latest|best"


def scores_beside(selection: Path) -> Path:
    """Where the scores lie that belong to a selection file outside of a run folder."""
    return selection.with_name(f"{selection.name.removesuffix('.safetensors')}.{SCORES_NAME}")


class RunFolder:
    """Paths of one run."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = self.path / "config.yaml"
        self.selection = self.path / SELECTION_NAME
        # Of all candidates, which the selection was chosen by.
        self.scores = self.path / SCORES_NAME
        # Where this run has begun to write a base of its own.
        self.kept_base = self.path / "kept_base.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.evaluation = self.path / "evaluation"
        # Mean losses on data.forgetting.
        self.forgetting = self.evaluation / "forgetting.json"
        # What each rank has written; see launcher.starting.rank_logs.
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"
        # Measured, forecast and simulated; see launcher.memory.report.
        self.memory = self.path / "memory.json"
        # Hidden states of the training data, while it is trained; see launcher.prefix_caching.
        self.prefix_cache = self.path / "prefix_cache"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_folders(self) -> list[Path]:
        """Everything that is called like a checkpoint, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if re.fullmatch(_STEP_NAME, path.name) and path.is_dir()]
        return sorted(found, key=lambda path: step_of(path.name))

    def complete_checkpoints(self) -> list[Path]:
        """Folders that were committed whole, oldest first."""
        return [path for path in self.checkpoint_folders() if (path / MANIFEST).is_file()]

    def mark_latest(self, checkpoint: Path, keep: int, best: Path | None = None) -> None:
        """Point ``checkpoints/latest`` to a committed checkpoint, and delete what came before its ``keep`` newest.

        Counted are the checkpoints up to this one: neither it nor a later one is ever deleted, nor the best one, to
        which ``checkpoints/best`` points, where there is one. Nobody reads the pointers but people.
        """
        atomic_write_text(self.checkpoints / "latest", checkpoint.name + "\n")
        if best is not None:
            atomic_write_text(self.checkpoints / "best", best.name + "\n")
        else:
            (self.checkpoints / "best").unlink(missing_ok=True)
        complete = [path for path in self.complete_checkpoints() if step_of(path.name) <= step_of(checkpoint.name)]
        for old in complete[:-keep]:
            if best is None or old.name != best.name:
                with suppress(OSError):  # The next one tries again.
                    remove_folder(old)

    def size_of(self, folder: Path) -> int:
        """Bytes of all files below ``folder``; 0 if there is none."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


class RunLock:
    """Keeps other starts out of a run folder until it is released, or its process ends in whatever way.

    A network file system that knows no locks keeps nobody out.

    Args:
        folder: the run folder, which need not exist yet; or another that only one process may work in.
        given: what the user has said, for the start of the message.
        holder: who else may have it.
    """

    def __init__(self, folder: Path, given: str = "output.folder", holder: str = "another start of a run") -> None:
        self._folder, self._given, self._holder = folder, given, holder
        # Of the folder itself: no file is left behind.
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the folder, if it is there and not taken by this lock already.

        Raises:
            InputError: another start has it.
        """
        if self._descriptor is not None or not self._folder.is_dir():
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(
                f"{self._given} {self._folder} is in use by {self._holder}: wait until it has ended, or name another "
                "folder"
            ) from error
        except OSError:
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_in_use(folder: Path) -> bool:
    """Whether another process has the lock of ``folder``; asked by taking it for a moment."""
    with RunLock(folder) as lock:
        try:
            lock.take()
        except InputError:
            return True
    return False


def step_of(name: str) -> int:
    """Optimizer steps that the checkpoint of this folder name comes after."""
    return int(name.removeprefix("step-"))


def kept_folder(config: RunConfig) -> Path | None:
    """The folder of the base that the run's calibration makes; None if it makes none."""
    named = config.selection.keeps_weights_in
    return None if named is None else Path(named).expanduser()


def is_filled(folder: Path) -> bool:
    """Whether there is something at ``folder``: a file, or a folder that is not empty."""
    return os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))


def check_writable(folder: RunFolder) -> None:
    """Raise unless the run folder, or the nearest parent that exists, is a folder in which files can be made.

    Raises:
        InputError: names the file in the way, or the folder that does not allow it.
    """
    check_can_write_in(folder.path, f"output.folder is {folder.path}")


def check_can_write_in(folder: Path, given: str) -> None:
    """Raise unless files can be made in ``folder``, which need not exist and is not created.

    Args:
        folder: where something is to be written.
        given: what the user has said, for the start of the message: "--out is a/b".

    Raises:
        InputError: names the file in the way, or the folder that does not allow it.
    """
    existing = next(parent for parent in [folder, *folder.absolute().parents] if os.path.exists(parent))
    if not existing.is_dir():
        raise InputError(f"{given}, but {existing} is a file: name another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{given}, but {existing} is not writable for this user: name another place")


def check_out_file(out: Path, option: str = "--out") -> None:
    """Raise unless a file ``out`` can be written; an older file there will be replaced.

    Raises:
        InputError: it is a folder, or :func:`check_can_write_in` refuses the folder of it.
    """
    if out.is_dir():
        raise InputError(f"{option} is {out}, which is a folder: name a file, in it or elsewhere")
    check_can_write_in(out.parent, f"{option} is {out}")


def check_new_file(out: Path, option: str = "--out") -> None:
    """Raise unless a file ``out`` can be written and nothing is there yet: people edit scripts by hand.

    Raises:
        InputError: something is there, or :func:`check_out_file` refuses it.
    """
    check_out_file(out, option)
    if os.path.lexists(out):
        raise InputError(f"{option} is {out}, which is there already: remove it, or name another file")


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r} and is now {new!r}"


def check_same_run(folder: RunFolder, config: RunConfig) -> None:
    """Raise unless the folder is new or holds this very run (up to :data:`FREE_KEYS`).

    Raises:
        InputError: names the first setting that differs, or the run's config if it is damaged.
    """
    if not folder.config.is_file():
        return
    kept = kept_folder(config)
    is_calibrated = kept is not None and is_filled(kept) and folder.selection.is_file()
    if not folder.complete_checkpoints() and not folder.summary.is_file() and not is_calibrated:
        return  # Nothing was trained yet: the folder may be taken over.
    try:
        old = read_mapping(folder.config)
    except InputError as error:
        raise InputError(
            f"{error}; it says which run output.folder {folder.path} holds: restore it, or name another folder"
        ) from error
    with suppress(InputError):  # Settings that are younger than the run had their defaults.
        old = parse_yaml(resolved_yaml(parse_config(old, "the run's config", type(config))), "the run's config")
    new = parse_yaml(resolved_yaml(config), "the config")
    for key in FREE_KEYS:
        _remove(old, key)
        _remove(new, key)
    difference = _first_difference(old, new)
    if difference:
        raise InputError(
            f"output.folder {folder.path} holds another run ({difference}): name another folder, or delete this one"
        )


def _remove(mapping: dict[str, Any], dotted: str) -> None:
    *sections, last = dotted.split(".")
    target: Any = mapping
    for section in sections:
        target = target.get(section) if isinstance(target, dict) else None
    if isinstance(target, dict):
        target.pop(last, None)
