"""What does the optimizer inside of DeepSpeed's keep for the values, and how is it read and replaced?"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_zero.collectives import rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.zero import compat, eight_bit

# States that an optimizer keeps and never reads.
_UNUSED_STATES = {"DeepSpeedCPULion": {"exp_avg_sq"}}
# Names of algorithms by the classes that compute them; others are called by their class.
_ALGORITHMS = {
    "DeepSpeedCPULion": "lion",
    "FusedLion": "lion",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "adamw_8bit",
}


def algorithm(engine: Any) -> str:
    """What the inner optimizer computes: classes of one name here go on from each other's states."""
    inner = compat.inner_optimizer(engine)
    name = type(inner).__name__
    if isinstance(inner, torch.optim.Adam):
        decoupled = all(group.get("decoupled_weight_decay") for group in inner.param_groups)
        return "adamw" if decoupled else "adam"
    if name in ("DeepSpeedCPUAdam", "FusedAdam"):
        return "adamw" if getattr(inner, "adam_w_mode", True) else "adam"
    own: str = getattr(inner, "algorithm", _ALGORITHMS.get(name, name.lower()))
    return own


def _entry_states(inner: torch.optim.Optimizer, tensor: Tensor) -> tuple[str, ...]:
    """Names of the states that have a number for each entry of ``tensor``; those of 8 bits are among them."""
    state = inner.state.get(tensor, {})
    unused = _UNUSED_STATES.get(type(inner).__name__, set())
    names: list[str] = []
    others: list[str] = []
    for name, held in state.items():
        if name == "step" or held is None or name in eight_bit.companions(state):
            continue
        is_per_entry = isinstance(held, Tensor) and held.shape == tensor.shape
        (names if is_per_entry else others).append(name)
    if others:
        raise InputError(
            f"the optimizer {type(inner).__name__} has a state {others[0]} that is neither its step counter nor a "
            "number for each value, so that it cannot be saved: use one of sparse_zero.zero.optimizers"
        )
    return tuple(name for name in names if name not in unused)


def fill_missing_gradients(tensors: Iterable[Tensor]) -> None:
    """Give what is trained and has no gradient one of zero, as DeepSpeed does where no batch has reached values.

    torch's optimizers pass over what has none: it would have no state, without which a checkpoint is not loaded, and
    later a counter of its own, where a checkpoint has one for all.
    """
    for tensor in tensors:
        if tensor.requires_grad and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)


def check_optimizer(engine: Any) -> None:
    """Refuse an optimizer whose state is not per entry: it could not be saved, nor go on with another selection.

    Of what is not, only the step counter is kept. A number that changes with the steps (NAdam's ``mu_product``, ASGD's
    ``eta`` and ``mu``) would begin anew after a resume.

    Raises:
        InputError: names the optimizer and the state.
    """
    inner = compat.inner_optimizer(engine)
    for each in compat.stepped(engine):
        for tensor in each.tensors:
            _entry_states(inner, tensor)


@torch.no_grad()
def create_optimizer_states(engine: Any, step: int) -> None:
    """Give the optimizer the states that its first step would create, all zero, and ``step`` steps taken.

    DeepSpeed's setters need them in place. The optimizer makes them itself, in a step of gradients, learning rate and
    decay zero; the caller overwrites the masters afterwards.

    Raises:
        InputError: the states are on a disk.
    """
    if compat.states_on_disk(engine):
        raise InputError(
            "the optimizer's states are offloaded to nvme, where a checkpoint cannot be put: "
            "use zero.offload_optimizer cpu or none"
        )
    inner = compat.inner_optimizer(engine)
    groups = inner.param_groups
    try:
        for each in compat.stepped(engine):
            gradients = [tensor.grad for tensor in each.tensors]
            for tensor in each.tensors:
                tensor.grad = torch.zeros_like(tensor)
            still = {**groups[each.group], "params": list(each.tensors), "lr": 0.0, "weight_decay": 0.0}
            inner.param_groups = [still]
            inner.step()
            for tensor, gradient in zip(each.tensors, gradients, strict=True):
                tensor.grad = gradient
    finally:
        inner.param_groups = groups
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step
    compat.link_optimizer_states(engine)


@contextmanager
def wide_states(engine: Any, *, writes: bool = False) -> Iterator[dict[int, dict[str, str]]]:
    """Have every state per entry stand in fp32 while the block runs.

    Args:
        engine: whose optimizer has taken a step, or was given states.
        writes: whether the block changes states of 8 bits, which are quantized again at its end.

    Yields:
        By identity of the values: the name of each state, and the key under which DeepSpeed's getters find it.
    """
    inner = compat.inner_optimizer(engine)
    keys: dict[int, dict[str, str]] = {}
    widened: list[tuple[dict[str, Any], str, str]] = []
    for each in compat.stepped(engine):
        by_tensor: dict[int, dict[str, str]] = {}
        for tensor in each.tensors:
            state = inner.state[tensor]
            found = by_tensor[id(tensor)] = {}
            for name in _entry_states(inner, tensor):
                found[name] = name
                if state[name].dtype == torch.uint8:
                    found[name] = f"{name}_in_fp32"
                    state[found[name]] = eight_bit.dequantize(state, name)
                    widened.append((state, name, found[name]))
        for index, values in enumerate(each.values):
            keys[id(values)] = by_tensor[id(each.tensor_of(index))]
    compat.link_optimizer_states(engine)
    try:
        yield keys
        if writes:
            for state, name, key in widened:
                eight_bit.quantize(state, name, state[key])
    finally:
        for state, _, key in widened:
            del state[key]
        if widened:
            compat.link_optimizer_states(engine)


def optimizer_step_count(engine: Any, *, in_step: bool = False) -> int:
    """Steps that the inner optimizer has taken; 0 before the first.

    DeepSpeed's fused optimizers count on the last tensor of a group only. Where an optimizer has no counter, the
    engine's counts, which :func:`~sparse_zero.zero.state.write_training_state` sets.

    Args:
        engine: from :func:`sparse_zero.initialize`.
        in_step: whether the engine is within its step, after that of the optimizer: it counts at its end.
    """
    states = [state for state in compat.inner_optimizer(engine).state.values() if state]
    counted = [int(state["step"]) for state in states if "step" in state]
    if not counted and hasattr(engine, "global_steps"):
        counted.append(engine.global_steps - engine.skipped_steps + in_step)
    return max([min(len(states), 1), *counted])


def set_step_count(engine: Any, step: int) -> None:
    """Have the engine count on from ``step``, for optimizers that do not count themselves."""
    if hasattr(engine, "global_steps"):
        engine.global_steps, engine.skipped_steps = step, 0


# What a dynamic loss scaler (fp16) knows after a step.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_loss_scale(engine: Any) -> dict[str, float] | None:
    """The dynamic loss scale and its counters; None where nothing is scaled, or by a constant."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return None
    return {name: getattr(scaler, name) for name in LOSS_SCALE}


def write_loss_scale(engine: Any, stored: Mapping[str, float] | None) -> None:
    """Go on with what :func:`read_loss_scale` gave; nothing to do unless both engines scale dynamically."""
    if stored is not None and read_loss_scale(engine) is not None:
        for name in LOSS_SCALE:
            setattr(engine.optimizer.loss_scaler, name, stored[name])


class ScheduleWarning(UserWarning):
    """The state of a learning rate scheduler cannot be kept in a checkpoint."""


def read_schedule(engine: Any) -> dict[str, Any] | None:
    """The state of the engine's learning rate scheduler, as JSON values; None where it has none.

    A state that JSON cannot say is not kept, and a :class:`ScheduleWarning` says so.
    """
    scheduler = getattr(engine, "lr_scheduler", None)
    if scheduler is None:
        return None
    state = scheduler.state_dict()
    try:
        found: dict[str, Any] | None = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError):
        found = None
    if found != state:
        warnings.warn(
            f"the state of the scheduler {type(scheduler).__name__} is not kept in the checkpoint, for JSON cannot say "
            "it: keep it apart",
            ScheduleWarning,
            stacklevel=3,
        )
        return None
    # Until the scheduler's next step, after the optimizer's, these rates are in force.
    return {"state": found, "learning_rates": [float(group["lr"]) for group in engine.optimizer.param_groups]}


def check_schedule(engine: Any, stored: Mapping[str, Any] | None, source: object) -> None:
    """Raise unless the engine's scheduler can go on with ``stored``, which may be anything that JSON can say.

    Raises:
        InputError: it is of another scheduler, or of other groups.
    """
    scheduler = getattr(engine, "lr_scheduler", None)
    if stored is None or scheduler is None:
        if (stored is None) != (scheduler is None) and rank_and_world_size()[0] == 0:
            told = "no state of a scheduler, and the engine has one, which begins anew"
            if scheduler is None:
                told = "the state of a learning rate scheduler, and the engine has none"
            warnings.warn(f"{source} has {told}", ScheduleWarning, stacklevel=3)
        return
    state, rates, own = stored.get("state"), stored.get("learning_rates"), scheduler.state_dict()
    if not _is_alike(state, own):
        raise InputError(
            f"{source} has the state of another learning rate scheduler than the engine's {type(scheduler).__name__}: "
            "use the scheduler that it was trained with"
        )
    num_groups = len(engine.optimizer.param_groups)
    if not isinstance(rates, list) or len(rates) != num_groups or not all(_is_alike(rate, 0.0) for rate in rates):
        raise InputError(f"{source} has no learning rate for each of the optimizer's {num_groups} groups: use another")


def _is_alike(value: object, own: object) -> bool:
    """Whether ``value`` may take the place of ``own`` in a scheduler."""
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(own, list):
        return isinstance(value, list) and len(value) == len(own) and all(map(_is_alike, value, own))
    if isinstance(own, dict):
        return isinstance(value, dict) and value.keys() == own.keys() and all(_is_alike(value[k], own[k]) for k in own)
    # A scheduler that has not begun may have None where a number comes.
    return (own is None and isinstance(value, (int, float, list, type(None)))) or type(value) is type(own)


def write_schedule(engine: Any, stored: Mapping[str, Any] | None) -> None:
    """Go on with what :func:`read_schedule` gave; nothing to do where the engine has no scheduler."""
    if stored is None or getattr(engine, "lr_scheduler", None) is None:
        return
    engine.lr_scheduler.load_state_dict(stored["state"])
    for group, rate in zip(engine.optimizer.param_groups, stored["learning_rates"], strict=True):
        group["lr"] = rate
