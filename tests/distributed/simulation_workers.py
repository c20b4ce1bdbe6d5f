"""What the tests of the simulation run: the same steps with data on real ranks, and without in a fake world."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sparse_zero as sz
from models.compat import masks_of_fake_tensors
from sparse_zero.memory.fake_world import fake_world
from sparse_zero.memory.recorder import MemoryRecorder, tag_model
from sparse_zero.memory.simulate_training import record_step, simulate_training
from sparse_zero.memory.timeline import Timeline
from sparse_zero.zero.config import Placement
from sparse_zero.zero.defaults import with_defaults
from tests.models.tiny import tiny_llama
from tests.sparse_zero.helpers import mixed_selection

PHASES = ("forward", "backward", "step")


def _job(stage: int, placement: Placement, checkpointing: bool, accumulation: int, low: bool) -> dict[str, Any]:
    """What both do: the settings, and functions from a model to an engine and to a batch."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": low},
        "steps_per_print": 10**9,
    }

    def sparse(model: nn.Module) -> nn.Module:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sz.sparsify(model, mixed_selection(model, block_size=16), placement)
        settings["zero_optimization"] = with_defaults(model, {"stage": stage})
        return model.train()

    def make_engine(model: nn.Module) -> Any:
        return sz.initialize(
            model=model, config=settings, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)
        )[0]

    def make_batch() -> dict[str, torch.Tensor]:
        tokens = torch.zeros(2, 48, dtype=torch.int64)
        return {"input_ids": tokens, "labels": tokens}

    return {"settings": settings, "sparse": sparse, "make_engine": make_engine, "make_batch": make_batch}


def _loss(engine: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = engine(**batch, use_cache=False).loss
    return loss


def _model(low: bool) -> nn.Module:
    model: nn.Module = tiny_llama(layers=3)
    return model.bfloat16() if low else model


def _report(timeline: Timeline) -> dict[str, Any]:
    return {
        phase: {"peak": timeline.peak(phase).num_bytes, "kinds": timeline.peak(phase).by_kind,
                "end": timeline.at_end(phase).num_bytes}
        for phase in PHASES
    }  # fmt: skip


def real(low: bool = False, **job: Any) -> dict[str, Any]:
    """Two steps on this rank, with data."""
    found = _job(low=low, **job)
    model = found["sparse"](_model(low))
    with MemoryRecorder() as recorder:
        with recorder.phase("load"):
            tag_model(recorder, model)
        with recorder.phase("engine"):
            engine = found["make_engine"](model)
            tag_model(recorder, engine.module)
        for _ in range(2):
            record_step(recorder, engine, found["make_batch"], _loss)
        dist.barrier()
    return _report(recorder.timeline("lm_head"))


def simulated(out: str, world_size: int, low: bool = False, **job: Any) -> None:
    """The same, without data, in a process of its own; writes what :func:`real` returns."""
    found = _job(low=low, **job)
    with torch.device("meta"):
        model = _model(low)
    found["sparse"](model)
    with masks_of_fake_tensors():
        timeline = simulate_training(
            model,
            settings=found["settings"],
            make_engine=found["make_engine"],
            make_batch=found["make_batch"],
            loss_fn=_loss,
            world_size=world_size,
            head="lm_head",
        )

    Path(out).write_text(json.dumps(_report(timeline)))


def numbers_of_fakes(out: str) -> None:
    """What the recorder answers for numbers that fake tensors do not have."""
    with fake_world(4):
        ones = torch.ones(8)
        found = [
            float(ones.sum()), int(torch.zeros(3, dtype=torch.int64).sum()), bool(ones.isfinite().all()),
            bool((ones > 2).any()), list((ones > 0).nonzero().shape), dist.get_world_size(),
        ]  # fmt: skip
    Path(out).write_text(json.dumps([*found, dist.is_initialized()]))
