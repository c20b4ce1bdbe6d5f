"""Where does a start continue: from which checkpoint, which newer ones are passed over, and why?"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.config import RunConfig
from launcher.run_folder import CHECKPOINT_NAMES, RunFolder, step_of
from models.gather import gather_json
from sparse_zero.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sparse_zero.checkpoint.folders import MANIFEST, clear_leftovers, file_sha256
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.fields import FieldError, Fields

_LARGEST = float(2**127)


class CheckpointWarning(UserWarning):
    """A checkpoint of the run is not continued from, although it is newer than the one that is."""


def find_start(folder: RunFolder, config: RunConfig) -> Path | None:
    """The checkpoint to continue from by name, or None for a start from the base. Nothing in it is read.

    A run that was started from another run's checkpoint, and has written some of its own since, continues from those.

    Raises:
        InputError: resume is never and the folder has checkpoints; or it names no complete checkpoint, or one of this
            folder after which the run went on.
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
    newest = complete[-1] if complete else None
    if resume == "auto":
        return newest
    path = Path(resume)
    is_own = path.resolve().parent == folder.checkpoints.resolve()
    if newest is not None and not is_own:
        return newest
    if not (path / MANIFEST).is_file():
        raise InputError(f"checkpoint.resume is {resume}: no complete checkpoint there; name a step-… folder, or auto")
    if is_own:
        later = folder.summary if folder.summary.is_file() else newest
        if later is not None and later.resolve() != path.resolve():
            # What came later would be mixed with what comes now, in the metrics and among the checkpoints.
            raise InputError(
                f"checkpoint.resume is {resume}, but the run in output.folder {folder.path} went on after it "
                f"({later}): name another output.folder, or delete what is later"
            )
    return path


def _look(folder: RunFolder) -> dict[str, str | None]:
    """By name of each folder that is called like a checkpoint: the hash of its manifest; None: it has none to read."""
    found: dict[str, str | None] = {}
    for path in folder.checkpoint_folders():
        found[path.name] = None
        with suppress(OSError):
            found[path.name] = file_sha256(path / MANIFEST)
    return found


def read_run_checkpoint(folder: Path) -> Checkpoint:
    """A verified checkpoint that a run has written: one that tells where in the run it is.

    Raises:
        InputError: see :func:`~sparse_zero.checkpoint.checkpoint.read_checkpoint`; or another program wrote it.
    """
    checkpoint = read_checkpoint(folder)
    fields = Fields(checkpoint.extra, "its extra")
    try:
        fields.whole("step")
        for name in ("tokens", "seconds", "final_loss"):
            if checkpoint.extra.get(name) is not None:
                fields.number(name, -_LARGEST if name == "final_loss" else 0.0, _LARGEST)
    except FieldError as error:
        raise InputError(f"{folder} does not tell where in a run it is ({error}): name one that a run wrote") from error
    return checkpoint


def _ranks_in_words(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _newest_good(folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint that every rank reads whole; None where there are none at all. Collective.

    Raises:
        InputError: there are some, and no rank or not all ranks can read any.
    """
    everyone: list[dict[str, str | None]] = gather_json(_look(folder))
    blind = [rank for rank, seen in enumerate(everyone) if not seen]
    if len(blind) == len(everyone):
        return None
    if blind:
        raise InputError(
            f"output.folder {folder.path} has no checkpoint where {_ranks_in_words(blind)} see it, and some where "
            "others do: put output.folder on a file system that all nodes share"
        )
    passed_over: list[str] = []
    for name in sorted({name for seen in everyone for name in seen}, key=step_of, reverse=True):
        of_ranks = [seen.get(name) for seen in everyone]
        reference = next((each for each in of_ranks if each is not None), None)
        others = [rank for rank, each in enumerate(of_ranks) if each is None or each != reference]
        checkpoint, reason = None, ""
        if reference is None:
            reason = f"it has no {MANIFEST}"
        elif others:
            reason = f"it is missing or another one where {_ranks_in_words(others)} see output.folder"
        else:
            problem = None
            try:
                checkpoint = read_run_checkpoint(folder.checkpoints / name)
            except InputError as error:
                problem = str(error)
            reason = next((each for each in gather_json(problem) if each is not None), "")
        if not reason:
            _tell(folder, name, passed_over)
            return checkpoint
        passed_over.append(f"{name}: {reason}")
    raise InputError(
        f"none of the checkpoints in {folder.checkpoints} can be continued from ({'; '.join(passed_over)}): restore "
        "one, or delete them to start anew"
    )


def _tell(folder: RunFolder, name: str, passed_over: Sequence[str]) -> None:
    for reason in passed_over:
        warnings.warn(
            f"checkpoint {reason}; continuing from {folder.checkpoints / name} instead", CheckpointWarning, stacklevel=4
        )


def clear_interrupted(folder: RunFolder) -> None:
    """Remove what killed starts left among the checkpoints, and put back what they had moved aside.

    For the rank that writes there, before anybody looks.
    """
    if folder.checkpoints.is_dir():
        with suppress(OSError):  # A folder that cannot be written is found out where something is to be.
            clear_leftovers(folder.checkpoints, CHECKPOINT_NAMES)


def choose_start(folder: RunFolder, config: RunConfig) -> Checkpoint | None:
    """The verified checkpoint to continue from, the same on all ranks; None for a start from the base. Collective.

    With ``checkpoint.resume: auto`` it is the newest that all ranks can read, and a :class:`CheckpointWarning` names
    each newer one and what is wrong with it. One that the config names is never replaced by another.

    Raises:
        InputError: see :func:`find_start`; or no checkpoint can be read.
    """
    with failing_together():
        named = find_start(folder, config)
    if config.checkpoint.resume == "auto":
        return _newest_good(folder)
    with failing_together():
        return None if named is None else read_run_checkpoint(named)
