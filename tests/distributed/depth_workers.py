"""What the spawned ranks do in the tests of how deep backward goes: count its operations, and choose by depth."""

from dataclasses import replace
from itertools import product
from typing import Any

import torch.distributed as dist

import sparse_zero as sz
from sparse_zero.layers.sparsify import selection_of
from tests.distributed.workers import make_batches, make_engine, make_model
from tests.models.depth_cost import NUM_LAYERS, backward_flops, make_batch, sparse_llama
from tests.sparse_zero.helpers import tiny_loss


def flops_under_engines() -> list[dict[str, object]]:
    """Of stages and ways to train, the operations of backward, by the engine and by autograd alone."""
    report = []
    for stage, (placement, checkpointing, batching), lowest in product(
        (0, 1, 2, 3),
        (("inplace", False, "pack"), ("inplace", True, "pad"), ("delta", True, "pack")),
        (1, NUM_LAYERS - 1),
    ):
        batch = make_batch(batching)  # type: ignore[arg-type]
        plain = sparse_llama(lowest, placement, checkpointing=checkpointing)  # type: ignore[arg-type]
        expected = backward_flops(plain, batch, lambda loss: loss.backward())
        model = sparse_llama(lowest, placement, checkpointing=checkpointing)  # type: ignore[arg-type]
        engine = make_engine(model, stage, 1, 1)
        engine.train()
        found = backward_flops(engine, batch, engine.backward)
        engine.step()
        engine.destroy()
        case = f"stage {stage}, {placement}, checkpointing {checkpointing}, {batching}, from layer {lowest}"
        report.append({"case": case, "expected": expected, "found": found})
    return report


def choices_by_depth() -> list[dict[str, Any]]:
    """Selections bounded by depth, and what a re-selection makes of one under an engine."""
    regions = (
        sz.RegionConfig(kind="block", modules=("*.{q,k,v}_proj",), block_size=5),
        sz.RegionConfig(kind="row", modules=("*.o_proj",)),
    )
    usual = sz.SelectionConfig(regions=regions, score="l2", budget=sz.BudgetConfig(parameters=300))
    batches, size = make_batches(4), 8 // dist.get_world_size()
    report: list[dict[str, Any]] = []
    for changes in ({}, {"depth_tradeoff": 1.0}, {"depth_tradeoff": 8.0}, {"min_depth": 0.4}):
        config = replace(usual, **changes)  # type: ignore[arg-type]
        model = make_model()
        selection = sz.select(model, batches, config, tiny_loss)
        # Another one, so that there is something to change.
        first = sz.select(model, None, replace(config, score="random", depth_tradeoff=0.0))
        sz.sparsify(model, first, "inplace")
        again = replace(config, reselect=sz.ReselectConfig(every=1))
        engine, found = sz.reselect(
            make_engine(model, 2, size, 1),
            batches,
            again,
            make_engine=lambda sparse: make_engine(sparse, 2, size, 1),
            loss_fn=tiny_loss,
            step=1,
        )
        reselected = selection_of(engine.module)
        report.append(
            {
                "digest": selection.digest(),
                "depth": selection.metadata["depth"],
                "changed": found.changed,
                "reselected": reselected.digest(),
            }
        )
        engine.destroy()
    return report
