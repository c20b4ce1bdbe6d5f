"""What does another program's training loop need besides the canonical checkpoint, and how do both share a folder?

The folder is a checkpoint as :func:`sparse_zero.save_checkpoint` writes it, with ``adapter/`` and whatever files the
program adds, under one manifest: all of it appears at once, or nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparse_zero.checkpoint.adapter import take_adapter, write_adapter
from sparse_zero.checkpoint.checkpoint import take_snapshot, write_snapshot_files
from sparse_zero.checkpoint.folders import new_folder
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.integrations.plain_state import from_plain, to_plain
from sparse_zero.layers.sparsify import trainable_parameters
from sparse_zero.zero.compat import inner_optimizer, stepped
from sparse_zero.zero.optimizer_state import fill_missing_gradients

ADAPTER_FOLDER = "adapter"
# Options of a group of parameters that belong to the machine, not to the training.
_OF_THE_MACHINE = ("params", "foreach", "fused", "capturable", "differentiable")
# What torch's schedulers have one of for each group.
_BY_GROUP = {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs"}
# Set on an optimizer that steps every value.
_MARK = "_sparse_zero_steps_every_value"


def _step_every_value(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: see :func:`~sparse_zero.zero.optimizer_state.fill_missing_gradients`."""
    for group in optimizer.param_groups:
        fill_missing_gradients(group["params"])


@dataclass(frozen=True, kw_only=True)
class PlainEngine:
    """A model and its torch optimizer without DeepSpeed, as the functions that take an engine see them: stage 0.

    From then on the optimizer steps every value, also those that no batch has reached.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        if not hasattr(self.optimizer, _MARK):
            self.optimizer.register_step_pre_hook(_step_every_value)
            setattr(self.optimizer, _MARK, True)


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Have what a block finds wrong with the form of a stored state raise :class:`InputError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{source} does not have the state of this loop ({what}): use another checkpoint") from error


def _values_of_groups(engine: Any) -> list[list[str]]:
    """Names of the values in each of the optimizer's groups; DeepSpeed leaves out groups without any."""
    names = {id(parameter): name for name, parameter in trainable_parameters(engine.module).items()}
    found: list[list[str]] = [[] for _ in inner_optimizer(engine).param_groups]
    for each in stepped(engine):
        found[each.group] += [names[id(values)] for values in each.values]
    return found


def group_options(engine: Any) -> list[dict[str, Any]]:
    """For each of the optimizer's groups the ``values`` in it and its ``options``: learning rate, decay and others."""
    optimizer = inner_optimizer(engine)
    return [
        {
            "values": sorted(values),
            "options": {
                name: to_plain(value, f"the optimizer {type(optimizer).__name__}")
                for name, value in group.items()
                if name not in _OF_THE_MACHINE and isinstance(value, (bool, int, float, str, list, tuple, Tensor))
            },
        }
        for values, group in zip(_values_of_groups(engine), optimizer.param_groups, strict=True)
    ]


def match_groups(engine: Any, stored: list[dict[str, Any]], source: Path) -> list[int]:
    """For each of the optimizer's groups, which of those that :func:`group_options` gave it goes on with.

    Raises:
        InputError: values of one group were in several, with other options.
    """
    group_of = {name: number for number, group in enumerate(stored) for name in group["values"]}
    sources = []
    for number, values in enumerate(_values_of_groups(engine)):
        found = sorted({group_of[name] for name in values})
        if any(stored[each]["options"] != stored[found[0]]["options"] for each in found):
            raise InputError(
                f"{source} was trained with {len(stored)} groups of parameters, of which {len(found)} with different "
                "options are one now: make the groups as they were"
            )
        # A group without values goes on with the one in its place, if there is one.
        sources.append(found[0] if found else min(number, len(stored) - 1))
    return sources


def set_group_options(engine: Any, stored: list[dict[str, Any]], sources: list[int]) -> None:
    """Go on with what :func:`group_options` gave, as :func:`match_groups` says."""
    for group, number in zip(inner_optimizer(engine).param_groups, sources, strict=True):
        for name, value in stored[number]["options"].items():
            if name in group and isinstance(group[name], Tensor):
                group[name].fill_(from_plain(value))
            elif name in group:
                group[name] = from_plain(value)


def _scheduler_name(scheduler: Any) -> str:
    """Of the class of a scheduler, without accelerate's around it."""
    return "none" if scheduler is None else type(getattr(scheduler, "scheduler", scheduler)).__name__


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """What a learning rate scheduler knows, if there is one, and its class, in JSON's types.

    Raises:
        InputError: JSON cannot say it.
    """
    name = _scheduler_name(scheduler)
    return {"name": name, "state": scheduler and to_plain(scheduler.state_dict(), f"the scheduler {name}")}


def check_scheduler(scheduler: Any, stored: dict[str, Any], source: Path) -> None:
    """Refuse a scheduler of another class than :func:`scheduler_state` has seen. Raises :class:`InputError`."""
    name = _scheduler_name(scheduler)
    if name != stored["name"]:
        raise InputError(f"{source} was trained with the scheduler {stored['name']}, and here is {name}: use the same")


def set_scheduler_state(scheduler: Any, stored: dict[str, Any], sources: list[int]) -> None:
    """Go on with what :func:`scheduler_state` gave.

    Args:
        scheduler: of the same class, see :func:`check_scheduler`; or None, where there was none.
        stored: what it gave.
        sources: of :func:`match_groups`.
    """
    if scheduler is None:
        return
    state = from_plain(stored["state"])
    for key in _BY_GROUP & state.keys():
        state[key] = [state[key][number] for number in sources]
    scheduler.load_state_dict(state)


def loop_state(engine: Any, scaler: Any) -> dict[str, Any]:
    """What the options of the optimizer's groups and the gradient scaler are, in JSON's types.

    Args:
        engine: DeepSpeed's, or a :class:`PlainEngine`.
        scaler: torch's for fp16, or None.

    Raises:
        InputError: JSON cannot say it.
    """
    return {
        "groups": group_options(engine),
        "scaler": None if scaler is None else to_plain(scaler.state_dict(), "the gradient scaler"),
    }


def set_loop_state(
    engine: Any, scaler: Any, stored: Mapping[str, Any], schedulers: Iterable[tuple[Any, dict[str, Any]]], source: Path
) -> None:
    """Go on with what :func:`loop_state` and :func:`scheduler_state` gave, after the checkpoint was loaded.

    Args:
        engine: as then.
        scaler: as then.
        stored: by :func:`loop_state`.
        schedulers: each with what was stored of it, see :func:`set_scheduler_state`.
        source: of all, for errors.

    Raises:
        InputError: values of one group were in several, with other options; or it has another form.
    """
    with reading(source):
        sources = match_groups(engine, stored["groups"], source)
        for scheduler, state in schedulers:
            set_scheduler_state(scheduler, state, sources)
        set_group_options(engine, stored["groups"], sources)
        if scaler is not None and stored["scaler"] is not None:
            scaler.load_state_dict(from_plain(stored["scaler"]))


@contextmanager
def loop_folder(folder: Path, engine: Any, *, extra: Mapping[str, Any] | None) -> Iterator[Path | None]:
    """Write checkpoint and adapter to ``folder``, with what the block adds. Collective.

    Args:
        folder: replaced atomically by rank 0, if it exists and was written by this program.
        engine: DeepSpeed's, or a :class:`PlainEngine`.
        extra: JSON values for :attr:`Checkpoint.extra`; None writes the adapter alone, from which nothing continues.

    Yields:
        The folder to put more files into, on rank 0; None on others. The block must not communicate.

    Raises:
        InputError: see :func:`sparse_zero.save_checkpoint`; or ``folder`` is somebody else's.
    """
    try:
        snapshot = None if extra is None else take_snapshot(engine, extra=dict(extra))
        masters = {} if snapshot is None else snapshot.state.masters
        taken = take_adapter(engine, masters=None if extra is None else masters)
        with failing_together():
            if taken is None:
                yield None
                return
            with new_folder(folder) as temporary:
                if snapshot is not None:
                    write_snapshot_files(snapshot, temporary)
                write_adapter(temporary / ADAPTER_FOLDER, *taken)
                yield temporary
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}): make room, or see to its "
            "permissions; checkpoints before it are as they were"
        ) from error
