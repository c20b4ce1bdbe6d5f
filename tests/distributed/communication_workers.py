"""What the spawned ranks do in the tests of communication, of the start without a broadcast, and of offloading."""

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sparse_zero as sz
from sparse_zero.zero.communication import counted, engine_communication
from sparse_zero.zero.compat import detach_engine
from sparse_zero.zero.config import Placement
from sparse_zero.zero.state import read_training_state, write_training_state
from tests.distributed.workers import VOCABULARY, make_batches, train
from tests.sparse_zero.helpers import TinyModel, mixed_selection

HIDDEN, LAYERS = 64, 3


def make_model() -> TinyModel:
    """Large enough that padding is no percent of it."""
    torch.manual_seed(7)
    return TinyModel(hidden=HIDDEN, layers=LAYERS, vocabulary=VOCABULARY)


def make_engine(
    stage: int, placement: Placement, accumulation: int, *, low: bool = False, zero: dict[str, Any] | None = None,
    model: nn.Module | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """An engine whose stage 3 shards everything but the norms, and gives weights back after every use."""
    if model is None:
        model = make_model().bfloat16() if low else make_model()
        sz.sparsify(model, mixed_selection(model, block_size=24), placement)
    options = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0} if stage == 3 else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **options, **(zero or {})},
        "bf16": {"enabled": low},
        "steps_per_print": 10**9,
    }
    engine, *_ = sz.initialize(
        model=model,
        config=config,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        **arguments,
    )
    return engine


def bytes_of_steps(combinations: list[tuple[int, Placement, int, bool, bool, int]]) -> list[dict[str, Any]]:
    """Measured and expected bytes of one step after three others, for each combination."""
    report = []
    for stage, placement, accumulation, checkpointing, low, persistent in combinations:
        model = make_model().bfloat16() if low else make_model()
        model.checkpointing = checkpointing
        for layer in model.layers:
            vars(layer)["gradient_checkpointing"] = checkpointing
        sz.sparsify(model, mixed_selection(model, block_size=24), placement)
        zero = {"stage3_param_persistence_threshold": persistent} if stage == 3 else {}
        engine = make_engine(stage, placement, accumulation, low=low, model=model, zero=zero)
        train(engine, make_batches(3), 1, accumulation)
        with counted() as traffic:
            for tokens in make_batches(1):
                for number in range(accumulation):
                    start = (number * dist.get_world_size() + dist.get_rank()) % 8
                    logits = engine(tokens[start : start + 1])
                    engine.backward(logits.float().square().mean())
                    engine.step()
        report.append(
            {
                "combination": [stage, placement, accumulation, checkpointing, low, persistent],
                "traffic": {name: asdict(each) for name, each in traffic.items()},
                "expected": engine_communication(engine),
            }
        )
        engine.destroy()
    return report


def start_without_broadcast() -> dict[str, Any]:
    """What travels at the start of engines with and without DeepSpeed's broadcast, and what a difference is called."""
    report: dict[str, Any] = {"weights": 4 * sum(each.numel() for each in make_model().parameters())}
    for stage in (2, 3):
        placement: Placement = "inplace" if stage == 2 else "delta"
        losses = {}
        for broadcasts in (True, False):
            with counted() as traffic:
                engine = make_engine(stage, placement, 1, broadcast_weights=broadcasts)
            report[f"broadcast {stage} {broadcasts}"] = traffic["broadcast"].bytes if "broadcast" in traffic else 0
            report[f"all {stage} {broadcasts}"] = sum(each.bytes for each in traffic.values())
            losses[broadcasts] = train(engine, make_batches(2), 4, 1)
            engine.destroy()
        report[f"equal {stage}"] = losses[True] == losses[False]
    model = make_model()
    sz.sparsify(model, mixed_selection(model, block_size=24), "inplace")
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.layers[2].self_attn.o_proj.weight[3, 5] += 1e-7
    try:
        make_engine(2, "inplace", 1, model=model, broadcast_weights=False)
    except sz.InputError as error:
        report["different weight"] = str(error)
    model = TinyModel(hidden=HIDDEN, layers=LAYERS + dist.get_rank(), vocabulary=VOCABULARY)
    sz.sparsify(model, mixed_selection(model, block_size=24), "inplace")
    try:
        make_engine(2, "inplace", 1, model=model, broadcast_weights=False)
    except sz.InputError as error:
        report["different model"] = str(error)
    report["then"] = make_engine(1, "inplace", 1).zero_optimization_stage()
    return report


def offloaded_losses() -> dict[str, list[list[float]]]:
    """Losses with and without offloading, by what is offloaded; then of training continued from the state read back."""
    cpu = {"device": "cpu"}
    cases: list[tuple[int, Placement, dict[str, Any]]] = [
        (1, "inplace", {"offload_optimizer": cpu}),
        (2, "delta", {"offload_optimizer": cpu}),
        (3, "inplace", {"offload_optimizer": cpu, "offload_param": cpu}),
        (3, "delta", {"offload_param": cpu}),
    ]
    report = {}
    batches = make_batches(6)
    for stage, placement, zero in cases:
        losses = []
        for options in ({}, zero):
            engine = make_engine(stage, placement, 2, zero=options)
            first = train(engine, batches[:3], 2, 2)
            state = read_training_state(engine)
            losses.append(first + train(engine, batches[3:], 2, 2))
            detach_engine(engine)
        # What was read from the offloaded state goes into a new, offloaded engine, which goes on as the first did.
        engine = make_engine(stage, placement, 2, zero=zero)
        write_training_state(engine, state)
        losses.append(losses[0][:3] + train(engine, batches[3:], 2, 2))
        detach_engine(engine)
        report[f"{stage} {placement} {'+'.join(zero)}"] = losses
    return report
