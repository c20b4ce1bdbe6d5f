"""How much memory will each rank of a training job hold, found by running its real code without data?

The model, its sparse layers and DeepSpeed's engine at any stage and world size are the real ones, see
:mod:`sparse_zero.memory.simulation.fake_world`; a step of a 7B model takes seconds and half a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.memory.simulation.fake_world import DEVICE, FakeRecorder, fake_world
from sparse_zero.memory.simulation.quantized_bases import fake_codes, is_codes, make_constants_fake
from sparse_zero.memory.simulation.recorder import MemoryRecorder, tag_model
from sparse_zero.memory.simulation.timeline import Timeline
from sparse_zero.zero import compat
from sparse_zero.zero.config import zero_stage

# The first step makes the optimizer's states, and stage 3 learns the order of the modules in it.
NUM_STEPS = 2


def _nothing(out: Tensor, start: int) -> None:
    """Reads no weights."""


@dataclass(kw_only=True)
class Simulated:
    """One rank of a job, in a world that is not there."""

    # The mode that is in force: a part of the job calls its ``phase``.
    recorder: FakeRecorder
    # On fake tensors.
    model: nn.Module
    # Over the model, as soon as a part has made it.
    engine: Any = None


# What a job does after loading, one after the other: it calls ``recorder.phase`` for what it does.
Part = Callable[[Simulated], None]


def _make_fake(model: nn.Module, settings: Mapping[str, Any], device: torch.device, trains_base: bool) -> None:
    """Give a model on the meta device fake parameters and buffers; at stage 3 the base's as this rank's shards."""
    init = compat.start_sharding(settings) if zero_stage(settings) == 3 else None
    # From each parameter on the meta device, which is kept, to the one in its place: tied ones stay one.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                if is_codes(parameter):
                    new = fake_codes(parameter, device)
                elif init is not None and (trains_base or not parameter.requires_grad):
                    new = compat.new_shards(init, parameter.shape, parameter.dtype, _nothing)
                    new.requires_grad_(parameter.requires_grad)
                else:
                    new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                made[id(parameter)] = (parameter, new)
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    make_constants_fake(model, device)
    # DeepSpeed moves a model to its device; fake tensors cannot be exchanged under a module, and are there already.
    vars(model)["to"] = lambda *args, **kwargs: model


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch where the model computes."""
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def record_step(
    recorder: MemoryRecorder,
    engine: Any,
    make_batch: Callable[[], Mapping[str, Any]],
    loss_fn: Callable[[Any, Mapping[str, Any]], Tensor],
) -> None:
    """One optimizer step under a recorder, in parts that are called "forward", "backward" and "step".

    Args:
        recorder: the mode that is in force; with real tensors, what they take is measured.
        engine: between two steps.
        make_batch: one micro-batch.
        loss_fn: ``loss_fn(engine, batch)`` gives a scalar.
    """
    for _ in range(engine.gradient_accumulation_steps()):
        with recorder.modules_of(engine.module):
            with recorder.phase("forward"):
                loss = loss_fn(engine, make_batch())
            with recorder.phase("backward"):
                engine.backward(loss)
                del loss
            with recorder.phase("step"):
                engine.step()


def simulate(
    model: nn.Module,
    parts: Sequence[Part],
    *,
    settings: Mapping[str, Any],
    world_size: int,
    head: str | None = None,
    trains_base: bool = False,
) -> Timeline:
    """Load, and do all ``parts``. In a process of its own.

    Args:
        model: on the meta device, as it is when weights have been loaded; of no use afterwards.
        parts: of the job, in their order.
        settings: DeepSpeed's config.
        world_size: ranks of the job.
        head: name of the output head's module.
        trains_base: whether what requires grad are the weights that are loaded, in shards at stage 3, and nothing
            that is added to them, which is sharded when there is an engine.

    Returns:
        What one rank held; the first part is "load".

    Raises:
        InputError: this process has, or had, a process group.
    """
    model.train()
    with fake_world(world_size) as recorder:
        with recorder.phase("load"):
            _make_fake(model, settings, DEVICE, trains_base)
            tag_model(recorder, model)
        simulated = Simulated(recorder=recorder, model=model)
        for part in parts:
            part(simulated)
    # Outside of the fake world: its own tensors have numbers.
    return recorder.timeline(head)


def training(
    make_engine: Callable[[nn.Module], Any],
    make_batch: Callable[[], Mapping[str, Any]],
    loss_fn: Callable[[Any, Mapping[str, Any]], Tensor],
) -> Part:
    """The part that makes an engine and takes :data:`NUM_STEPS` optimizer steps; see :func:`simulate_training`."""

    def train(simulated: Simulated) -> None:
        recorder = simulated.recorder
        with recorder.phase("engine"):
            simulated.engine = make_engine(simulated.model)
            tag_model(recorder, simulated.engine.module)
        for _ in range(NUM_STEPS):
            record_step(recorder, simulated.engine, lambda: on_device(make_batch()), loss_fn)

    return train


def simulate_training(
    model: nn.Module,
    *,
    settings: Mapping[str, Any],
    make_engine: Callable[[nn.Module], Any],
    make_batch: Callable[[], Mapping[str, Any]],
    loss_fn: Callable[[Any, Mapping[str, Any]], Tensor],
    world_size: int,
    head: str | None = None,
    trains_base: bool = False,
) -> Timeline:
    """Load, and take :data:`NUM_STEPS` optimizer steps. In a process of its own.

    Args:
        model: on the meta device, with what is trained (values, adapters, or its own weights) requiring grad; of no
            use afterwards.
        settings: DeepSpeed's config, of the engine.
        make_engine: from the model to an engine: by :func:`sparse_zero.initialize`, or ``deepspeed.initialize``.
        make_batch: one micro-batch, made of tensors.
        loss_fn: ``loss_fn(engine, batch)`` gives a scalar.
        world_size: ranks of the job.
        head: name of the output head's module.
        trains_base: see :func:`simulate`.

    Returns:
        What one rank held; parts are load, engine, and forward, backward and step of each optimizer step.

    Raises:
        InputError: this process has, or had, a process group.
    """
    parts = [training(make_engine, make_batch, loss_fn)]
    return simulate(model, parts, settings=settings, world_size=world_size, head=head, trains_base=trains_base)
