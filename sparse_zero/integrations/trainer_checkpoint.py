"""What does a Trainer with the callback store and load in the place of its own files, which would be pickles?

``checkpoint-<step>/`` holds what :func:`sparse_zero.save_checkpoint` writes (scheduler, options of the optimizer's
groups and gradient scaler in its ``extra``), ``adapter/``, and the Trainer's own ``trainer_state.json`` and
``training_args.json``. It appears at once.
"""

import json
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_zero.checkpoint.adapter import read_adapter, save_adapter
from sparse_zero.checkpoint.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from sparse_zero.checkpoint.conversion import convert_values, originals_by_name
from sparse_zero.checkpoint.folders import MANIFEST, clear_leftovers, remove_folder, set_aside
from sparse_zero.checkpoint.random_states import RandomStates, RandomStatesWarning, states_of_rank
from sparse_zero.collectives import collective_device, failing_together, of_rank_zero, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json, write_safetensors
from sparse_zero.integrations import trainer_compat
from sparse_zero.integrations.loop_state import (
    ADAPTER_FOLDER,
    check_scheduler,
    loop_folder,
    loop_state,
    reading,
    scheduler_state,
    set_loop_state,
)
from sparse_zero.layers.carriers import carriers
from sparse_zero.layers.sparsify import placement_of, selection_of, trainable_parameters
from sparse_zero.zero.compat import full_numel, has_shards
from sparse_zero.zero.optimizer_state import optimizer_step_count, set_step_count
from sparse_zero.zero.state import TrainingState, write_training_state

STATE, ARGUMENTS = "trainer_state.json", "training_args.json"
# In the ``extra`` of the checkpoint.
_SECTION = "trainer"
# Written by the Trainer's handler of SIGTERM before it saves, and removed afterwards.
_INCOMPLETE = "checkpoint-is-incomplete.txt"
# Names in a checkpoint of ours.
_OURS = {
    "adapter",
    "checkpoint.json",
    "manifest.json",
    "masters.safetensors",
    "moments.safetensors",
    "random.safetensors",
    "retired.safetensors",
    "selection.safetensors",
    STATE,
    ARGUMENTS,
    _INCOMPLETE,
}
_SECRET = re.compile(r"(.*_)?(token|password|secret|api_key)", re.IGNORECASE)


class PassedOverWarning(UserWarning):
    """The newest checkpoint cannot be continued from, and an older one is; the message says why."""


class OtherBatchWarning(UserWarning):
    """A step means another number of samples than it did in the checkpoint that is continued from."""


def _without_secrets(value: Any, name: str = "") -> Any:
    """``value`` with the texts under names of secrets taken out, as the Trainer does on the first level."""
    if isinstance(value, dict):
        return {key: _without_secrets(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_secrets(entry, name) for entry in value]
    return f"<{name.upper()}>" if isinstance(value, str) and _SECRET.fullmatch(name) else value


def write_arguments(arguments: Any, folder: Path) -> None:
    """Write ``TrainingArguments`` as JSON; of what JSON does not hold, what it calls itself."""
    plain = json.loads(json.dumps(arguments.to_dict(), default=str))
    atomic_write_json(folder / ARGUMENTS, _without_secrets(plain))


def _samples_per_step(trainer: Any) -> int:
    """Samples between two optimizer steps, over all ranks."""
    return int(trainer.get_total_train_batch_size(trainer.args))


def _extra(trainer: Any, engine: Any) -> dict[str, Any]:
    """What the Trainer's loop needs besides the checkpoint."""
    return {
        _SECTION: {
            "scheduler": scheduler_state(trainer.lr_scheduler),
            **loop_state(engine, trainer_compat.scaler_of(trainer)),
            "samples_per_step": _samples_per_step(trainer),
        }
    }


def _make_way(folder: Path) -> None:
    """Let a checkpoint take the place of what is no whole one there: a damaged one gets a name of its own."""
    incomplete = folder / _INCOMPLETE
    if incomplete.is_file() and [*folder.iterdir()] == [incomplete]:
        incomplete.unlink()  # This checkpoint is whole as soon as it is there.
    elif folder.is_dir() and any(folder.iterdir()):
        set_aside(folder)


def save(trainer: Any, engine: Any) -> None:
    """Write the checkpoint of the present step, and remove old ones. Collective.

    What is damaged in its place is called ``damaged-checkpoint-<step>.<number>`` then.
    """
    args, folder = trainer.args, trainer_compat.checkpoint_folder(trainer)
    trainer.store_flos()
    trainer_compat.note_best_checkpoint(trainer, folder)
    with failing_together():
        if rank_and_world_size()[0] == 0:
            _make_way(folder)
    extra = None if args.save_only_model else _extra(trainer, engine)
    with loop_folder(folder, engine, extra=extra) as into:
        if into is not None:
            trainer_compat.write_trainer_state(trainer, into / STATE)
            write_arguments(args, into)
    if rank_and_world_size()[0] == 0:
        best = trainer.state.best_model_checkpoint
        _remove_old(Path(args.output_dir), args.save_total_limit, {folder, folder if best is None else Path(best)})


def _remove_old(output: Path, limit: int | None, keep: set[Path]) -> None:
    """Keep ``limit`` checkpoints, the newest, and ``keep`` among them. Each one goes at once, as it came.

    Damaged ones do not count, and stay.
    """
    if limit is None or limit <= 0:
        return
    present = [folder for folder in trainer_compat.checkpoints_in(output) if (folder / MANIFEST).is_file()]
    kept = {folder.resolve() for folder in keep}
    old = [folder for folder in present if folder.resolve() not in kept]
    for folder in old[: max(0, len(present) - max(limit, len(keep)))]:
        with suppress(OSError):  # On this rank alone; the next one tries again.
            remove_folder(folder)


def check_output_folder(output: Path) -> None:
    """Refuse checkpoints of another program in the place of ours now, not when the first one would be replaced.

    What killed writers have left of ours under names of their own is removed; damaged checkpoints of ours stay, see
    :func:`save`. Collective; nobody may be writing there.

    Raises:
        InputError: names the first of them.
    """
    with failing_together():
        if rank_and_world_size()[0] != 0:
            return
        clear_leftovers(output, r"checkpoint-\d+")
        for folder in trainer_compat.checkpoints_in(output):
            names = {path.name for path in folder.iterdir()}
            if MANIFEST not in names and not names <= _OURS:
                raise InputError(
                    f"{folder} was not written with SparseZeroCallback, and would be in the way: name another "
                    "output_dir, or remove it"
                )


def _read(folder: Path) -> Checkpoint:
    """A verified checkpoint that a Trainer can continue from. Not collective.

    Raises:
        InputError: no checkpoint, one with pickles, one without the optimizer's state, or a damaged one.
    """
    if not folder.is_dir():
        raise InputError(
            f"no checkpoint folder {folder}: check the path; where nodes have no common file system, copy it to each"
        )
    names = {path.name for path in folder.iterdir()}
    if MANIFEST not in names and names <= _OURS:
        raise InputError(f"{folder} is no whole checkpoint, for it has no {MANIFEST}: use another copy, or another one")
    if not (folder / "checkpoint.json").is_file():
        if (folder / ADAPTER_FOLDER / "adapter.json").is_file():
            raise InputError(
                f"{folder} has an adapter and no state of the optimizer (save_only_model): start anew from "
                f"sz.load_adapter(model, {str(folder / ADAPTER_FOLDER)!r}, trainable=True)"
            )
        raise InputError(
            f"{folder} was not written with SparseZeroCallback, and pickles are not read: start anew, or name another"
        )
    checkpoint = read_checkpoint(folder)
    if _SECTION not in checkpoint.extra or STATE not in read_json(folder / MANIFEST)["files"]:
        raise InputError(f"{folder} was not written inside a Trainer: load it with sz.load_checkpoint in its own loop")
    trainer_compat.check_state(read_json(folder / STATE), folder / STATE)
    return checkpoint


def _newest(output: Path) -> Checkpoint:
    """The newest checkpoint in a Trainer's output folder that can be continued from. Not collective.

    Raises:
        InputError: there is none; the message says what is wrong with the newest.
    """
    errors: list[str] = []
    for path in reversed(trainer_compat.checkpoints_in(output)):
        try:
            checkpoint = _read(path)
        except InputError as error:
            errors.append(str(error))
            continue
        if errors:
            warnings.warn(f"continuing from {path}; passed over: {'; '.join(errors)}", PassedOverWarning, stacklevel=2)
        return checkpoint
    raise InputError(errors[0] if errors else f"no checkpoint in {output}: name one, or start anew")


def choose(trainer: Any, wanted: str | Path | bool) -> Checkpoint:
    """The verified checkpoint to continue from, on every rank the same: the named one; with True the newest good one.

    Collective.

    Raises:
        InputError: there is none; a named one is never replaced by another.
    """
    output = Path(trainer.args.output_dir)
    is_first = rank_and_world_size()[0] == 0
    step = torch.zeros(1, dtype=torch.int64)
    with failing_together():
        if not isinstance(wanted, bool):
            checkpoint = _read(Path(wanted))
        elif is_first:
            checkpoint = _newest(output)
            step.fill_(int(checkpoint.folder.name.rpartition("-")[2]))
    if isinstance(wanted, bool) and dist.is_initialized():
        step = step.to(collective_device())
        dist.broadcast(step, src=0)
        with failing_together():
            if not is_first:
                checkpoint = _read(output / f"checkpoint-{int(step)}")
    return checkpoint


def load(trainer: Any, engine: Any, checkpoint: Checkpoint) -> RandomStates | None:
    """Go on from a checkpoint that :func:`choose` has verified. Collective.

    Returns:
        This rank's random states, for which the Trainer's time comes later; None from another number of ranks.

    Raises:
        InputError: it is of another selection, base, optimizer or schedule.
    """
    folder = checkpoint.folder
    stored = checkpoint.extra[_SECTION]
    with reading(folder):
        check_scheduler(trainer.lr_scheduler, stored["scheduler"], folder)
        then, now = int(stored["samples_per_step"]), _samples_per_step(trainer)
    load_checkpoint(engine, checkpoint)
    schedulers = [(trainer.lr_scheduler, stored["scheduler"])]
    set_loop_state(engine, trainer_compat.scaler_of(trainer), stored, schedulers, folder)
    if now != then:
        warnings.warn(
            f"a step of {folder} has {then} samples, and now {now}: the data are skipped by "
            "steps, so that some come twice or never; set gradient_accumulation_steps so that they agree",
            OtherBatchWarning,
            stacklevel=2,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomStatesWarning)  # It has been said.
        return states_of_rank(checkpoint.read_random_states(), folder)


def load_best(trainer: Any, engine: Any) -> None:
    """Put the best checkpoint's values into masters and weights. Collective; rank 0 alone needs the folder."""
    folder, model = Path(trainer.state.best_model_checkpoint) / ADAPTER_FOLDER, engine.module
    masters = {name: torch.empty(full_numel(values)) for name, values in trainable_parameters(model).items()}
    with failing_together():
        if rank_and_world_size()[0] == 0:
            adapter = read_adapter(folder)
            if adapter.selection != selection_of(model):
                raise InputError(f"{folder} has another selection than the model: remove it, and start anew")
            found = convert_values(adapter.values, originals_by_name(model), adapter.placement, placement_of(model))
            masters = {name: found[name].float() for name in masters}
    masters = {name: of_rank_zero(values) for name, values in masters.items()}
    step = optimizer_step_count(engine)
    # Without states of the optimizer, which keeps those of the last step.
    write_training_state(engine, TrainingState(masters=masters, moments={}, step=0))
    set_step_count(engine, step)


def save_model(trainer: Any, engine: Any, folder: Path) -> None:
    """Write ``adapter/``, or after :func:`sparse_zero.merge` a plain model; with tokenizer and arguments. Collective.

    Args:
        trainer: whose model it is.
        engine: the engine over the model; None before training.
        folder: what else it holds stays.

    Raises:
        InputError: the model was merged in ZeRO-3's shards.
    """
    model, is_writer = trainer.model, rank_and_world_size()[0] == 0
    is_sparse = any(True for _ in carriers(model))
    if is_sparse:
        save_adapter(model if engine is None else engine, folder / ADAPTER_FOLDER)
    elif has_shards(model):
        raise InputError(
            "the merged model is in ZeRO-3's shards, which save_model does not gather: save the adapter before "
            "merging, load it into a base loaded anew, and merge there"
        )
    with failing_together():
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not is_sparse and hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        elif not is_sparse:
            write_safetensors(folder / "model.safetensors", model.state_dict(), {"format": "pt"})
        trainer_compat.save_processing_class(trainer, folder)
        write_arguments(trainer.args, folder)
