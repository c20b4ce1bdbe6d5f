"""What the spawned ranks do in the tests of model families: train transposed, tied, expert and classifier weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sparse_zero as sz
from sparse_zero.layers.carriers import carriers
from sparse_zero.layers.sparse_parameter import SparseParameter
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import whole_values
from tests.distributed import workers
from tests.distributed.workers import CLIP, DECAY, LEARNING_RATE, count_optimizer_elements, make_engine
from tests.models.tiny_families import FAMILIES, TinyFamily, dense_training, family_loss, hand_made_selection
from tests.models.tiny_families import make_batches as batches_of

GLOBAL_BATCH, ACCUMULATION, STEPS = 8, 2, 5


def make_batches() -> Tensor:
    """[STEPS, GLOBAL_BATCH, length] token ids."""
    return batches_of(STEPS, batch=GLOBAL_BATCH)


def sparse_engine(family: TinyFamily, placement: Placement, stage: int, only: str = "") -> Any:
    """An engine over every kind of region in the family's matrices and vectors; layers are recomputed.

    Args:
        family: what is trained.
        placement: inplace or delta.
        stage: of ZeRO.
        only: part of the names of the weights to select; default: all.
    """
    model = family.make()
    selection = hand_made_selection(family, model, "mixed")
    sz.sparsify(model, sz.Selection({name: w for name, w in selection.weights.items() if only in name}), placement)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return make_engine(model, stage, GLOBAL_BATCH // (dist.get_world_size() * ACCUMULATION), ACCUMULATION)


def train(family: TinyFamily, engine: Any, batches: Tensor) -> list[float]:
    """Global losses of the steps over ``batches``."""
    size = GLOBAL_BATCH // (dist.get_world_size() * ACCUMULATION)
    return workers.train(engine, batches, size, ACCUMULATION, partial(family_loss, family))


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two lists of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def families_equal_dense(name: str, folder: str) -> list[dict[str, Any]]:
    """Stages and placements against dense AdamW; then resumed from a checkpoint, and as an adapter."""
    family, batches = FAMILIES[name], make_batches()
    report = []
    places: tuple[tuple[int, Placement], ...] = ((1, "inplace"), (2, "delta"), (3, "inplace"), (3, "delta"))
    for stage, placement in places:
        engine = sparse_engine(family, placement, stage)
        model = engine.module
        selection = hand_made_selection(family, family.make(), "mixed")
        expected, _ = dense_training(
            family, selection, placement, batches, learning_rate=LEARNING_RATE, decay=DECAY, clip=CLIP
        )
        path = Path(folder) / f"{placement}{stage}"
        losses = train(family, engine, batches[:3])
        sz.save_checkpoint(engine, path / "checkpoint", extra={})
        losses += train(family, engine, batches[3:])
        hooked = [carrier for _, carrier in carriers(model) if isinstance(carrier, SparseParameter)]
        entry: dict[str, Any] = {
            "case": [name, stage, placement],
            "difference": difference(losses, expected),
            "effect": abs(expected[-1] - family_loss(family, family.make().train(), batches[-1]).item()),
            "num_parameters": selection.num_parameters,
            "optimizer_elements": count_optimizer_elements(engine),
            "hooked": len(hooked),
            "dense_gradients": sum(p.grad is not None for n, p in model.named_parameters() if "values_" not in n),
        }
        if placement == "inplace":
            whole = [whole_values(carrier.values().values()) for carrier in hooked]
            entry["written_back"] = all(
                torch.equal(carrier.entries(kind), values)
                for carrier, found in zip(hooked, whole, strict=True)
                for kind, values in zip(carrier.values(), found, strict=True)
            )
        sz.save_adapter(engine, path / "adapter")
        model.eval()
        with torch.no_grad():
            trained = engine(input_ids=batches[0]).logits
            loaded = family.make().eval()
            sz.load_adapter(loaded, path / "adapter", placement=placement)
            entry["adapter_difference"] = float((loaded(input_ids=batches[0]).logits - trained).abs().max())
        engine.destroy()

        resumed = sparse_engine(family, placement, stage)
        sz.load_checkpoint(resumed, path / "checkpoint")
        entry["resumed_difference"] = difference(train(family, resumed, batches[3:]), losses[3:])
        resumed.destroy()
        report.append(entry)
    return report
