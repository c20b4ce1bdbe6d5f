"""Which private parts of transformers' Trainer are relied on, and for which of its versions were they read?

A Trainer hands itself to no callback, and stores and loads by methods of its own that no callback can stop. So these
methods of the class are wrapped once: a Trainer with the callback goes to ours, every other one to its own, as before.
A class derived from Trainer that overrides one of them and calls ``super()`` (TRL's do) works on.

All uses of names that transformers does not document are here. ``tests/integrations/test_trainer_compat.py`` says what
broke when a new version changes one of them.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from sparse_zero.errors import InputError
from sparse_zero.optional import require

# Where the methods below were read.
READ_IN = "5.23.0"
# Methods that are wrapped, with their parameters.
METHODS = {
    "train": ("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "save_model": ("self", "output_dir", "_internal_call"),
    # Makes engine, optimizer and scheduler, and loads into them what it is told to continue from, if anything.
    "_prepare_for_training": ("self", "max_steps", "train_dataloader", "resume_from_checkpoint"),
    # Before that, without DeepSpeed.
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    # After that, when the data have been skipped.
    "_load_rng_state": ("self", "checkpoint"),
    "_load_best_model": ("self",),
    "_save_checkpoint": ("self", "model", "trial"),
}
_MARK = "_sparse_zero_wrapped"


def library(module: str) -> ModuleType:
    """A module of what a Trainer needs, imported now."""
    return require(module, extra="trl", purpose="train inside a Trainer")


def check_version() -> None:
    """Refuse a transformers whose Trainer has other methods than those that were read.

    Raises:
        InputError: names the method and both versions.
    """
    trainer = library("transformers.trainer").Trainer
    for name, parameters in METHODS.items():
        method = getattr(trainer, name, None)
        if method is None or tuple(inspect.signature(method).parameters) != parameters:
            raise InputError(
                f"transformers {library('transformers').__version__} has no Trainer.{name}({', '.join(parameters)}) as "
                f"{READ_IN} has, so that SparseZeroCallback cannot store what it trains: "
                f"pip install 'transformers=={READ_IN}'"
            )


def wrap_methods(owner_of: Callable[[Any], Any], ours: Mapping[str, Callable[..., Any]]) -> None:
    """Let Trainers that belong to somebody call ``ours`` in the place of their own methods. Once more does nothing.

    Args:
        owner_of: of a Trainer; None: it keeps its own.
        ours: for each of :data:`METHODS`, ``f(owner, own method bound to the Trainer, the Trainer, *arguments)``.

    Raises:
        InputError: see :func:`check_version`.
    """
    trainer = library("transformers.trainer").Trainer
    if vars(trainer).get(_MARK):
        return
    check_version()

    def wrapped(own: Callable[..., Any], our: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def choose(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = owner_of(self)
            if owner is None:
                return own(self, *args, **kwargs)
            return our(owner, partial(own, self), self, *args, **kwargs)

        return choose

    for name in METHODS:
        setattr(trainer, name, wrapped(getattr(trainer, name), ours[name]))
    setattr(trainer, _MARK, True)


def callbacks_of(trainer: Any) -> list[Any]:
    """All callbacks of a Trainer, in their order; none while it is made."""
    handler = getattr(trainer, "callback_handler", None)
    return [] if handler is None else list(handler.callbacks)


def scaler_of(trainer: Any) -> Any:
    """The gradient scaler of fp16 without DeepSpeed; None where nothing is scaled."""
    return getattr(trainer.accelerator, "scaler", None)


def checkpoint_folder(trainer: Any) -> Path:
    """Where a Trainer puts the checkpoint of its present step."""
    prefix = library("transformers.trainer_utils").PREFIX_CHECKPOINT_DIR
    return Path(trainer.args.output_dir) / f"{prefix}-{trainer.state.global_step}"


def note_best_checkpoint(trainer: Any, folder: Path) -> None:
    """Let the Trainer's state say so, if the checkpoint that is being written is the best one."""
    state = trainer.state
    if state.best_global_step and state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(folder)


def write_trainer_state(trainer: Any, file: Path) -> None:
    """Write the Trainer's state with that of its callbacks."""
    exportable = library("transformers.trainer_callback").ExportableState
    found: dict[str, list[Any]] = {}
    for each in [*callbacks_of(trainer), trainer.control]:
        if isinstance(each, exportable):
            found.setdefault(type(each).__name__, []).append(each.state())
    for name, states in found.items():
        trainer.state.stateful_callbacks[name] = states if len(states) > 1 else states[0]
    trainer.state.save_to_json(str(file))


def check_state(stored: Any, source: Path) -> None:
    """Refuse what is no state of a Trainer, which makes one of it without a check of its own.

    Raises:
        InputError: a field is missing, unknown, or no number of steps.
    """
    state = library("transformers.trainer_callback").TrainerState
    fields = {field.name for field in dataclasses.fields(state)}
    steps = stored.get("global_step") if isinstance(stored, dict) else None
    if not isinstance(steps, int) or steps < 0 or not stored.keys() <= fields:
        raise InputError(f"{source} is no state of a Trainer as {READ_IN} of transformers writes it: use another")


def checkpoints_in(output: Path) -> list[Path]:
    """Folders with a checkpoint's name, by their step."""
    prefix = library("transformers.trainer_utils").PREFIX_CHECKPOINT_DIR
    found = [
        (int(name[1]), path)
        for path in output.glob(f"{prefix}-*")
        if path.is_dir() and (name := re.fullmatch(rf"{prefix}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def save_processing_class(trainer: Any, folder: Path) -> None:
    """Write the tokenizer, or what else the Trainer was given to prepare data with."""
    found = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if found is not None:
        found.save_pretrained(folder)
