"""Do the published ways, as we wrote them, compute what a linear with a masked dense gradient does?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scripts.benchmarks.methods import PUBLISHED, published, random_blocks
from scripts.benchmarks.peers import ConcatenatedRows, CopiedBlocks, DiagonalBlocks, Peer


def _linear(in_features: int = 32, out_features: int = 32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)


def _compare(peer: Peer, dense: nn.Linear, values: torch.Tensor | None = None) -> None:
    """``peer`` against ``dense`` with the same numbers: output, gradient of the input, gradient of the values."""
    x = torch.randn(2, 5, dense.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own_x, dense_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    own, expected = peer(own_x), dense(dense_x)
    torch.testing.assert_close(own, expected)
    dy = torch.randn(own.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own.backward(dy)
    expected.backward(dy)
    assert dense.weight.grad is not None
    torch.testing.assert_close(own_x.grad, dense_x.grad)
    torch.testing.assert_close(peer.values.grad, peer.pick(dense.weight.grad))
    assert [p for p in peer.parameters() if p.requires_grad] == [peer.values]


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_masked_dense_ones(method: str, bias: bool) -> None:
    peer = published(method, _linear(bias=bias), 8, 8, torch.Generator().manual_seed(0))
    assert isinstance(peer, Peer)
    _compare(peer, _linear(bias=bias))
    trained = int((peer.pick(torch.ones(32, 32, dtype=torch.float64)) != 0).sum())
    assert trained == peer.num_trained == 8 * 32, "as many as 8 rows"


@pytest.mark.parametrize(("in_features", "out_features"), [(32, 16), (16, 48)])
def test_oblong_weights(in_features: int, out_features: int) -> None:
    dense = _linear(in_features, out_features)
    linear = _linear(in_features, out_features)
    _compare(CopiedBlocks(linear, random_blocks(linear, 3, 8, torch.Generator().manual_seed(0)), 8), dense)
    dense.zero_grad()
    _compare(ConcatenatedRows(_linear(in_features, out_features), 5), dense)
    dense.zero_grad()
    _compare(DiagonalBlocks(_linear(in_features, out_features), 4), dense)


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_step_of_the_values_acts(method: str) -> None:
    """After a step the module computes what the dense linear does whose picked entries made the same step."""
    peer = published(method, _linear(), 8, 8, torch.Generator().manual_seed(0))
    assert isinstance(peer, Peer)
    dense = _linear()
    change = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    # Only where the values are: what picking a matrix of positions finds.
    positions = peer.pick(torch.arange(1.0, 1025.0, dtype=torch.float64).reshape(32, 32)).long().unique()
    mask = torch.zeros(32 * 32, dtype=torch.float64)
    mask[positions[positions > 0] - 1] = 1.0
    with torch.no_grad():
        peer.values.add_(peer.pick(change))
        dense.weight.add_(change * mask.view(32, 32))
    _compare(peer, dense)
