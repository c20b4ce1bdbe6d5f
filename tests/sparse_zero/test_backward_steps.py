"""Does a step within backward give what the ordinary loop gives, and hold one gradient at a time?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparse_zero as sz
from tests.distributed.stage3_workers import NormedModel
from tests.sparse_zero.helpers import mixed_selection, tiny_loss


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def model_of(placement: Any, tie: bool = False) -> Any:
    torch.manual_seed(3)
    model = NormedModel(tie=tie)
    sz.sparsify(model, mixed_selection(model), placement)
    return model


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_it_equals_the_ordinary_loop(placement: str, checkpointing: bool, tie: bool) -> None:
    ordinary: Any = model_of(placement, tie)
    ordinary.checkpointing = checkpointing
    fused = copy.deepcopy(ordinary)
    optimizer = adamw(sz.parameter_groups(ordinary))
    stepping = sz.step_in_backward(fused, adamw)
    for step in range(4):
        for group in (*optimizer.param_groups, *stepping.param_groups):
            group["lr"] = 0.01 / (step + 1)
        expected = tiny_loss(ordinary, tokens(step))
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        sz.write_back(ordinary)
        loss = tiny_loss(fused, tokens(step))
        loss.backward()
        assert torch.equal(loss, expected)
    for (name, one), (_, other) in zip(fused.named_parameters(), ordinary.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.grad is None


def test_gradients_do_not_exist_together() -> None:
    model = model_of("inplace")
    alive: list[int] = []
    values = list(sz.trainable_parameters(model).values())
    assert len(values) > 3
    for each in values:
        # Before the hooks that step.
        each.register_post_accumulate_grad_hook(lambda _: alive.append(sum(other.grad is not None for other in values)))
    stepping = sz.step_in_backward(model, adamw)
    tiny_loss(model, tokens(0)).backward()
    assert alive == [1] * len(values)
    stepping.remove()
    tiny_loss(model, tokens(1)).backward()
    assert all(each.grad is not None for each in values)


def test_engines_plain_models_and_gradients_that_are_there_are_refused() -> None:
    model = model_of("delta")
    engine: Any = nn.Module()
    engine.module = model
    engine.optimizer = adamw(sz.parameter_groups(model))
    with pytest.raises(sz.InputError, match="engine"):
        sz.step_in_backward(engine, adamw)
    with pytest.raises(sz.InputError, match="sparsify"):
        sz.step_in_backward(nn.Linear(2, 2), adamw)
    tiny_loss(model, tokens(0)).backward()
    with pytest.raises(sz.InputError, match="gradients already"):
        sz.step_in_backward(model, adamw)
