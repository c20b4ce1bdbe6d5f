"""Where in a weight do the entries of a selection lie, computed on the weight's device as on the host?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.layers.entries import flat_positions, gather_at, places_of, scatter_at
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.defaults import stage3_defaults, with_defaults
from tests.sparse_zero.helpers import TinyModel, mixed_selection, plain_entries


@st.composite
def chosen(draw: st.DrawFn) -> WeightSelection:
    """Blocks of any shape, rows and columns that overlap, in a weight that blocks need not divide."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    side = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    grid = [-(-extent // one) for extent, one in zip(shape, side, strict=True)]

    def some(limit: int) -> list[int]:
        return draw(st.lists(st.integers(0, limit - 1), unique=True, max_size=4))

    blocks = [[number // grid[1], number % grid[1]] for number in some(grid[0] * grid[1])]
    return WeightSelection(
        shape=shape, block_size=side if blocks else 0, blocks=blocks, rows=some(shape[0]), columns=some(shape[1])
    )


@given(selection=chosen())
@settings(max_examples=300, deadline=None)
def test_positions_and_entries_are_those_of_plain_loops(selection: WeightSelection) -> None:
    weight = torch.arange(selection.shape[0] * selection.shape[1], dtype=torch.float64).view(selection.shape)
    expected = plain_entries(weight, selection)
    assert list(expected) == list(selection.kinds())
    rewritten, by_hand = weight.clone(), weight.clone()
    for kind in selection.kinds():
        places = places_of(selection, kind, weight.device)
        assert torch.equal(flat_positions(places), selection.flat_indices(kind))
        assert torch.equal(flat_positions(places), expected[kind].long())
        assert torch.equal(gather_at(weight, places), expected[kind])
        scatter_at(rewritten, places, -expected[kind] - 1)
        by_hand.view(-1)[expected[kind].long()] = -expected[kind] - 1
    assert torch.equal(rewritten, by_hand)


def test_a_write_back_computes_no_indices_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel()
    sz.sparsify(model, mixed_selection(model))
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(1.0)

    def on_the_host(*_: object) -> Tensor:
        raise AssertionError("the selection was read")

    before = {name: weight.clone() for name, weight in model.state_dict().items() if "values" not in name}
    monkeypatch.setattr(WeightSelection, "flat_indices", on_the_host)
    monkeypatch.setattr(WeightSelection, "owned_mask", on_the_host)
    sz.write_back(model)
    changed = sum(int((model.state_dict()[name] != weight).sum()) for name, weight in before.items())
    assert changed == mixed_selection(TinyModel()).num_parameters


def test_defaults_of_stage_3_follow_the_sizes_and_leave_alone_what_is_set() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(100, 8),
            "one": nn.Linear(8, 8, bias=False),
            "two": nn.Linear(8, 16),
            "norm": nn.LayerNorm(8),
        }
    )
    sz.sparsify(model, sz.Selection({"two.weight": WeightSelection(shape=(16, 8), rows=[1, 2])}))
    own = {
        "stage3_prefetch_bucket_size": 128,
        "stage3_max_live_parameters": 800 + 256,
        "stage3_max_reuse_distance": 128,
        "stage3_param_persistence_threshold": 16,
    }
    assert stage3_defaults(model) == own
    bucket = {"reduce_bucket_size": 16 + 65_536}
    assert with_defaults(model, {"stage": 3}) == {"stage": 3, **own, **bucket}
    overlapping = {"stage": 2, "overlap_comm": True}
    assert with_defaults(model, overlapping) == {**overlapping, "reduce_bucket_size": 4 + 65_536}
    assert with_defaults(model, {**overlapping, "reduce_bucket_size": 9})["reduce_bucket_size"] == 9
    assert with_defaults(model, {"stage": 2, "overlap_comm": False})["reduce_bucket_size"] == 16 + 65_536
    assert with_defaults(model, {}) == {}
    # DeepSpeed's other name for the size of what is fetched ahead, and a value that is left to us.
    theirs = {"stage": 3, "reduce_bucket_size": 7, "prefetch_bucket_size": 5, "stage3_max_live_parameters": "auto"}
    before = dict(theirs)
    expected = {**own, **before, "stage3_max_live_parameters": own["stage3_max_live_parameters"]}
    del expected["stage3_prefetch_bucket_size"]
    assert with_defaults(model, theirs) == expected
    assert theirs == before
