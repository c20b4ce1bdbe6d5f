"""What the spawned ranks do in the tests of snapshots, random streams, counters and errors of checkpoints."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import sparse_zero as sz
from sparse_zero.checkpoint.checkpoint import read_checkpoint, take_snapshot, write_snapshot
from sparse_zero.checkpoint.conversion import convert_values, originals_by_name
from sparse_zero.checkpoint.writer import CheckpointWriter
from sparse_zero.collectives import PeerError, failing_together
from sparse_zero.layers.sparsify import trainable_parameters
from sparse_zero.zero import compat
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.shards import whole_values
from sparse_zero.zero.state import read_masters, read_training_state
from tests.distributed.optimizer_workers import standing
from tests.distributed.workers import (
    GLOBAL_BATCH,
    PLACES,
    make_batches,
    make_engine,
    make_model,
    sparse_engine,
    train,
)
from tests.sparse_zero.helpers import mixed_selection, tiny_loss


def noisy_loss(engine: Any, tokens: Tensor) -> Tensor:
    """A loss that draws from every stream of random numbers, as dropout draws from torch's."""
    noise = float(torch.rand(())) + random.gauss(0.0, 0.1) + float(np.random.standard_normal()) / 10
    return tiny_loss(engine, tokens) * (1.0 + noise)


def train_noisily(engine: Any, batches: Tensor) -> list[float]:
    """Steps of one micro-batch per rank."""
    return train(engine, batches, GLOBAL_BATCH // dist.get_world_size(), 1, loss_of=noisy_loss)


def _seed(seed: int) -> None:
    torch.manual_seed(seed + dist.get_rank())
    random.seed(seed + dist.get_rank())
    np.random.seed(seed + dist.get_rank())


def _equal(one: Any, other: Any) -> bool:
    """Whether two training states have equal bits."""
    return (
        one.step == other.step
        and one.masters.keys() == other.masters.keys()
        and all(torch.equal(one.masters[name], other.masters[name]) for name in one.masters)
        and one.moments.keys() == other.moments.keys()
        and all(torch.equal(held[n], other.moments[s][n]) for s, held in one.moments.items() for n in held)
    )


def snapshots(folder: str) -> list[dict[str, Any]]:
    """Snapshots that are written when training has gone on, and what a resume from them does."""
    report = []
    for stage, placement in (PLACES[0], *PLACES[2:]):  # Stage 1 keeps its state as stage 2 does.
        batches, path = make_batches(5), Path(folder) / f"stage{stage}"
        engine = sparse_engine(stage, placement)
        _seed(5)
        train_noisily(engine, batches[:3])
        state = read_training_state(engine)
        snapshot = take_snapshot(engine, extra={"step": 3}, config={"training": {"steps": 5}})
        uninterrupted = train_noisily(engine, batches[3:])
        with failing_together(), CheckpointWriter() as writer:
            if snapshot is not None:
                writer.submit(snapshot, path)
        engine.destroy()
        resumed_engine = sparse_engine(stage, placement)
        _seed(6)
        loaded = sz.load_checkpoint(resumed_engine, path)
        same = _equal(state, loaded.read_state())
        resumed = train_noisily(resumed_engine, batches[3:])
        resumed_engine.destroy()
        report.append(
            {
                "stage": stage,
                "is_kept": gathered(snapshot is not None),
                "same": same,
                "uninterrupted": uninterrupted,
                "resumed": resumed,
                "extra": loaded.extra,
                "config": loaded.config,
                "rng": None if loaded.header.rng is None else asdict(loaded.header.rng),
            }
        )
    return report


def gathered(value: bool) -> list[bool]:
    """One flag of each rank."""
    flags = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, torch.tensor(float(value)))
    return [bool(flag) for flag in flags]


OFFLOADS: tuple[tuple[int, Placement, list[str]], ...] = (
    (1, "inplace", ["offload_optimizer"]),
    (2, "delta", ["offload_optimizer"]),
    (3, "inplace", ["offload_optimizer", "offload_param"]),
    (3, "inplace", []),
)


def _offloading_engine(stage: int, placement: Placement, offloads: list[str]) -> Any:
    model = make_model()
    sz.sparsify(model, mixed_selection(model), placement)
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **{name: {"device": "cpu"} for name in offloads}},
        "steps_per_print": 10**9,
    }
    engine, *_ = sz.initialize(
        model=model, config=config, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    )
    return engine


def offloading(folder: str) -> list[dict[str, Any]]:
    """Checkpoints from each offload setting, continued with the next one, and with itself."""
    report, batches = [], make_batches(5)
    size = GLOBAL_BATCH // dist.get_world_size()
    for number, (stage, placement, offloads) in enumerate(OFFLOADS):
        engine = _offloading_engine(stage, placement, offloads)
        train(engine, batches[:3], size, 1)
        sz.save_checkpoint(engine, Path(folder) / str(number))
        entry: dict[str, Any] = {"stored": number, "uninterrupted": train(engine, batches[3:], size, 1)}
        engine.destroy()
        for name, into in (("same", number), ("other", (number + 1) % len(OFFLOADS))):
            engine = _offloading_engine(*OFFLOADS[into])
            sz.load_checkpoint(engine, Path(folder) / str(number))
            entry[name] = train(engine, batches[3:], size, 1)
            engine.destroy()
        report.append(entry)
    return report


def _uncounted_engine() -> Any:
    """bf16 with stochastic rounding, whose noise depends on the step, an optimizer that does not count, a schedule."""
    model = make_model(bf16=True)
    sz.sparsify(model, mixed_selection(model), "inplace")
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 2, "total_num_steps": 6, "warmup_max_lr": 0.5},
        },
        "steps_per_print": 10**9,
    }
    engine, *_ = sz.initialize(
        model=model,
        config=config,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.9),
        rounding="stochastic",
        rounding_seed=3,
    )
    return engine


def counters(folder: str) -> dict[str, Any]:
    """An optimizer without a step counter, stochastic rounding and an engine's schedule go on where they were."""
    batches, size = make_batches(6), GLOBAL_BATCH // dist.get_world_size()
    engine = _uncounted_engine()
    train(engine, batches[:3], size, 1)
    sz.save_checkpoint(engine, folder)
    values = [each.clone() for each in whole_values(trainable_parameters(engine.module).values())]
    uninterrupted = train(engine, batches[3:], size, 1)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    engine.destroy()
    engine = _uncounted_engine()
    loaded = sz.load_checkpoint(engine, folder)
    again = whole_values(trainable_parameters(engine.module).values())
    same_values = all(torch.equal(one, other) for one, other in zip(values, again, strict=True))
    resumed = train(engine, batches[3:], size, 1)
    return {
        "step": loaded.optimizer_step,
        "same_values": same_values,
        "uninterrupted": uninterrupted,
        "resumed": resumed,
        "rates": [rates, [group["lr"] for group in engine.optimizer.param_groups]],
    }


def unreadable(folder: str) -> dict[str, Any]:
    """One rank cannot read the checkpoint, or has another base: all ranks fail, and the engine trains on as before."""
    batches, found = make_batches(5), {}
    engine = sparse_engine(2, "inplace")
    expected_engine = sparse_engine(2, "inplace")
    path, is_last = Path(folder) / "checkpoint", dist.get_rank() == dist.get_world_size() - 1
    sz.save_checkpoint(engine, path)
    for name, mine in (("folder", Path(folder) / "nowhere" if is_last else path), ("whole", path)):
        if name == "whole" and is_last:
            # Damaged where only this rank reads it: its own view of one file.
            whole = read_checkpoint(path)
            mine = type(whole)(
                folder=Path(folder) / "empty", selection=whole.selection, retired=whole.retired, header=whole.header
            )  # type: ignore[assignment]
        try:
            sz.load_checkpoint(engine, mine)
            error = "none"
        except sz.InputError as refused:
            error = f"InputError: {refused}"
        except PeerError as refused:
            error = f"PeerError: {refused}"
        found[name] = error
    after = train(engine, batches, GLOBAL_BATCH // dist.get_world_size(), 1)
    expected = train(expected_engine, batches, GLOBAL_BATCH // dist.get_world_size(), 1)
    return {"errors_of_rank_zero": found, "after": after, "expected": expected}


def starts(folder: str) -> dict[str, Any]:
    """What ranks continue from that see folders of their own: the last rank's lacks one checkpoint, and one is damaged."""
    import shutil
    import warnings

    from launcher.resuming import choose_start
    from launcher.run_folder import RunFolder
    from tests.launcher.test_run_folder import make

    is_last = dist.get_rank() == dist.get_world_size() - 1
    mine = RunFolder(Path(folder) / str(dist.get_rank()))
    engine = sparse_engine(1, "inplace")
    for step in (2, 4, 6):
        checkpoint = take_snapshot(engine, extra={"step": step}, random_states=False, keep=True)
        assert checkpoint is not None
        write_snapshot(checkpoint, mine.checkpoint(step))
    if is_last:
        shutil.rmtree(mine.checkpoint(6))
        (mine.checkpoint(4) / "moments.safetensors").write_bytes(b"")
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chosen = choose_start(mine, make(mine.path))
    found["step"] = None if chosen is None else chosen.extra["step"]
    found["told"] = [str(each.message) for each in told]
    if is_last:
        shutil.rmtree(mine.checkpoints)
    try:
        choose_start(mine, make(mine.path))
    except sz.InputError as error:
        found["blind"] = str(error)
    return found


def _loaded_engine(
    folder: Path, stage: int, placement: Placement, *, sharded: bool = False, changed: bool = False
) -> Any:
    """A bf16 engine that goes on from an adapter."""
    model, size = make_model(bf16=True), GLOBAL_BATCH // dist.get_world_size()
    if sharded:
        config = {
            "train_micro_batch_size_per_gpu": size,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
        }
        init = compat.start_sharding(config)
        for parameter in model.parameters():
            compat.shards_of_rank_zero(init, parameter)
    sz.load_adapter(model, folder, placement=placement, trainable=True)
    if changed:
        with torch.no_grad():
            for values in trainable_parameters(model).values():
                values[0] = 0.5
    return make_engine(model, stage, size, 1, 0.0, bf16=True)


def continued_adapters(folder: str) -> list[dict[str, Any]]:
    """bf16 engines that go on from an adapter of small changes: their masters, beside those that were saved."""
    report = []
    learned = Path(folder) / "learned"
    for placement in PLACEMENTS:
        engine = sparse_engine(2, placement, decay=0.0, bf16=True)
        with torch.no_grad():
            # Less than bf16 shows of most entries.
            for group in engine.optimizer.single_partition_of_fp32_groups:
                group.add_(1e-5)
        engine_masters, originals = read_masters(engine), originals_by_name(engine.module)
        sz.save_adapter(engine, learned)
        engine.destroy()
        hidden = sum(
            int((numbers.bfloat16().float() != numbers).sum()) / sum(map(len, engine_masters.values()))
            for numbers in engine_masters.values()
        )
        for stage, into, sharded in (
            *((stage, placement, False) for stage in range(4)),
            (3, placement, True),
            (1, "delta" if placement == "inplace" else "inplace", False),
        ):
            wanted = convert_values(engine_masters, originals, placement, into)
            continued = _loaded_engine(learned, stage, into, sharded=sharded)
            found, values = read_masters(continued), trainable_parameters(continued.module)
            whole = dict(zip(values, whole_values(values.values()), strict=True))
            rounded = all(torch.equal(whole[name].bfloat16(), wanted[name].bfloat16()) for name in wanted)
            entries = standing(continued)
            stands = into == "delta" or all(torch.equal(entries[name], wanted[name].bfloat16()) for name in wanted)
            losses = train(continued, make_batches(2), GLOBAL_BATCH // dist.get_world_size(), 1)
            continued.destroy()
            report.append(
                {
                    "combination": [placement, stage, into, sharded],
                    "hidden": hidden,
                    "same": all(torch.equal(found[name], wanted[name]) for name in wanted),
                    "rounded": rounded,
                    "stands": stands,
                    "losses": losses,
                }
            )
        changed = _loaded_engine(learned, 2, placement, changed=True)
        for name, numbers in read_masters(changed).items():
            expected = engine_masters[name].clone()
            expected[0] = 0.5
            report[-1]["same"] &= torch.equal(numbers, expected)
        changed.destroy()
    return report
