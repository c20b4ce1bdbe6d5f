"""Invariant 2: the gradient of the values equals the masked full gradient, whatever the shape and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_zero.layers.entries import gather_entries, scatter_entries
from sparse_zero.layers.region_products import BlockPlan
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.selection.regions import WeightSelection, grid_shape
from tests.sparse_zero.helpers import owner_matrix, plain_entries

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@st.composite
def weight_selections(draw: st.DrawFn) -> WeightSelection:
    """Any non-empty mixture on a weight whose sides the block size need not divide."""
    shape = (draw(st.integers(1, 23)), draw(st.integers(1, 23)))
    size = draw(st.integers(1, min(shape)))
    grid = grid_shape(shape, size)
    cells = [[i, j] for i in range(grid[0]) for j in range(grid[1])]
    blocks = draw(st.lists(st.sampled_from(cells), max_size=6, unique_by=tuple))
    rows = draw(st.lists(st.integers(0, shape[0] - 1), max_size=3, unique=True))
    columns = draw(st.lists(st.integers(0, shape[1] - 1), max_size=3, unique=True))
    selection = WeightSelection(shape=shape, block_size=size, blocks=blocks, rows=rows, columns=columns)
    if not (blocks or rows or columns):
        return WeightSelection(shape=shape, rows=[0])
    return selection


def dense_weight_gradient(
    linear: nn.Linear, x: Tensor, upstream: Tensor, delta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients to the weight and to the input, from autograd through the dense product."""
    weight = linear.weight.detach().clone().requires_grad_(True)
    inputs = x.detach().clone().requires_grad_(True)
    effective = weight if delta is None else weight + delta
    (nn.functional.linear(inputs, effective, linear.bias) * upstream).sum().backward()
    assert weight.grad is not None
    assert inputs.grad is not None
    return weight.grad, inputs.grad


@given(
    selection=weight_selections(),
    dtype=st.sampled_from(list(TOLERANCES)),
    bias=st.booleans(),
    leading=st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 3)]),
    placement=st.sampled_from(["inplace", "delta"]),
    keep_input=st.booleans(),
    way=st.sampled_from(["views", "strips", "gathered"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=250, deadline=None)
def test_invariant_2_gradient_of_values_is_the_masked_full_gradient(
    selection, dtype, bias, leading, placement, keep_input, way, seed
):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    out_features, in_features = selection.shape
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(randn(out_features, in_features))
    original = linear.weight.detach().clone()
    x, upstream = randn(*leading, in_features), randn(*leading, out_features)
    delta = torch.zeros_like(original)
    layer = SparseLinear(linear, selection, placement, keep_input=keep_input)
    if placement == "delta":
        for kind, values in layer.values().items():
            fresh = randn(values.numel())
            with torch.no_grad():
                values.copy_(fresh)
            scatter_entries(delta, selection, kind, fresh)
    weight_gradient, input_gradient = dense_weight_gradient(
        linear, x, upstream, delta if placement == "delta" else None
    )

    inputs = x.clone().requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        # However many blocks there are.
        patch.setattr(BlockPlan, "way", lambda plan, x: way)
        y = layer(inputs)
        (y * upstream).sum().backward()

    tolerance = {"atol": TOLERANCES[dtype] * max(1, in_features) ** 0.5 * 4, "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(y, nn.functional.linear(x, original + delta, linear.bias), **tolerance)
    torch.testing.assert_close(inputs.grad, input_gradient, **tolerance)
    expected = plain_entries(weight_gradient, selection)
    assert set(layer.values()) == set(expected)
    for kind, values in layer.values().items():
        assert values.grad.dtype == dtype
        torch.testing.assert_close(values.grad, expected[kind], **tolerance)
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, original)


def test_many_blocks_are_listed_only_where_they_are_multiplied_one_by_one():
    grid = [[i, j] for i in range(8) for j in range(8)]
    layer = SparseLinear(nn.Linear(16, 16), WeightSelection(shape=(16, 16), block_size=2, blocks=grid), "inplace")
    plan = layer.plan.blocks
    assert plan is not None
    assert [(cell.row, cell.column, cell.strip) for cell in plan.cells] == [(i, j, j) for i, j in grid]
    # On any other device: objects of Python for every block, of which a model may have millions.
    elsewhere = SparseLinear(
        nn.Linear(16, 16, device="meta"), WeightSelection(shape=(16, 16), block_size=2, blocks=grid), "inplace"
    )
    plan = elsewhere.plan.blocks
    assert plan is not None
    assert (plan.cells, plan.way(torch.empty(100_000, 16, device="meta"))) == ((), "gathered")


@given(selection=weight_selections())
@settings(max_examples=200, deadline=None)
def test_entries_are_owned_once_counted_and_read_in_order(selection):
    owner = owner_matrix(selection)
    counts = selection.num_parameters_by_kind()
    for code, kind in enumerate(("block", "row", "column"), start=1):
        assert counts.get(kind, 0) == int((owner == code).sum())
    assert selection.num_parameters == int((owner > 0).sum())

    matrix = torch.arange(owner.numel(), dtype=torch.float64).reshape(selection.shape)
    expected = plain_entries(matrix, selection)
    rewritten = matrix.clone()
    for kind in selection.kinds():
        assert torch.equal(selection.flat_indices(kind).double(), expected[kind])
        assert torch.equal(gather_entries(matrix, selection, kind), expected[kind])
        scatter_entries(rewritten, selection, kind, -expected[kind] - 1)
    assert torch.equal(rewritten, torch.where(owner > 0, -matrix - 1, matrix))


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(placement):
    torch.manual_seed(0)
    linear = nn.Linear(16, 12)
    selection = WeightSelection(shape=(12, 16), block_size=5, blocks=[[0, 0], [2, 3]], rows=[3], columns=[9])
    layer = SparseLinear(linear, selection, placement)
    x = torch.randn(4, 7, 16, requires_grad=True)
    upstream = torch.randn(4, 7, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y * upstream).sum().backward()
    weight_gradient, input_gradient = dense_weight_gradient(linear, x, upstream, None)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, input_gradient, atol=0.1, rtol=0.05)
    for kind, expected in plain_entries(weight_gradient, selection).items():
        gradient = layer.values()[kind].grad
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, atol=0.2, rtol=0.05)


def test_backward_reaches_values_without_an_input_that_requires_grad():
    layer = SparseLinear(nn.Linear(8, 8), WeightSelection(shape=(8, 8), rows=[2]), "inplace")
    layer(torch.ones(3, 8)).sum().backward()
    gradient = layer.values()["row"].grad
    assert gradient is not None
    assert torch.equal(gradient, torch.full((8,), 3.0))


def shapes_kept_for_backward(layer: SparseLinear, x: Tensor) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return shapes


def test_frozen_values_keep_nothing_for_backward():
    layer = SparseLinear(nn.Linear(8, 8), WeightSelection(shape=(8, 8), rows=[2], columns=[1]), "inplace")
    layer.requires_grad_(False)
    assert (3, 8) not in shapes_kept_for_backward(layer, torch.ones(3, 8, requires_grad=True))


def test_columns_and_blocks_keep_only_their_slices_of_the_input():
    x = torch.ones(50, 24, requires_grad=True)
    layer = SparseLinear(
        nn.Linear(24, 12),
        WeightSelection(shape=(12, 24), block_size=4, blocks=[[0, 1], [2, 1]], columns=[0, 7]),
        "inplace",
    )
    shapes = shapes_kept_for_backward(layer, x)
    assert sorted(shape for shape in shapes if 50 in shape) == [(1, 50, 4), (50, 2)]


@pytest.mark.parametrize(("field", "value"), [("blocks", [[0, 0], [0, 0]]), ("rows", [1, 1]), ("columns", [2, 0, 2])])
def test_duplicates_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}.*duplicates"):
        WeightSelection(shape=(8, 8), block_size=4, **{field: value})


@pytest.mark.parametrize(("field", "value"), [("blocks", [[2, 0]]), ("rows", [8]), ("columns", [-1])])
def test_indices_outside_the_weight_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}.*outside"):
        WeightSelection(shape=(8, 8), block_size=4, **{field: value})
