"""How much memory will each rank of a training job hold, found by running its real code without data?

The model, its sparse layers and DeepSpeed's engine at any stage and world size are the real ones, see
:mod:`sparse_zero.memory.fake_world`; a step of a 7B model takes seconds and half a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.memory.fake_world import fake_world
from sparse_zero.memory.recorder import MemoryRecorder, tag_model
from sparse_zero.memory.timeline import Timeline
from sparse_zero.zero import compat
from sparse_zero.zero.config import zero_stage

# The first step makes the optimizer's states, and stage 3 learns the order of the modules in it.
NUM_STEPS = 2


def _nothing(out: Tensor, start: int) -> None:
    """Reads no weights."""


def _make_fake(model: nn.Module, settings: Mapping[str, Any], device: torch.device) -> None:
    """Give a model on the meta device fake parameters and buffers; at stage 3 the frozen ones as this rank's shards."""
    init = compat.start_sharding(settings) if zero_stage(settings) == 3 else None
    # From each parameter on the meta device, which is kept, to the one in its place: tied ones stay one.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                if init is not None and not parameter.requires_grad:
                    new = compat.new_shards(init, parameter.shape, parameter.dtype, _nothing)
                else:
                    new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                made[id(parameter)] = (parameter, new)
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    # DeepSpeed moves a model to its device; fake tensors cannot be exchanged under a module, and are there already.
    vars(model)["to"] = lambda *args, **kwargs: model


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


def simulate_training(
    model: nn.Module,
    *,
    settings: Mapping[str, Any],
    make_engine: Callable[[nn.Module], Any],
    make_batch: Callable[[], Mapping[str, Any]],
    loss_fn: Callable[[Any, Mapping[str, Any]], Tensor],
    world_size: int,
    head: str | None = None,
) -> Timeline:
    """Load, and take :data:`NUM_STEPS` optimizer steps. In a process of its own.

    Args:
        model: on the meta device, sparsified; of no use afterwards.
        settings: DeepSpeed's config, of the engine.
        make_engine: from the model to an engine, by :func:`sparse_zero.initialize`.
        make_batch: one micro-batch, made of tensors.
        loss_fn: ``loss_fn(engine, batch)`` gives a scalar.
        world_size: ranks of the job.
        head: name of the output head's module.

    Returns:
        What one rank held; parts are load, engine, and forward, backward and step of each optimizer step.

    Raises:
        InputError: this process has, or had, a process group.
    """
    model.train()
    with fake_world(world_size) as recorder:
        with recorder.phase("load"):
            _make_fake(model, settings, torch.device("cpu"))
            tag_model(recorder, model)
        with recorder.phase("engine"):
            engine = make_engine(model)
            tag_model(recorder, engine.module)
        for _ in range(NUM_STEPS):
            record_step(recorder, engine, make_batch, loss_fn)
    # Outside of the fake world: its own tensors have numbers.
    return recorder.timeline(head)
