"""What the spawned ranks do in the tests of ZeRO, checkpoints and adapters."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_zero as sz
import sparse_zero.zero.engine as engine_module
from scripts.dense_reference import adamw_on_entries
from sparse_zero.collectives import PeerError
from sparse_zero.layers.sparsify import selection_of, write_back
from sparse_zero.zero.compat import engine_of, inner_optimizer, is_partitioned, link_optimizer_states, whole
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.state import read_masters
from tests.sparse_zero.helpers import TinyModel, mixed_selection, owner_matrix, tiny_loss

GLOBAL_BATCH, LENGTH, VOCABULARY = 8, 9, 32
LEARNING_RATE, DECAY, CLIP = 3e-2, 0.1, 0.5


def make_model(bf16: bool = False) -> TinyModel:
    """The same weights on every rank and in every combination."""
    torch.manual_seed(7)
    model = TinyModel(vocabulary=VOCABULARY)
    return model.bfloat16() if bf16 else model


def make_batches(steps: int) -> Tensor:
    """[steps, GLOBAL_BATCH, LENGTH] token ids."""
    return torch.randint(0, VOCABULARY, (steps, GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def dense_reference(placement: Placement, steps: int, decay: float = DECAY) -> tuple[list[float], dict[str, Tensor]]:
    """Plain AdamW on the dense model that updates (and decays) the selected entries only; no code of ours."""
    model = make_model()
    masks = {name: owner_matrix(weight) > 0 for name, weight in mixed_selection(model).weights.items()}
    return adamw_on_entries(
        model, masks, tiny_loss, make_batches(steps), placement, learning_rate=LEARNING_RATE, decay=decay, clip=CLIP
    )


def make_engine(
    model: nn.Module, stage: int, micro_batch: int, accumulation: int, decay: float = DECAY, bf16: bool = False
) -> Any:
    """A real engine over the values, AdamW from torch."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    engine, *_ = sz.initialize(
        model=model,
        config=config,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=decay),
    )
    return engine


def train(
    engine: Any,
    batches: Tensor,
    micro_batch: int,
    accumulation: int,
    loss_of: Callable[[Any, Tensor], Tensor] = tiny_loss,
) -> list[float]:
    """Global losses of the steps over ``batches`` [steps, GLOBAL_BATCH, LENGTH]."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for tokens in batches:
        total = torch.zeros(())
        for number in range(accumulation):
            start = (number * world_size + rank) * micro_batch
            loss = loss_of(engine, tokens[start : start + micro_batch])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulation
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Dense weights that the engine's values stand for, from the masters."""
    reference = dict(make_model().named_parameters())
    model = engine.module
    selection = selection_of(model)
    masters = read_masters(engine)
    found = {}
    for name, weight in selection.weights.items():
        dense = reference[name].detach().clone()
        for kind in weight.kinds():
            values = masters[f"{name.removesuffix('.weight')}.values_{kind}"]
            positions = weight.flat_indices(kind)
            if model.get_submodule(name.removesuffix(".weight")).placement == "delta":
                values = dense.view(-1)[positions] + values
            dense.view(-1)[positions] = values
        found[name] = dense
    return found


def combinations() -> list[tuple[int, Placement, int, bool]]:
    """(stage, placement, accumulation, gradient checkpointing)."""
    return list(product((0, 1, 2, 3), PLACEMENTS, (1, 4), (False, True)))


def count_optimizer_elements(engine: Any) -> int:
    """Elements that the optimizers of all ranks own together."""
    inner = inner_optimizer(engine)
    local = sum(parameter.numel() for parameter, state in inner.state.items() if "exp_avg" in state)
    total = torch.tensor(local)
    dist.all_reduce(total)
    return int(total)


def invariants_1_and_3(steps: int) -> list[dict[str, Any]]:
    """Every combination at this world size against the dense reference."""
    world_size = dist.get_world_size()
    report = []
    references = {placement: dense_reference(placement, steps) for placement in PLACEMENTS}
    for stage, placement, accumulation, checkpointing in combinations():
        model = make_model()
        model.checkpointing = checkpointing
        selection = mixed_selection(model)
        sz.sparsify(model, selection, placement)
        requiring = sum(p.numel() for p in model.parameters() if p.requires_grad)
        micro_batch = GLOBAL_BATCH // (world_size * accumulation)
        engine = make_engine(model, stage, micro_batch, accumulation)
        losses = train(engine, make_batches(steps), micro_batch, accumulation)
        expected_losses, expected_weights = references[placement]
        weights = full_weights(engine)
        report.append(
            {
                "combination": [world_size, stage, placement, accumulation, checkpointing],
                "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)),
                "weight_difference": max(
                    float((weights[name] - expected_weights[name]).abs().max()) for name in weights
                ),
                "effect_of_training": abs(
                    expected_losses[-1] - tiny_loss(make_model(), make_batches(steps)[-1]).item()
                ),
                "num_parameters": selection.num_parameters,
                "requiring_grad": requiring,
                "optimizer_elements": count_optimizer_elements(engine) // (world_size if stage == 0 else 1),
                "num_groups": len(inner_optimizer(engine).param_groups),
                "dense_gradients": sum(p.grad is not None for n, p in model.named_parameters() if "values" not in n),
            }
        )
        engine.destroy()
    return report


def sparse_engine(
    stage: int,
    placement: Placement,
    decay: float = DECAY,
    selection: sz.Selection | None = None,
    bf16: bool = False,
) -> Any:
    """An engine over the tiny model whose micro-batch fills the global batch at this world size."""
    model = make_model(bf16)
    sz.sparsify(model, selection or mixed_selection(model), placement)
    return make_engine(model, stage, GLOBAL_BATCH // dist.get_world_size(), 1, decay, bf16)


def train_whole(engine: Any, batches: Tensor) -> list[float]:
    """Steps of one micro-batch per rank."""
    return train(engine, batches, GLOBAL_BATCH // dist.get_world_size(), 1)


PLACES: tuple[tuple[int, Placement], ...] = ((0, "inplace"), (1, "delta"), (2, "inplace"), (3, "delta"))

OTHER_PLACES: tuple[tuple[int, Placement], ...] = ((0, "inplace"), (1, "delta"), (2, "delta"), (3, "inplace"))


def write_checkpoints(folder: str, bf16: bool = False) -> list[dict[str, Any]]:
    """Train three steps, save, train two more; a second engine loads and trains the two again."""
    report = []
    for stage, placement in PLACES:
        batches = make_batches(5)
        engine = sparse_engine(stage, placement, bf16=bf16)
        before = train_whole(engine, batches[:3])
        path = Path(folder) / f"stage{stage}"
        sz.save_checkpoint(engine, path, extra={"step": 3})
        uninterrupted = train_whole(engine, batches[3:])
        engine.destroy()
        checkpoint = sz.read_checkpoint(path)
        resumed_engine = sparse_engine(stage, placement, selection=checkpoint.selection, bf16=bf16)
        loaded = sz.load_checkpoint(resumed_engine, path)
        resumed = train_whole(resumed_engine, batches[3:])
        resumed_engine.destroy()
        report.append(
            {
                "stage": stage,
                "before": before,
                "uninterrupted": uninterrupted,
                "resumed": resumed,
                "extra": loaded.extra,
                "optimizer_step": checkpoint.optimizer_step,
            }
        )
    return report


def resume_elsewhere(folder: str, decay: float) -> list[dict[str, Any]]:
    """Every checkpoint of ``folder`` continued at every stage that can, at this world size."""
    report = []
    for stored_stage, stored_placement in PLACES:
        for stage, placement in OTHER_PLACES:
            engine = sparse_engine(stage, placement, decay=decay)
            entry: dict[str, Any] = {
                "stored": [stored_stage, stored_placement],
                "into": [stage, placement],
                "error": None,
            }
            try:
                sz.load_checkpoint(engine, Path(folder) / f"stage{stored_stage}")
                entry["losses"] = train_whole(engine, make_batches(5)[3:])
            except (sz.InputError, PeerError) as error:
                entry["error"] = str(error)
            report.append(entry)
            engine.destroy()
    return report


def checkpoints_without_decay(folder: str) -> list[list[float]]:
    """Checkpoints after three steps without decay, and the losses of the two steps after them."""
    losses = []
    for stage, placement in PLACES:
        engine = sparse_engine(stage, placement, decay=0.0)
        train_whole(engine, make_batches(5)[:3])
        sz.save_checkpoint(engine, Path(folder) / f"stage{stage}")
        losses.append(train_whole(engine, make_batches(5)[3:]))
        engine.destroy()
    return losses


def select_on_ranks() -> dict[str, Any]:
    """Selections by every score on all ranks; the digests of this rank's."""
    from sparse_zero.collectives import check_equal_on_all_ranks
    from tests.sparse_zero.test_selection import config
    from tests.sparse_zero.test_selection import make_batches as calibration_data
    from tests.sparse_zero.test_selection import make_model as calibrated

    digests = {}
    for score in ("abs_of_mean", "mean_of_abs", "random", "first"):
        digests[score] = sz.select(calibrated(), calibration_data(7), config(score=score), tiny_loss).digest()
    caught = ""
    try:
        check_equal_on_all_ranks(f"rank {dist.get_rank()}", "the test's text")
    except RuntimeError as error:
        caught = str(error)
    return {"digests": digests, "disagreement": caught}


def adapters(folder: str, bf16: bool = False) -> list[dict[str, Any]]:
    """Train, save an adapter from the engine, load it on a fresh base in both placements, and merge."""
    report = []
    batch = make_batches(1)[0]
    for stage, placement in PLACES:
        engine = sparse_engine(stage, placement, decay=0.0, bf16=bf16)
        train_whole(engine, make_batches(3))
        engine.eval()
        with torch.no_grad():
            trained = engine(batch).clone()
        path = Path(folder) / f"adapter{stage}"
        sz.save_adapter(engine, path, base=sz.BaseIdentity(name="tiny", sha256="0" * 64))
        entry: dict[str, Any] = {"stage": stage, "placement": placement}
        for loaded_placement in PLACEMENTS:
            model = make_model(bf16)
            sz.load_adapter(model, path, placement=loaded_placement)
            with torch.no_grad():
                entry[f"{loaded_placement}_difference"] = float((model(batch) - trained).abs().max())
            entry[f"{loaded_placement}_trainable"] = sum(p.requires_grad for p in model.parameters())
        in_engine = {name: p.detach().clone() for name, p in full_weights(engine).items()}
        sz.merge(engine.module)
        entry["merged_equals_training"] = True
        for name, weight in in_engine.items():
            merged = engine.module.get_parameter(name)
            with whole(merged):
                entry["merged_equals_training"] &= torch.equal(merged, weight.to(merged.dtype))
        report.append(entry)
        engine.destroy()
    return report


def non_finite_steps() -> list[dict[str, Any]]:
    """A step with an infinite loss on one rank only must change nothing on any, at every stage."""
    from sparse_zero.zero.engine import step_was_applied

    report = []
    for stage, placement in (*PLACES, OTHER_PLACES[3]):
        engine = sparse_engine(stage, placement)
        batches = make_batches(4)
        size = GLOBAL_BATCH // dist.get_world_size()
        train_whole(engine, batches[:1])
        applied_before = step_was_applied(engine)
        before = read_masters(engine)
        loss = tiny_loss(engine, batches[1][:size]) * (float("inf") if dist.get_rank() == 0 else 1.0)
        engine.backward(loss)
        engine.step()
        after = read_masters(engine)
        skipped = not step_was_applied(engine)
        losses = train_whole(engine, batches[2:])
        report.append(
            {
                "stage": stage,
                "applied_before": applied_before,
                "skipped": skipped,
                "unchanged": all(torch.equal(before[name], after[name]) for name in before),
                "weights_finite": all(bool(w.isfinite().all()) for w in full_weights(engine).values()),
                "finite_afterwards": all(loss == loss for loss in losses),
                "applied_afterwards": step_was_applied(engine),
            }
        )
        engine.destroy()
    return report


def refusals() -> dict[str, str]:
    """What initialize refuses by name."""
    found = {}
    cases = {"dense": make_model(), "extra": make_model()}
    sz.sparsify(cases["extra"], mixed_selection(cases["extra"]), "inplace")
    cases["extra"].lm_head.weight.requires_grad_(True)
    for name, model in cases.items():
        try:
            make_engine(model, 2, GLOBAL_BATCH, 1)
        except sz.InputError as error:
            found[name] = str(error)
    half = make_model()
    sz.sparsify(half, mixed_selection(half), "inplace")
    try:
        sz.initialize(model=half, config={"fp16": {"enabled": True}})
    except sz.InputError as error:
        found["stage0"] = str(error)
    # Shards that inplace values cannot be written into.
    inplace = make_model()
    sz.sparsify(inplace, mixed_selection(inplace), "inplace")
    sections: dict[str, dict[str, Any]] = {
        "disk": {"offload_param": {"device": "nvme", "nvme_path": "."}},
        "quantized": {"zero_quantized_nontrainable_weights": True},
    }
    for name, section in sections.items():
        try:
            sz.initialize(model=inplace, config={"train_batch_size": 1, "zero_optimization": {"stage": 3, **section}})
        except sz.InputError as error:
            found[name] = str(error)
    return found


def write_back_calls() -> dict[str, int]:
    """How often values are written back over four boundaries of four micro-batches."""
    model = make_model()
    sz.sparsify(model, mixed_selection(model), "inplace")
    calls = 0

    def counting(module: nn.Module) -> None:
        nonlocal calls
        calls += 1
        write_back(module)

    vars(engine_module)["write_back"] = counting
    engine = make_engine(model, 2, GLOBAL_BATCH // (4 * dist.get_world_size()), 4)
    at_start = calls
    train(engine, make_batches(4), GLOBAL_BATCH // (4 * dist.get_world_size()), 4)
    sz.attach(engine)
    vars(engine_module)["write_back"] = write_back
    equal = all(torch.equal(model.get_parameter(name), weight) for name, weight in full_weights(engine).items())
    return {"at_start": at_start, "during_training": calls - at_start, "weights_equal_values": int(equal)}


class _CountTraffic(TorchDispatchMode):
    """Bytes that collectives move: of each, the largest tensor handed to it (a gather's output, say)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.bytes += max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            self.calls += 1
        return function(*args, **(kwargs or {}))


def communicated_bytes(stage: int) -> dict[str, int]:
    """Bytes that collectives move in one optimizer step after the first."""
    engine = sparse_engine(stage, "inplace")
    batches = make_batches(2)
    size = GLOBAL_BATCH // dist.get_world_size()
    train_whole(engine, batches[:1])
    start = dist.get_rank() * size
    with _CountTraffic() as traffic:
        engine.backward(tiny_loss(engine, batches[1][start : start + size]))
        engine.step()
    values = selection_of(engine.module).num_parameters
    dense = sum(parameter.numel() for parameter in engine.module.parameters())
    engine.destroy()
    return {"bytes": traffic.bytes, "calls": traffic.calls, "value_bytes": 4 * values, "dense_bytes": 4 * dense}


def private_names() -> dict[str, Any]:
    """What sparse_zero.zero.compat relies on, as this DeepSpeed has it."""
    found: dict[str, Any] = {}
    for stage, placement in PLACES[1:]:
        engine = sparse_engine(stage, placement)
        optimizer = engine.optimizer
        parameter: Any = next(iter(sz.trainable_parameters(engine.module).values()))
        entry: dict[str, Any] = {
            "inner_is_torch": isinstance(optimizer.optimizer, torch.optim.AdamW),
            "overflow": hasattr(optimizer, "overflow"),
            "partitioned": is_partitioned(parameter),
        }
        train_whole(engine, make_batches(1))
        if stage < 3:
            entry["links"] = hasattr(optimizer, "_hp_optimizer_states_linked")
            values: list[Any] = list(sz.trainable_parameters(engine.module).values())
            mapped = [p for p in values if p._hp_mapping is not None]
            entry["linked_before"] = sum("exp_avg" in p._hp_mapping.optim_fragment for p in mapped) == len(mapped)
            link_optimizer_states(engine)
            entry["linked_after"] = sum("exp_avg" in p._hp_mapping.optim_fragment for p in mapped) == len(mapped)
        else:
            entry["flat_groups"] = len(optimizer.fp32_partitioned_groups_flat)
            entry["shard"] = hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_process_group")
            wanted = ("ds_numel", "ds_status", "ds_persist", "ds_active_sub_modules", "ds_secondary_tensor")
            entry["missing"] = [
                name for name in (*wanted, "ds_zero_param_process_group", "all_gather") if not hasattr(parameter, name)
            ]
            entry["missing"] += [
                name for name in ("ds_numel", "final_location") if not hasattr(parameter.ds_tensor, name)
            ]
            entry["registry"] = list(engine.module.ds_inflight_param_registry) == []
        found[str(stage)] = entry
        engine.destroy()
    return found


def engines_of_a_model() -> dict[str, bool]:
    """Whether compat.engine_of finds none, the only one, and the newest of two."""
    model = make_model()
    sz.sparsify(model, mixed_selection(model), "inplace")
    report = {"before": engine_of(model) is None}
    first = make_engine(model, 1, GLOBAL_BATCH, 1)
    report["first"] = engine_of(model) is first
    second = make_engine(model, 1, GLOBAL_BATCH, 1)
    report["newest"] = engine_of(model) is second
    return report
