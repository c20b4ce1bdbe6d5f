"""Where is the base that a calibration has trained and kept, when may it be written, and who loads it?

Without ``selection.full_calibration.keep_weights_in`` a run has one base, ``model.name_or_path``. With it, calibration
starts from that one and writes another, which everything later belongs to: selection, checkpoints, adapter.
"""

import dataclasses
from pathlib import Path

from launcher.config import RunConfig
from launcher.run_folder import RunFolder, check_can_write_in, is_filled, kept_folder
from models.base_identity import base_identity
from models.loading import ModelConfig
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json
from sparse_zero.selection.selection import Selection

_FIELD = "selection.full_calibration.keep_weights_in"


def kept_model(config: RunConfig) -> ModelConfig:
    """What to load where the kept weights are the base."""
    return dataclasses.replace(config.model, name_or_path=str(kept_folder(config)), revision=None, gguf_file=None)


def model_of(config: RunConfig, identity: BaseIdentity | None) -> ModelConfig:
    """Which of the run's bases to load for an adapter.

    Args:
        config: the run.
        identity: of the adapter's base; None where it is not known, or no adapter is loaded.

    Returns:
        The kept base if it is that one, else ``config.model``, for the caller to compare.
    """
    kept = kept_folder(config)
    if identity is None or kept is None or not is_filled(kept) or base_identity(kept).sha256 != identity.sha256:
        return config.model
    return kept_model(config)


def earlier_selection(config: RunConfig, folder: RunFolder) -> Selection | None:
    """The selection of a start of this run that ended after calibration had kept its weights, and before a checkpoint.

    Args:
        config: the run, which :func:`launcher.run_folder.check_same_run` has found to be that of the folder.
        folder: of the run.
    """
    kept = kept_folder(config)
    if kept is None or not is_filled(kept) or not folder.selection.is_file() or config.checkpoint.resume == "never":
        return None
    return Selection.load(folder.selection)


def begin_kept(config: RunConfig, folder: RunFolder) -> None:
    """Note in the run folder, if it is there, that the kept base is being written.

    A start that is killed before it has saved the selection, too, leaves a base that nobody can use; the next one may
    then replace it.
    """
    kept = kept_folder(config)
    if kept is not None and folder.config.is_file():
        atomic_write_json(folder.kept_base, {"folder": str(kept.absolute())})


def _is_left_over(kept: Path, folder: RunFolder) -> bool:
    """Whether what lies in ``kept`` is of a start of this run that was killed before its selection was saved."""
    if folder.selection.is_file() or not folder.kept_base.is_file():
        return False
    noted = read_json(folder.kept_base, strict=True)
    return isinstance(noted, dict) and noted.get("folder") == str(kept.absolute())


def check_kept(config: RunConfig, folder: RunFolder | None, *, resumes: bool) -> None:
    """Raise unless the kept base can be written, or, where the run has it already, be read.

    Args:
        config: the run.
        folder: of the run; None where none is written to.
        resumes: whether there is a checkpoint to continue from.

    Raises:
        InputError: the folder is not empty, cannot be written, or is gone.
    """
    kept = kept_folder(config)
    if kept is None:
        return
    if resumes:
        if not is_filled(kept):
            raise InputError(
                f"{_FIELD} is {kept}, where the run that is continued has its base, and there is none: put it back, or "
                "start in another output.folder"
            )
    elif not is_filled(kept):
        check_can_write_in(kept, f"{_FIELD} is {kept}")
    elif folder is None or (earlier_selection(config, folder) is None and not _is_left_over(kept, folder)):
        raise InputError(
            f"{_FIELD} is {kept}, which is not empty: name a new folder, or delete this one; to train from weights "
            "that it holds, name it as model.name_or_path, and their selection as selection.file"
        )


def check_is_base_of(selection: Selection, base: BaseIdentity) -> None:
    """Raise unless ``base``, as it lies in the kept folder, is what ``selection`` was made for.

    Raises:
        InputError: names both.
    """
    made_for = selection.metadata.get("base") or {}
    if made_for.get("sha256") != base.sha256:
        raise InputError(
            f"{_FIELD} holds the base {base.name} ({base.sha256[:12]}), and the selection of this run was made for "
            f"another ({str(made_for.get('sha256'))[:12]}): delete both output.folder and that folder to start anew"
        )
