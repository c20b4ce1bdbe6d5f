"""How does a loop on accelerate store and load its state without pickles?

engine, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
attach_accelerator(accelerator)
...
accelerator.save_state("state")

accelerate's own ``save_state`` writes DeepSpeed's files before it calls any hook, and pickles the random states after
all of them, so that hooks cannot stop it. The two methods are replaced on the one Accelerator that is attached.

accelerate is imported when it is attached to, and nowhere else in the library. What it does not document and is used
here (``PRIVATE``) was read in its version 1.15.0; ``tests/integrations/test_accelerator.py`` says what broke when a new
version changes it.
"""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sparse_zero.checkpoint.checkpoint import load_checkpoint, read_checkpoint
from sparse_zero.checkpoint.folders import remove_folder
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.integrations.loop_state import (
    PlainEngine,
    check_scheduler,
    loop_folder,
    loop_state,
    reading,
    scheduler_state,
    set_loop_state,
)
from sparse_zero.integrations.plain_state import from_plain, to_plain
from sparse_zero.layers.sparsify import trainable_parameters, write_back
from sparse_zero.zero.config import Rounding
from sparse_zero.zero.engine import attach

PRIVATE = (
    "_models",
    "_optimizers",
    "_schedulers",
    "_dataloaders",
    "_custom_objects",
    "_save_model_state_pre_hook",
    "_load_model_state_pre_hook",
)
READ_IN = "1.15.0"
# In the ``extra`` of the checkpoint.
_SECTION = "accelerator"


def _check(accelerator: Any) -> None:
    """Refuse what cannot be stored, or written back. Raises :class:`InputError`."""
    missing = [name for name in PRIVATE if not hasattr(accelerator, name)]
    if missing:
        raise InputError(
            f"this version of accelerate has no Accelerator.{missing[0]}: pip install 'accelerate=={READ_IN}', or call "
            "sz.save_checkpoint(engine, folder) in place of save_state"
        )
    if len(accelerator._models) != 1 or len(accelerator._optimizers) != 1:
        raise InputError(
            f"the Accelerator has prepared {len(accelerator._models)} models and {len(accelerator._optimizers)} "
            "optimizers: attach after prepare(model, optimizer, ...), to one with one of each"
        )
    distribution = accelerator.distributed_type.value
    if distribution not in ("NO", "DEEPSPEED") and not distribution.startswith("MULTI_"):
        raise InputError(
            f"the Accelerator spreads the model by {distribution}, under which values cannot be written back: use a "
            "DeepSpeed plugin, or one process per GPU"
        )


def _check_can_store(accelerator: Any) -> None:
    """Refuse what accelerate stores besides, and JSON does not hold. Raises :class:`InputError`."""
    if any(getattr(loader, "use_stateful_dataloader", False) for loader in accelerator._dataloaders):
        raise InputError(
            "use_stateful_dataloader is set, whose state would be a pickle: leave it out, and skip what was seen with "
            "accelerator.skip_first_batches"
        )
    if accelerator._save_model_state_pre_hook or accelerator._load_model_state_pre_hook:
        raise InputError(
            "hooks are registered for save_state or load_state, which are not called: remove them, and do their work "
            "beside the call"
        )


def attach_accelerator(accelerator: Any, *, rounding: Rounding = "nearest", rounding_seed: int = 0) -> None:
    """Write values back after each step, and let ``save_state`` and ``load_state`` write and read our checkpoints.

    ``save_state(folder)`` writes what :func:`sparse_zero.save_checkpoint` does, with schedulers, gradient scaler, step
    counter, and the objects that are registered for checkpointing; and ``adapter/``. ``load_state(folder)`` continues
    at any number of ranks and ZeRO stage, with DeepSpeed or without.

    Args:
        accelerator: that has prepared one sparsified model and one optimizer.
        rounding: see :func:`sparse_zero.attach`; with DeepSpeed only.
        rounding_seed: see :func:`sparse_zero.attach`.

    Raises:
        InputError: it has prepared something else, or spreads the model in another way than these.
    """
    _check(accelerator)
    (prepared,), (optimizer,) = accelerator._models, accelerator._optimizers
    model = accelerator.unwrap_model(prepared)
    trainable_parameters(model)  # Raises without any.
    if accelerator.distributed_type.value == "DEEPSPEED":
        engine = prepared
        attach(engine, rounding=rounding, rounding_seed=rounding_seed)
    else:
        if rounding != "nearest":
            raise InputError(f"rounding is {rounding!r} without DeepSpeed, whose fp32 masters it rounds: use 'nearest'")
        engine = PlainEngine(module=model, optimizer=optimizer.optimizer)
        engine.optimizer.register_step_post_hook(lambda *_: write_back(model))
        write_back(model)
    accelerator.save_state = partial(_save_state, accelerator, engine)
    accelerator.load_state = partial(_load_state, accelerator, engine)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints under accelerate's automatic names and their numbers, the oldest first."""
    return sorted(
        (int(name[1]), path) for path in folder.glob("*") if (name := re.fullmatch(r"checkpoint_(\d+)", path.name))
    )


def _automatic_folder(accelerator: Any) -> Path | None:
    """Where checkpoints with automatic names are; None where none are made."""
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return None
    return Path(accelerator.project_dir) / "checkpoints"


def _extra(accelerator: Any, engine: Any) -> dict[str, Any]:
    return {
        _SECTION: {
            "schedulers": [scheduler_state(each) for each in accelerator._schedulers],
            **loop_state(engine, accelerator.scaler),
            "step": accelerator.step,
            "objects": [
                to_plain(each.state_dict(), f"the registered {type(each).__name__}")
                for each in accelerator._custom_objects
            ],
        }
    }


def _save_state(
    accelerator: Any, engine: Any, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any
) -> str:
    """``Accelerator.save_state``. Collective.

    Raises:
        InputError: something has a state that JSON does not hold, no folder is named, or with automatic names the next
            number is not above all that are there.
    """
    _check_can_store(accelerator)
    automatic = _automatic_folder(accelerator)
    if automatic is not None:
        folder = automatic / f"checkpoint_{accelerator.save_iteration}"
        with failing_together():
            newest = max((number for number, _ in _numbered(automatic)), default=-1)
            if accelerator.save_iteration <= newest:
                # It would count as older than it is, and be removed before others.
                raise InputError(
                    f"{automatic / f'checkpoint_{newest}'} exists: set accelerator.project_configuration.iteration to "
                    f"{newest + 1}, or name another project_dir"
                )
    elif output_dir is None:
        raise InputError("save_state has no output_dir, and automatic_checkpoint_naming is not set: name a folder")
    else:
        folder = Path(output_dir).expanduser()
    with loop_folder(folder, engine, extra=_extra(accelerator, engine)):
        pass
    accelerator.project_configuration.iteration += 1
    limit = accelerator.project_configuration.total_limit
    if automatic is not None and limit is not None and rank_and_world_size()[0] == 0:
        for _, old in _numbered(automatic)[:-limit]:
            with suppress(OSError):  # On this rank alone; the next one tries again.
                remove_folder(old)
    return str(folder)


def _load_state(
    accelerator: Any,
    engine: Any,
    input_dir: str | None = None,
    load_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """``Accelerator.load_state``. Collective.

    With automatic names, the next ``save_state`` numbers on from the newest checkpoint that is there.

    Raises:
        InputError: see :func:`sparse_zero.load_checkpoint`; also where there is no such checkpoint, or one of a loop
            with other schedulers or registered objects.
    """
    _check_can_store(accelerator)
    with failing_together():
        automatic = _automatic_folder(accelerator)
        numbered = [] if automatic is None else _numbered(automatic)
        if input_dir is None and not numbered:
            raise InputError("load_state has no input_dir, and there is no checkpoint with an automatic name: name one")
        folder = numbered[-1][1] if input_dir is None else Path(input_dir).expanduser()
        if folder.is_dir() and not (folder / "checkpoint.json").is_file():
            raise InputError(
                f"{folder} was not written by an Accelerator that is attached, and pickles are not read: start anew, "
                "or name another"
            )
        checkpoint = read_checkpoint(folder)
        stored = checkpoint.extra.get(_SECTION)
        if stored is None:
            raise InputError(f"{folder} was not written by save_state: load it with sz.load_checkpoint(engine, folder)")
        with reading(folder):
            step = int(stored["step"])
            for what, held in (("schedulers", accelerator._schedulers), ("objects", accelerator._custom_objects)):
                if len(stored[what]) != len(held):
                    raise InputError(
                        f"{folder} has {len(stored[what])} {what}, and the Accelerator {len(held)}: use as many"
                    )
            for scheduler, state in zip(accelerator._schedulers, stored["schedulers"], strict=True):
                check_scheduler(scheduler, state, folder)
    load_checkpoint(engine, checkpoint)
    schedulers = zip(accelerator._schedulers, stored["schedulers"], strict=True)
    set_loop_state(engine, accelerator.scaler, stored, schedulers, folder)
    for each, state in zip(accelerator._custom_objects, stored["objects"], strict=True):
        each.load_state_dict(from_plain(state))
    accelerator.step = step
    if numbered:
        accelerator.project_configuration.iteration = numbered[-1][0] + 1
