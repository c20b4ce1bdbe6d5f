"""What does a real run hold on each of its ranks: the tensors that a recorder sees, and the resident size?

Called on every rank of a world, see :mod:`scripts.memory.ranks_in_forks`. The model is loaded, made sparse (or given
PEFT's adapters) and put into an engine by what the launcher uses for it; then it is trained on random tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import warnings
from typing import Any

import torch
from torch import Tensor

from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.plan.forecasting import job_of
from launcher.plan.simulation import without_scores
from launcher.preparing import new_engine
from models.families import module_map
from models.loading import checkpoint_activations, load_model
from models.loss import nll_at
from models.peer_models import make_peer
from models.sharded_loading import load_sharded
from scripts.memory.memory_cases import Case
from sparse_zero.layers.sparsify import sparsify
from sparse_zero.memory.allocator import return_freed_blocks
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.measure import PeakMemory, status_bytes
from sparse_zero.memory.simulation.fake_world import communicating_in_place
from sparse_zero.memory.simulation.peers import peer_engine
from sparse_zero.memory.simulation.recorder import MemoryRecorder, tag_model
from sparse_zero.memory.simulation.simulate_training import NUM_STEPS, record_step
from sparse_zero.selection.select import select
from sparse_zero.zero.compat import detach_engine

# Smaller than the launcher's: what the C library keeps of freed blocks below 1 MiB is no tensor, and of the activations
# of small models with short samples it keeps more than a tenth.
_RETURNED_BYTES = 2**16
_PRIVATE = ("RssAnon", "RssFile", "RssShmem")


def _model(config: RunConfig, job: MemoryJob) -> Any:
    """What is trained, loaded by this rank. Collective at stage 3."""
    model: Any
    if job.stage == 3:
        model = load_sharded(config.model, deepspeed_config(config, job.world_size))
    else:
        model = load_model(config.model)
    if job.method == "selection":
        family = module_map(model)
        sparsify(model, select(model, None, config.selection, module_map=family), job.placement, module_map=family)
    else:
        model.requires_grad_(False)
        make_peer(model, job.method, rank=job.lora_rank, targets=job.lora_targets)
    if job.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def _engine(model: Any, config: RunConfig, job: MemoryJob) -> Any:
    if job.method == "selection":
        return new_engine(model, config, job.world_size)
    return peer_engine(model, deepspeed_config(config, job.world_size), config.training.optimizer_config())


class _Batches:
    """Micro-batches of random tokens, all of full length, with a mask where a simulation has one."""

    def __init__(self, job: MemoryJob, vocabulary: int) -> None:
        self.job, self.shape, self.vocabulary = job, (job.rows, job.row_length), vocabulary
        self.positions = torch.arange(job.logit_rows // job.rows)

    def make(self) -> dict[str, Tensor]:
        tokens = torch.randint(0, self.vocabulary, self.shape)
        if self.job.batching == "pack":
            positions = torch.arange(self.job.length).repeat(self.job.micro_batch)
            return {"input_ids": tokens, "labels": tokens.clone(), "position_ids": positions[None]}
        mask = torch.ones_like(tokens)
        if self.job.needs_mask:
            # Without any padding, none would be made.
            mask[-1, -1] = 0
        return {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": mask}

    def loss(self, engine: Any, batch: Any) -> Tensor:
        return nll_at(engine, batch, self.positions, chunk=self.job.loss_chunk)


def _train(config: RunConfig, job: MemoryJob, memory: PeakMemory) -> Any:
    """An engine, trained; ``memory`` starts to measure when the engine is there. Collective."""
    engine = _engine(_model(config, job), config, job)
    batches = _Batches(job, engine.module.get_input_embeddings().num_embeddings)
    gc.collect()
    memory.reset()
    for _ in range(NUM_STEPS * engine.gradient_accumulation_steps()):
        engine.backward(batches.loss(engine, batches.make()))
        engine.step()
    return engine


def _record(config: RunConfig, job: MemoryJob) -> dict[str, Any]:
    """Tensors by phase, as a simulation gives them. Collective."""
    model = _model(config, job)
    gc.collect()
    with MemoryRecorder() as recorder:
        with recorder.phase("load"):
            tag_model(recorder, model)
        with recorder.phase("engine"):
            engine = _engine(model, config, job)
            tag_model(recorder, engine.module)
        batches = _Batches(job, engine.module.get_input_embeddings().num_embeddings)
        for _ in range(NUM_STEPS):
            record_step(recorder, engine, batches.make, batches.loss)
    found = recorder.timeline("lm_head").to_json()
    detach_engine(engine)
    return found


def _give_back() -> None:
    """What the C library's allocator holds and nobody uses: it would be used first, and hide some of the growth."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_kinds() -> dict[str, int]:
    """This process's resident size by where the pages come from, in bytes."""
    return {name: size for name in _PRIVATE if (size := status_bytes(name)) is not None}


def measure_case(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """What one rank of a case holds. Collective.

    It is trained twice. What libraries load and set aside when they are first used, such as the code that oneDNN writes
    for each shape of a product, is there after the recorded run, and no part of the growth in the second. Neither are
    the copies in which gloo alone gathers parameters and scatters gradients, in both.

    Args:
        case: fields of :class:`~scripts.memory.memory_cases.Case`.
        folder: of its model, with weights.

    Returns:
        "phases" as of a simulation, "growth_bytes" of the resident size from before loading to the peak of training,
        and of what kind of page it is when training has ended.
    """
    warnings.simplefilter("ignore")
    return_freed_blocks(_RETURNED_BYTES)
    torch.manual_seed(0)
    known = Case(**case)
    config = without_scores(known.config(folder))
    job = job_of(config, known.world_size, **known.changes())
    with communicating_in_place():
        phases = _record(config, job)
        return {"phases": phases, **_growth(config, job)}


def _growth(config: RunConfig, job: MemoryJob) -> dict[str, Any]:
    """Of the resident size; see :func:`measure_case`. Collective."""
    # It fills what is allocated without values: of a bucket that is larger than what is in it, the system would give no
    # page for the rest. On a GPU there is no such thing.
    torch.use_deterministic_algorithms(True, warn_only=True)
    gc.collect()
    _give_back()
    with PeakMemory("cpu") as memory:
        before, kinds = memory.current_bytes() or 0, _resident_kinds()
        engine = _train(config, job, memory)
        peak = memory.peak_bytes()
        source = memory.source
    after = {name: size - kinds[name] for name, size in _resident_kinds().items()}
    detach_engine(engine)
    return {"growth_bytes": peak - before, "before_bytes": before, "source": source, "after": after}
