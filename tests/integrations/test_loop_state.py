"""Does a loop without DeepSpeed train, store and continue as with it where some batches do not reach every value?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.integrations.loop_state import PlainEngine
from tests.sparse_zero.helpers import mixed_selection

STEPS, UNREACHED = 6, 3


class Branches(nn.Module):
    """One of its projections is called by some batches only, as an expert would be."""

    def __init__(self) -> None:
        super().__init__()
        self.one_proj, self.other_proj = nn.Linear(14, 10), nn.Linear(14, 10)

    def forward(self, inputs: Tensor, number: int) -> Tensor:
        found: Tensor = self.one_proj(inputs)
        # Also later batches do not all reach it.
        return found + self.other_proj(inputs) if number >= UNREACHED and number != STEPS - 1 else found


def make_engine(optimizer: Any) -> PlainEngine:
    torch.manual_seed(0)
    model = Branches()
    sz.sparsify(model, mixed_selection(model))
    return PlainEngine(module=model, optimizer=optimizer(sz.parameter_groups(model), lr=0.1))


def train(engine: PlainEngine, start: int, end: int) -> list[float]:
    losses = []
    for number in range(start, end):
        inputs = torch.randn(4, 14, generator=torch.Generator().manual_seed(number))
        engine.optimizer.zero_grad()
        loss = engine.module(inputs, number).square().mean()
        loss.backward()
        engine.optimizer.step()
        sz.write_back(engine.module)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("saved", [1, UNREACHED, UNREACHED + 1])
def test_values_that_no_batch_has_reached_are_continued(tmp_path: Path, optimizer: Any, saved: int) -> None:
    whole, part, again = (make_engine(optimizer) for _ in range(3))
    losses = train(whole, 0, STEPS)
    assert train(part, 0, saved) == losses[:saved]
    assert {int(state["step"]) for state in part.optimizer.state.values()} == {saved}, "one counter for all"
    sz.save_checkpoint(part, tmp_path / "state")
    sz.load_checkpoint(again, tmp_path / "state")
    assert train(again, saved, STEPS) == losses[saved:]
    values = sz.trainable_parameters(again.module)
    for name, expected in sz.trainable_parameters(whole.module).items():
        assert torch.equal(values[name], expected), name


def test_what_is_frozen_gets_no_gradient_and_an_optimizer_one_hook() -> None:
    engine = make_engine(torch.optim.SGD)
    again = PlainEngine(module=engine.module, optimizer=engine.optimizer)
    assert len(again.optimizer._optimizer_step_pre_hooks) == 1
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    again.optimizer.add_param_group({"params": [frozen]})
    train(again, 0, 1)
    assert frozen.grad is None
    assert all(values.grad is not None for values in sz.trainable_parameters(again.module).values())
