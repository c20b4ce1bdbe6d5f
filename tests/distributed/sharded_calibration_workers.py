"""What test_sharded_calibration runs on each rank."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sparse_zero as sz
from models.gather import gather_json
from models.loading import ModelConfig, load_model
from models.sharded_loading import load_sharded
from sparse_zero.collectives import PeerError
from sparse_zero.errors import InputError
from sparse_zero.layers.frozen_linear import FrozenLinear
from sparse_zero.selection.select import score_regions
from sparse_zero.zero.inference import sharded_forward

SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
}


def scores(folder: str, checkpointing: bool) -> dict[str, Any]:
    """Scores by gradients of a model in shards and of a whole one; the largest relative difference."""
    config = sz.SelectionConfig(
        regions=(
            sz.RegionConfig(kind="block", modules=("*.q_proj", "*.down_proj"), block_size=16),
            sz.RegionConfig(kind="column", modules=("*.v_proj",)),
        ),
        budget=sz.BudgetConfig(fraction=0.05),
    )
    source = ModelConfig(name_or_path=folder, dtype="float32")
    whole, sharded = load_model(source), load_sharded(source, SETTINGS)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 300, (2, 24), generator=generator) for _ in range(4)]
    batches = [{"input_ids": each, "labels": each} for each in tokens]
    for model in (whole, sharded):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = score_regions(whole, batches, config).scores
    with sharded_forward(sharded, SETTINGS):
        frozen = sum(type(module) is FrozenLinear for module in sharded.modules())
        found = score_regions(sharded, batches, config).scores
    differences = [float((found[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in expected]
    return {
        "difference": max(differences),
        "frozen": frozen,
        "left": sum(type(module) is FrozenLinear for module in sharded.modules()),
        "linears": sum(isinstance(module, nn.Linear) for module in sharded.modules()),
    }


def refused(folder: str) -> list[Any]:
    """What all ranks are told where the micro-batch of the last one is of no use: for each loss, what is raised."""
    config = sz.SelectionConfig(regions=(sz.RegionConfig(kind="row", modules=("*.q_proj",), per_matrix=1),))
    sharded = load_sharded(ModelConfig(name_or_path=folder, dtype="float32"), SETTINGS)
    tokens = torch.arange(24).view(2, 12)
    good, last = {"input_ids": tokens, "labels": tokens}, dist.get_rank() == dist.get_world_size() - 1

    def unreduced(model: Any, batch: Any) -> Any:
        loss = model(**batch).loss
        return loss.repeat(2) if last else loss

    def detached(model: Any, batch: Any) -> Any:
        loss = model(**batch).loss
        return loss.detach() if last else loss

    told = []
    for batch, loss_fn in (({"input_ids": tokens}, None), (good, unreduced), (good, detached), (good, None)):
        try:
            with sharded_forward(sharded, SETTINGS):
                score_regions(sharded, [good, batch], config, loss_fn)
            told.append("nothing")
        except (InputError, PeerError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return gather_json(told)
