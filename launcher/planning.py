"""How much memory would each rank of a run hold?

Found by running its code without weights, data, GPUs or other ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import multiprocessing
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from launcher.config import RunConfig, parse_config, resolved_yaml
from launcher.deepspeed_config import OFFLOADS, deepspeed_config
from launcher.yaml_files import parse_yaml
from sparse_zero.errors import InputError
from sparse_zero.zero.unsupported import offload_device


def without_scores(config: RunConfig) -> RunConfig:
    """The run with regions chosen at random: as many and as large, which is all that memory asks for.

    They lie elsewhere, so that other columns of inputs are kept for backward; of the order of a percent.
    """
    selection = config.selection
    if selection.file is not None:
        return config
    regions = tuple(dataclasses.replace(region, score=None, pick="max") for region in selection.regions)
    changed = dataclasses.replace(
        selection, regions=regions, score="random", calibration_weights="frozen", reselect=None
    )
    return dataclasses.replace(config, selection=changed)


def check_can_simulate(config: RunConfig) -> None:
    """Refuse what the simulation does not know.

    Raises:
        InputError: names the field.
    """
    if config.model.quantization != "none":
        raise InputError(
            f"model.quantization is {config.model.quantization!r}: a quantized base is not simulated yet; plan the "
            "run with none"
        )
    settings = deepspeed_config(config, None)
    for section, field in OFFLOADS.items():
        device = offload_device(settings, section)
        if device is not None:
            raise InputError(
                f"{field} is {device!r}: what lies in which memory is not simulated yet; plan the run with none"
            )


def _simulate_here(mapping: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What :func:`simulate_run` returns; in a process that has no process group, and makes no other one."""
    # DeepSpeed and torch tell of CPUs, builds and fake tensors, which say nothing about the run.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        return _simulate(parse_config(mapping), world_size)


def _simulate(config: RunConfig, world_size: int) -> dict[str, Any]:
    import torch

    from launcher.preparing import new_engine
    from models.compat import masks_of_fake_tensors
    from models.families import module_map
    from models.loading import checkpoint_activations
    from models.loss import nll_at
    from models.skeleton import load_shapes
    from sparse_zero.layers.sparsify import sparsify
    from sparse_zero.memory.simulate_training import simulate_training
    from sparse_zero.selection.select import num_parameters, select
    from sparse_zero.selection.selection import Selection

    config = without_scores(config)
    # From the second micro-batch on, each holds what the one before held.
    most = 2 * config.training.micro_batch_size * world_size
    if config.zero.config is None and config.training.global_batch_size > most:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=most))
    model = load_shapes(config.model)
    family = module_map(model)
    total = num_parameters(model)
    if config.selection.file is not None:
        selection = Selection.load(config.selection.file)
    else:
        selection = select(model, None, config.selection, module_map=family)
    sparsify(model, selection, config.zero.placement, module_map=family)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    samples, length = config.training.micro_batch_size, config.data.max_length
    shape = (1, samples * length) if config.data.batching == "pack" else (samples, length)

    def batch() -> dict[str, torch.Tensor]:
        tokens = torch.zeros(shape, dtype=torch.int64)
        named = {"input_ids": tokens, "labels": torch.zeros_like(tokens)}
        other = "position_ids" if config.data.batching == "pack" else "attention_mask"
        return {**named, other: torch.zeros_like(tokens)}

    def loss(engine: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
        # Every position predicts a label: the most that a batch of this size can ask for.
        return nll_at(engine, tensors, torch.arange(shape[1] - 1))

    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    with masks_of_fake_tensors():
        timeline = simulate_training(
            model,
            settings=deepspeed_config(config, world_size),
            make_engine=lambda each: new_engine(each, config, world_size, broadcast_weights=True),
            make_batch=batch,
            loss_fn=loss,
            world_size=world_size,
            head=names.get(id(head)),
        )
    return {
        "world_size": world_size,
        "stage": config.zero.stage,
        "placement": config.zero.placement,
        "precision": config.training.precision,
        "micro_batch": list(shape),
        "parameters": total,
        "trained": selection.num_parameters,
        "peak_bytes": timeline.peak().num_bytes,
        "phases": timeline.to_json(),
    }


def simulate_run(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Bytes of tensors on one rank, by part of the run and by kind, for samples of ``data.max_length`` tokens.

    Not counted: the interpreter, the CUDA context, what kernels use inside of an operation, and what the allocator
    loses to fragments.

    Args:
        config: of the run; its model's folder needs no weights.
        world_size: ranks.

    Raises:
        InputError: see :func:`check_can_simulate`; or the config does not fit the model.
    """
    check_can_simulate(config)
    mapping = parse_yaml(resolved_yaml(config), "the run")
    # A process makes one world, and no other after it.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_simulate_here, mapping, world_size).result()
        except BrokenProcessPool as error:
            raise InputError(
                "the simulation was killed, perhaps for want of memory: plan a smaller model, or fewer ranks"
            ) from error
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
