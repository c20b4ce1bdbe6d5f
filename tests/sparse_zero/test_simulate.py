"""Does a step without data hold what the same step with data holds?"""

import pytest
import torch
from torch import nn

import sparse_zero as sz
from sparse_zero.memory.simulation.recorder import MemoryRecorder
from sparse_zero.memory.simulation.simulate import simulated
from tests.sparse_zero.helpers import TinyModel, mixed_selection, tiny_loss


def build(method: str) -> nn.Module:
    model = TinyModel(hidden=24, layers=4, vocabulary=48)
    model.checkpointing = method.endswith("checkpointing")
    return model


def step_peak(model: nn.Module, memory: MemoryRecorder) -> tuple[int, int]:
    """Bytes held before a forward and backward, and at most during it."""
    before = memory.live_bytes
    tiny_loss(model, torch.zeros(4, 16, dtype=torch.int64)).backward()
    return before, memory.peak_bytes


@pytest.mark.parametrize("method", ["full", "full checkpointing", "sparse", "sparse checkpointing"])
def test_simulated_peak_is_that_of_the_real_step(method: str) -> None:
    real, meta = build(method), build(method).to("meta")
    for model in (real, meta):
        if method.startswith("sparse"):
            sz.sparsify(model, mixed_selection(model))
    with simulated(meta) as memory:
        expected = step_peak(meta, memory)
    memory = MemoryRecorder()
    for tensor in (*real.parameters(), *real.buffers()):
        memory.add(tensor)
    memory.peak_bytes = memory.live_bytes
    with memory:
        found = step_peak(real, memory)
    assert found == expected
    assert expected[0] >= sum(parameter.nbytes for parameter in real.parameters())
    assert expected[1] > expected[0]


def test_storages_count_once_and_until_they_die() -> None:
    with MemoryRecorder() as memory:
        tensor = torch.zeros(256)
        view = tensor[:10].view(2, 5)
        assert memory.live_bytes == memory.peak_bytes == 1024
        del tensor
        assert memory.live_bytes == 1024
        assert view.sum() == 0
        del view
    assert memory.live_bytes == 0
    assert 1024 <= memory.peak_bytes < 1040


def test_checkpointing_shows_in_the_simulated_peak() -> None:
    peaks = {}
    for method in ("sparse", "sparse checkpointing"):
        model = build(method).to("meta")
        sz.sparsify(model, mixed_selection(model))
        with simulated(model) as memory:
            peaks[method] = step_peak(model, memory)[1]
    assert peaks["sparse checkpointing"] < peaks["sparse"]
