"""What the tests of the simulation run: the same steps with data on real ranks, and without in a fake world."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sparse_zero as sz
from models.compat import masks_of_fake_tensors
from models.loading import checkpoint_activations
from models.peer_models import make_peer
from models.quantized_shapes import quantize_shapes
from sparse_zero.memory.closed_form.job import Method
from sparse_zero.memory.simulation.fake_world import communicating_in_place, fake_world
from sparse_zero.memory.simulation.peers import peer_engine
from sparse_zero.memory.simulation.recorder import MemoryRecorder, tag_model
from sparse_zero.memory.simulation.simulate_training import record_step, simulate_training
from sparse_zero.memory.simulation.timeline import Timeline
from sparse_zero.zero.config import Placement
from sparse_zero.zero.defaults import with_defaults
from sparse_zero.zero.optimizers import OptimizerConfig
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES
from tests.sparse_zero.helpers import mixed_selection
from tests.sparse_zero.quantizing import quantize

PHASES = ("forward", "backward", "step")


def _job(
    stage: int,
    placement: Placement,
    checkpointing: bool,
    accumulation: int,
    low: bool,
    method: Method,
    experts: str | None,
) -> dict[str, Any]:
    """What both do: the settings, and functions from a model to an engine and to a batch."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": low},
        "steps_per_print": 10**9,
    }

    def prepare(model: nn.Module) -> nn.Module:
        if method == "selection":
            # Codes do not tell of the shape of what they stand for.
            sz.sparsify(model, mixed_selection(_model(False, False, experts, device="meta"), block_size=16), placement)
        else:
            make_peer(model, method, rank=4, targets=("q_proj", "v_proj", "down_proj"))
        if checkpointing:
            checkpoint_activations(model)
        settings["zero_optimization"] = with_defaults(model, {"stage": stage})
        return model.train()

    def make_engine(model: nn.Module) -> Any:
        if method != "selection":
            return peer_engine(model, settings, OptimizerConfig())
        return sz.initialize(
            model=model, config=settings, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)
        )[0]

    def make_batch() -> dict[str, torch.Tensor]:
        # Different ones: they are spread over experts.
        tokens = torch.arange(96).view(2, 48) % 64
        return {"input_ids": tokens, "labels": tokens}

    return {"settings": settings, "prepare": prepare, "make_engine": make_engine, "make_batch": make_batch}


def _loss(engine: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = engine(**batch, use_cache=False).loss
    return loss


def _mixture(experts: str) -> Any:
    return FAMILIES["mixtral"].make(hidden_size=64, head_dim=16, intermediate_size=96, experts_implementation=experts)


def _model(low: bool, quantized: bool, experts: str | None, device: str = "cpu") -> Any:
    with torch.device(device):
        model = tiny_llama(layers=3) if experts is None else _mixture(experts)
    model = model.bfloat16() if low else model
    if not quantized:
        return model
    if device == "meta":
        quantize_shapes(model, "nf4", True, model.dtype)
    else:
        quantize(model, "nf4-double")
        # As transformers' loading says to PEFT.
        model.is_loaded_in_4bit = True
    return model


def _report(timeline: Timeline) -> dict[str, Any]:
    return {
        phase: {"peak": timeline.peak(phase).num_bytes, "kinds": timeline.peak(phase).by_kind,
                "end": timeline.at_end(phase).num_bytes}
        for phase in PHASES
    }  # fmt: skip


def real(
    low: bool = False, quantized: bool = False, method: Method = "selection", experts: str | None = None, **job: Any
) -> dict[str, Any]:
    """Two steps on this rank, with data, and without the copy in which gloo alone scatters gradients."""
    found = _job(low=low, method=method, experts=experts, **job)
    model = found["prepare"](_model(low, quantized, experts))
    with MemoryRecorder() as recorder:
        with recorder.phase("load"):
            tag_model(recorder, model)
        with recorder.phase("engine"):
            engine = found["make_engine"](model)
            tag_model(recorder, engine.module)
        with communicating_in_place():
            for _ in range(2):
                record_step(recorder, engine, found["make_batch"], _loss)
        dist.barrier()
    return _report(recorder.timeline("lm_head"))


def gathered_in_place() -> list[list[list[float]]]:
    """What every rank gathers of all ranks' parts, at once and asynchronously: in DeepSpeed's own way, and in place."""
    import deepspeed.comm

    def gather() -> list[float]:
        rank, found = dist.get_rank(), []
        for asynchronous in (False, True):
            whole = torch.zeros(3 * dist.get_world_size())
            mine = whole.narrow(0, 3 * rank, 3) if asynchronous else torch.empty(3)
            mine.copy_(torch.arange(3) + 10.0 * rank)
            handle = deepspeed.comm.allgather_fn(whole, mine, async_op=asynchronous)
            if asynchronous:
                handle.wait()
            found += whole.tolist()
        return found

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    own = gather()
    with communicating_in_place():
        return [[own, gather()]]


def scattered_in_place() -> list[list[list[float]]]:
    """All ranks' parts of two gradients, filled up with zeros: in DeepSpeed's own way, and reduced where they lie."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    def parts() -> list[list[float]]:
        # Of an odd number of entries, and of an even one.
        made = [torch.arange(size, dtype=torch.float32) * (dist.get_rank() + 1) for size in (5, 4)]
        own = torch.cat(reduce_scatter_coalesced(made))
        found = [torch.zeros(5) for _ in range(dist.get_world_size())]
        dist.all_gather(found, torch.cat([own, own.new_zeros(5 - len(own))]))
        return [part.tolist() for part in found]

    found = [parts()]
    with communicating_in_place():
        return [*found, parts()]


def simulated(
    out: str,
    world_size: int,
    low: bool = False,
    quantized: bool = False,
    method: Method = "selection",
    experts: str | None = None,
    **job: Any,
) -> None:
    """The same, without data, in a process of its own; writes what :func:`real` returns."""
    found = _job(low=low, method=method, experts=experts, **job)
    model = _model(low, quantized, experts, device="meta")
    found["prepare"](model)
    with masks_of_fake_tensors(needed=False):
        timeline = simulate_training(
            model,
            settings=found["settings"],
            make_engine=found["make_engine"],
            make_batch=found["make_batch"],
            loss_fn=_loss,
            world_size=world_size,
            head="lm_head",
            trains_base=method == "full",
        )

    Path(out).write_text(json.dumps(_report(timeline)))


def numbers_of_fakes(out: str) -> None:
    """What the recorder answers for numbers that fake tensors do not have; whether it leaves torch as it was."""
    linear = torch.nn.functional.linear
    with fake_world(4):
        setattr(torch.nn.functional, "linear", None)  # noqa: B010 - as DeepSpeed's ZeRO 3 does, with its own
        ones = torch.ones(8)
        found = [
            float(ones.sum()), int(torch.zeros(3, dtype=torch.int64).sum()), bool(ones.isfinite().all()),
            bool((ones > 2).any()), list((ones > 0).nonzero().shape), dist.get_world_size(),
        ]  # fmt: skip
    Path(out).write_text(json.dumps([*found, dist.is_initialized(), torch.nn.functional.linear is linear]))
