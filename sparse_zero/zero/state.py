"""What is the full training state of the values, whatever the stage and the optimizer?"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import trainable_parameters
from sparse_zero.zero import compat, optimizer_state
from sparse_zero.zero.engine import write_values


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything the optimizer knows, by name of the values; 1-D fp32 tensors on the host."""

    masters: dict[str, Tensor]
    # What the optimizer keeps for each entry, by its own name for it (AdamW: exp_avg, exp_avg_sq), then by name of the
    # values; empty before the first step. States of 8 bits are here in fp32.
    moments: dict[str, dict[str, Tensor]]
    # Optimizer steps taken.
    step: int
    # fp16: the dynamic loss scale and its counters.
    loss_scale: dict[str, float] | None = field(default=None)
    # Of the engine's learning rate scheduler, see sparse_zero.zero.optimizer_state; None: it has none.
    schedule: dict[str, Any] | None = field(default=None)


def _host(tensor: Tensor, keep: bool, *, is_copy: bool) -> Tensor:
    """In fp32 on the host, apart from the engine; an empty one on ranks that only take part in the collective.

    Args:
        tensor: what the engine has.
        keep: whether this rank wants it.
        is_copy: whether ``tensor`` was gathered into memory of its own, so that no second copy is needed.
    """
    if not keep:
        return torch.empty(0)
    return tensor.detach().to("cpu", torch.float32, copy=not is_copy).reshape(-1)


def read_masters(engine: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The fp32 masters of all values, whole, on the host. Collective; ranks with ``keep`` False get empty tensors."""
    return {
        name: _host(compat.full_master(engine, parameter), keep, is_copy=compat.is_partitioned(parameter))
        for name, parameter in trainable_parameters(engine.module).items()
    }


def read_training_state(engine: Any, *, keep: bool = True) -> TrainingState:
    """Masters, states and step counter, whole, on the host. Collective; see :func:`read_masters` for ``keep``.

    Raises:
        InputError: the optimizer has a state that is not per entry.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    step = optimizer_state.optimizer_step_count(engine)
    moments: dict[str, dict[str, Tensor]] = {}
    if step:
        with optimizer_state.wide_states(engine) as keys:
            for name, parameter in trainable_parameters(engine.module).items():
                for state, key in keys[id(parameter)].items():
                    gathered = compat.is_partitioned(parameter)
                    if gathered:
                        found = safe_get_full_optimizer_state(parameter, key)
                    else:
                        found = compat.own_state(engine, parameter, key)
                    moments.setdefault(state, {})[name] = _host(found, keep, is_copy=gathered)
    return TrainingState(
        masters=read_masters(engine, keep=keep),
        moments=moments,
        step=step,
        loss_scale=optimizer_state.read_loss_scale(engine),
        schedule=optimizer_state.read_schedule(engine) if keep else None,
    )


@torch.no_grad()
def write_training_state(engine: Any, state: TrainingState) -> None:
    """Put ``state`` into the engine's optimizer, values and weights. Collective; every rank passes all of it.

    Raises:
        InputError: the optimizer keeps other states than those that are given.
    """
    parameters = trainable_parameters(engine.module)
    if state.step:
        optimizer_state.create_optimizer_states(engine, state.step)
        with optimizer_state.wide_states(engine, writes=True) as keys:
            for name, parameter in parameters.items():
                given = [key for key, moments in state.moments.items() if name in moments]
                if sorted(given) != sorted(keys[id(parameter)]):
                    kept = ", ".join(sorted(keys[id(parameter)])) or "none"
                    raise InputError(
                        f"the state of {name} is {', '.join(sorted(given))}, but the optimizer "
                        f"{optimizer_state.algorithm(engine)} keeps {kept}: use the optimizer that the state is of"
                    )
            for name, parameter in parameters.items():
                for moment, key in keys[id(parameter)].items():
                    compat.write_moment(engine, parameter, state.moments[moment][name], key)
    for name, parameter in parameters.items():
        compat.write_master(engine, parameter, state.masters[name])
    optimizer_state.write_loss_scale(engine, state.loss_scale)
    optimizer_state.write_schedule(engine, state.schedule)
    optimizer_state.set_step_count(engine, state.step)
    write_values(engine)
    if compat.has_shards(engine.module):
        compat.shards_are_written()
