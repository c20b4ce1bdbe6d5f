"""What is the full training state of the values, whatever the stage: masters, moments, step counter?"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_zero.layers.sparsify import trainable_parameters, write_back
from sparse_zero.zero import compat

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything the optimizer knows, by name of the values; 1-D fp32 tensors on the host."""

    masters: dict[str, Tensor]
    # Moment name (exp_avg, exp_avg_sq) to value name; empty before the first step.
    moments: dict[str, dict[str, Tensor]]
    # Optimizer steps taken.
    step: int


def _host(tensor: Tensor, keep: bool) -> Tensor:
    """A fp32 copy on the host; an empty one on ranks that only take part in the collective."""
    if not keep:
        return torch.empty(0)
    return tensor.detach().to("cpu", torch.float32, copy=True).reshape(-1)


def read_masters(engine: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The fp32 masters of all values, whole, on the host. Collective; ranks with ``keep`` False get empty tensors."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: _host(safe_get_full_fp32_param(parameter) if compat.is_partitioned(parameter) else parameter, keep)
        for name, parameter in trainable_parameters(engine.module).items()
    }


def read_training_state(engine: Any, *, keep: bool = True) -> TrainingState:
    """Masters, moments and step counter, whole, on the host. Collective; see :func:`read_masters` for ``keep``."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = compat.optimizer_step_count(engine)
    if step:
        compat.link_optimizer_states(engine)
    moments: dict[str, dict[str, Tensor]] = {}
    for key in MOMENTS if step else ():
        moments[key] = {}
        for name, parameter in trainable_parameters(engine.module).items():
            if compat.is_partitioned(parameter):
                moments[key][name] = _host(safe_get_full_optimizer_state(parameter, key), keep)
            else:
                moments[key][name] = _host(compat.inner_optimizer(engine).state[parameter][key], keep)
    return TrainingState(masters=read_masters(engine, keep=keep), moments=moments, step=step)


@torch.no_grad()
def write_training_state(engine: Any, state: TrainingState) -> None:
    """Put ``state`` into the engine's optimizer, values and weights. Collective; every rank passes all of it."""
    if state.step:
        compat.create_optimizer_states(engine, MOMENTS, state.step)
    for name, parameter in trainable_parameters(engine.module).items():
        compat.write_master(engine, parameter, state.masters[name])
        for key, moments in state.moments.items():
            compat.write_moment(engine, parameter, moments[name], key)
    write_back(engine.module)
