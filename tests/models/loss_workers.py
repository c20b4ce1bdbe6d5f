"""What the spawned ranks do in the tests of the loss in chunks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sparse_zero as sz
from models.loss import response_nll
from sparse_zero.layers.sparsify import trainable_parameters
from sparse_zero.zero.shards import whole_values
from tests.models.tiny_families import FAMILIES, SMALL

STEPS, ROWS, LENGTH = 3, 4, 11
CASES = {
    "frozen head": ("llama", "inplace", ()),
    "tied head": ("llama_tied", "inplace", ()),
    "trained head": ("llama", "inplace", ({"kind": "block", "block_size": 8, "per_matrix": 3},)),
    "trained head, delta": ("llama", "delta", ({"kind": "row", "per_matrix": 3},)),
}


def _model(family: str, placement: Any, head: tuple[dict[str, Any], ...]) -> Any:
    model = FAMILIES[family].make()
    regions = [sz.RegionConfig(modules=("lm_head",), **each) for each in head]
    regions.append(sz.RegionConfig(kind="row", modules=("*.q_proj", "*.down_proj"), per_matrix=2))
    config = sz.SelectionConfig(regions=tuple(regions), score="random")
    sz.sparsify(model, sz.select(model, None, config), placement)
    return model


def _batch(step: int, rows: slice) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, SMALL["vocab_size"], (ROWS, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[:2, :5] = -100
    return {"input_ids": tokens[rows], "labels": labels[rows], "attention_mask": torch.ones_like(tokens)[rows]}


def _alone(family: str, placement: Any, head: tuple[dict[str, Any], ...]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and what training has added to the values: one process, all logits at once."""
    model = _model(family, placement, head)
    before = {name: each.detach().clone() for name, each in trainable_parameters(model).items()}
    optimizer = torch.optim.SGD(sz.parameter_groups(model), lr=0.01)
    losses = []
    for step in range(STEPS):
        nll = response_nll(model, _batch(step, slice(None)))
        (nll / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        sz.write_back(model)
        losses.append(float(nll.detach()))
    return losses, {name: each.detach() - before[name] for name, each in trainable_parameters(model).items()}


def _together(
    family: str, placement: Any, head: tuple[dict[str, Any], ...], stage: int
) -> tuple[list[float], dict[str, Tensor]]:
    """The same at a stage, in chunks. Collective."""
    model = _model(family, placement, head)
    before = {name: each.detach().clone() for name, each in trainable_parameters(model).items()}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own is 1.
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
    }
    engine, *_ = sz.initialize(model=model, config=settings, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01))
    rank, losses = dist.get_rank(), []
    for step in range(STEPS):
        nll = response_nll(engine, _batch(step, slice(2 * rank, 2 * rank + 2)), chunk=4)
        engine.backward(nll)
        engine.step()
        total = nll.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    values = trainable_parameters(engine.module)
    found = whole_values(values.values())
    return losses, {name: each - before[name] for name, each in zip(values, found, strict=True)}


def losses() -> dict[str, tuple[float, float]]:
    """By case: the largest difference of values, relative to how far training took them, and that of a loss."""
    report = {}
    for name, case in CASES.items():
        wanted_losses, wanted = _alone(*case)
        for stage in (2, 3):
            found_losses, found = _together(*case, stage)
            values = max(float((found[each] - wanted[each]).abs().max() / wanted[each].abs().max()) for each in wanted)
            loss = max(abs(one / other - 1) for one, other in zip(found_losses, wanted_losses, strict=True))
            report[f"{name}, stage {stage}"] = (values, loss)
    return report
