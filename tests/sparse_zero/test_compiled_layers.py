"""Do sparse layers compile as one graph, and never ask a tensor for its numbers?

Graph capture on a GPU (CUDA graphs, and torch.compile in its mode "reduce-overhead") wants the second: a forward,
backward or write-back that waits for a number cannot be captured. Tensors without data refuse to give one, and so show
it on any machine.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_zero as sz
from sparse_zero.layers.region_products import MOST_VIEWS
from sparse_zero.layers.sparse_linear import SparseLinear
from tests.models.tiny import tiny_llama

pytestmark = [
    # Dynamo itself makes an instance of the class, to trace its forward.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

# One weight [23, 31]: with blocks cut off at both edges, at none, more of them than are multiplied one by one.
SHAPE = (23, 31)
SELECTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"block_size": 8, "blocks": [[0, 1], [1, 1], [1, 2]]},
    "cut blocks": {"block_size": 8, "blocks": [[0, 1], [2, 1], [2, 3]]},
    "many blocks": {"block_size": 2, "blocks": [[i, j] for i in range(11) for j in range(9)]},
    "many cut blocks": {"block_size": 2, "blocks": [[i, j] for i in range(12) for j in range(16)]},
    "rows": {"rows": [5, 6]},
    "columns": {"columns": [9, 30]},
    "mixed": {"block_size": 8, "blocks": [[0, 1], [2, 3]], "rows": [5, 20], "columns": [9, 30]},
}


def layer_of(name: str, placement: Any, keep_input: bool) -> SparseLinear:
    torch.manual_seed(0)
    selection = sz.WeightSelection(shape=SHAPE, **SELECTIONS[name])
    layer = SparseLinear(nn.Linear(SHAPE[1], SHAPE[0]), selection, placement, keep_input=keep_input)
    for values in layer.values().values():
        nn.init.normal_(values)
    return layer


def gradients_of(function: Any, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward."""
    module.zero_grad()
    if x.is_floating_point():
        x = x.clone().requires_grad_(True)
    y = function(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"output": y.detach(), **found, **({"input": x.grad} if x.is_floating_point() else {})}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_the_examples_are_on_both_sides_of_the_limit_for_views():
    numbers = {name: len(chosen.get("blocks", [])) for name, chosen in SELECTIONS.items()}
    assert numbers["cut blocks"] <= MOST_VIEWS < numbers["many blocks"]


@pytest.mark.parametrize("placement", ["inplace", "delta"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_one_layer_is_one_graph_with_the_same_gradients(name, placement):
    torch.compiler.reset()
    # The projections of the Llama below keep their whole input.
    layer = layer_of(name, placement, keep_input=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, SHAPE[1])
    assert_same(gradients_of(compiled, layer, x), gradients_of(layer, layer, x))


def sparse_llama(placement: Any) -> Any:
    """Two layers: blocks that divide nothing in attention, all kinds in the first projection of the MLP, and rows."""
    model = tiny_llama(layers=2, hidden=40, intermediate=48, vocab=64).train()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            chosen: dict[str, Any] = {"block_size": 16, "blocks": [[0, 2], [1, 1]]}
            if "gate" in name:
                chosen |= {"rows": [3, 39], "columns": [7]}
            elif "up" in name or "o_proj" in name:
                chosen = {"rows": [3, 30]}
            elif "down" in name:
                chosen = {"columns": [3, 30]}
            weights[f"{name}.weight"] = sz.WeightSelection(shape=(module.out_features, module.in_features), **chosen)
    sz.sparsify(model, sz.Selection(weights), placement)
    return model


@pytest.mark.parametrize(
    ("backend", "placement"),
    [
        pytest.param("aot_eager", "inplace", marks=pytest.mark.slow),
        ("aot_eager", "delta"),
        pytest.param("inductor", "inplace", marks=pytest.mark.slow),
        pytest.param("inductor", "delta", marks=pytest.mark.slow),
    ],
)
def test_a_llama_is_one_graph_with_the_same_gradients(backend, placement):
    torch.compiler.reset()
    model = sparse_llama(placement)
    tokens = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    expected = gradients_of(logits, model, tokens)
    assert len(expected) > 10
    assert_same(gradients_of(torch.compile(logits, fullgraph=True, backend=backend), model, tokens), expected)


@pytest.mark.parametrize("placement", ["inplace", "delta"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_nothing_waits_for_a_number(name, placement):
    for keep_input in (False, True):
        layer = layer_of(name, placement, keep_input)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = without_data(layer)
            y = fake(torch.empty(2, 3, SHAPE[1], requires_grad=True))
            y.sum().backward()
            fake.write_back()
        shapes = {values.shape: values.grad.shape for values in fake.values().values()}
        assert all(given == found for given, found in shapes.items())


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_no_layer_of_a_llama_waits_for_a_number(placement):
    model = sparse_llama(placement)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layer in [module for module in model.modules() if isinstance(module, SparseLinear)]:
            fake = without_data(layer)
            fake(torch.empty(4, layer.in_features, requires_grad=True)).sum().backward()
            fake.write_back()


def without_data(layer: SparseLinear) -> SparseLinear:
    """The layer on tensors that have no numbers; to be called in their mode."""
    made = copy.copy(layer)
    made._parameters = {
        name: None if held is None else nn.Parameter(torch.empty_like(held, device="cpu"), held.requires_grad)
        for name, held in layer._parameters.items()
    }
    made._buffers = {
        name: None if held is None else torch.empty_like(held, device="cpu") for name, held in layer._buffers.items()
    }
    return made


def test_tensors_without_data_do_refuse():
    with FakeTensorMode():
        numbers = torch.empty(3)
        with pytest.raises(DataDependentOutputException):
            bool((numbers == 1).any())
        with pytest.raises(DynamicOutputShapeException):
            numbers[numbers == 1]


class Vectors(nn.Module):
    """Parameters that are no linear's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(12, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.linear(self.norm(self.embedding(ids)))
        return found


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_hooked_parameters_are_in_the_graph(placement):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Vectors()
    weights = {
        "embedding.weight": sz.WeightSelection(shape=(12, 8), rows=[1, 3]),
        "norm.weight": sz.WeightSelection(shape=(8, 1), whole=True),
        "linear.bias": sz.WeightSelection(shape=(6, 1), whole=True),
    }
    sz.sparsify(model, sz.Selection(weights), placement)
    ids = torch.arange(12)
    expected = gradients_of(model, model, ids)
    assert len(expected) == 4
    assert_same(gradients_of(torch.compile(model, fullgraph=True, backend="aot_eager"), model, ids), expected)


class _Operators(TorchDispatchMode):
    """Notes the name of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_forward_without_gradients_copies_nothing_for_backward(name, keep_input):
    layer, x = layer_of(name, "inplace", keep_input), torch.randn(2, 5, SHAPE[1])
    with torch.no_grad():
        y = layer(x)  # Once, many blocks are listed.
    with torch.no_grad(), _Operators() as plain:
        nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad(), _Operators() as sparse:
        layer(x)
    assert [each for each in sparse.names if "view" not in each] == [each for each in plain.names if "view" not in each]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), y)
    # The same function with gradients, after it was compiled without them.
    assert_same(gradients_of(compiled, layer, x), gradients_of(layer, layer, x))
