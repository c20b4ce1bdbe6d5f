"""Do the values of a parameter get its gradient however the parameter is read, and what is kept meanwhile?"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers
from sparse_zero.layers.sparse_parameter import SparseParameter, _take
from sparse_zero.layers.sparsify import by_parameter
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.config import PLACEMENTS
from tests.models.tiny_families import FAMILIES, family_loss, hand_made_selection, make_batches
from tests.sparse_zero.helpers import owner_matrix

SIZE, VOCABULARY = 6, 10
TOKENS = torch.tensor([[1, 2, 3, 7, 2], [9, 0, 2, 2, 5]])


class Functional(nn.Module):
    """A head that reads the embedding's weight, which the embedding itself never computes with there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.one_hot(tokens, SIZE * 2)[..., :SIZE].float()
        return nn.functional.linear(x, self.embed.weight)


class Tied(nn.Module):
    """An embedding whose weight is the head too, once as a module and once as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.embed(tokens))
        return self.head(x) + torch.sin(nn.functional.linear(x, self.embed.weight))


class Listed(nn.Module):
    """Parameters in a list and a dictionary, which have no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(SIZE, SIZE)) for _ in range(3)])
        self.named = nn.ParameterDict({"up": nn.Parameter(torch.randn(VOCABULARY, SIZE))})
        self.embed = nn.Embedding(VOCABULARY, SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x @ self.named["up"].T


class Attention(nn.Module):
    """torch's own attention hands the weights of both its projections to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        self.attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x + self.attention(x, x, x, need_weights=False)[0]


class Layer(nn.Module):
    """A layer that owns a stack of matrices, and calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, SIZE, SIZE))
        self.scale = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        x = torch.tanh(x @ self.stack[depth] * self.scale)
        if depth == 0:
            x = self(x, depth=1)
        # Read again after the inner call: still the same parameter.
        return x @ self.stack[0] + self.scale


class Recurrent(nn.Module):
    """One layer used three times, as in ALBERT, each time within itself once more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        self.layer = Layer()
        self.reentrant: bool | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return x


class ChecksWithin(nn.Module):
    """Recomputes a function that reads a parameter of the module, whose forward has ended by then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE))
        self.reentrant = False

    def _inner(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).detach().requires_grad_()
        return checkpoint(self._inner, x, use_reentrant=self.reentrant) @ self.weight


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int | None]]] = {
    "functional": (Functional, {"embed.weight": None}),
    "tied": (Tied, {"embed.weight": None}),
    "listed": (Listed, {"weights.1": None, "named.up": None, "embed.weight": None}),
    "attention": (Attention, {"attention.out_proj.weight": None, "attention.in_proj_weight": None}),
    "recurrent": (Recurrent, {"layer.stack": 1, "embed.weight": None}),
    "checks_within": (ChecksWithin, {"weight": None}),
}
VECTORS = {"attention": "attention.out_proj.bias", "recurrent": "layer.scale"}


def make(name: str) -> tuple[nn.Module, sz.Selection]:
    """A model, and regions of its parameters."""
    torch.manual_seed(2)
    model, chosen = MODELS[name][0](), MODELS[name][1]
    parameters = dict(model.named_parameters())
    weights = {}
    for parameter, number in chosen.items():
        shape = (parameters[parameter].shape[-2], parameters[parameter].shape[-1])
        regions = WeightSelection(shape=shape, block_size=4, blocks=[[0, 1], [1, 0]], rows=[2, 5], columns=[1])
        weights[parameter if number is None else f"{parameter}[{number}]"] = regions
    if name in VECTORS:
        weights[VECTORS[name]] = WeightSelection(shape=(SIZE, 1), whole=True)
    return model, sz.Selection(weights)


def loss_of(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    loss: Tensor = model(tokens).square().mean()
    return loss


def dense_gradients(model: nn.Module, selection: sz.Selection) -> dict[str, Tensor]:
    """Gradients of all parameters, zero where nothing is selected."""
    dense = copy.deepcopy(model).requires_grad_(True)
    loss_of(dense).backward()
    found = {}
    for name, chosen in by_parameter(selection).items():
        gradient = dense.get_parameter(name).grad
        assert gradient is not None
        mask = torch.zeros_like(gradient, dtype=torch.bool)
        for number, regions in chosen.items():
            owned = torch.ones(len(gradient), dtype=torch.bool) if regions.whole else owner_matrix(regions) > 0
            (mask if number is None else mask[number]).copy_(owned)
        found[name] = torch.where(mask, gradient, 0.0)
    return found


def gradients_of_values(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the values at their places in parameters of zeros."""
    found = {}
    for name, carrier in carriers(model):
        assert isinstance(carrier, SparseParameter)
        gradient = torch.zeros_like(carrier.parameter)
        for kind, values in carrier.values().items():
            assert values.grad is not None, name
            gradient.view(-1)[carrier.positions(kind)] = values.grad
        found[name.rpartition("sparse_")[0] + carrier.attribute] = gradient
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_values_get_the_masked_dense_gradient_however_the_parameter_is_read(name, placement):
    model, selection = make(name)
    plain = copy.deepcopy(model)
    base = loss_of(model).item()
    expected = dense_gradients(model, selection)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    sz.sparsify(model, selection, placement)
    assert loss_of(model).item() == base
    # The model that recomputes its layers: without, and both ways.
    for reentrant in (True, False, None) if name == "recurrent" else (False,):
        model.zero_grad()
        vars(model)["reentrant"] = reentrant
        loss_of(model).backward()
        found = gradients_of_values(model)
        assert found.keys() == expected.keys()
        for parameter in expected:
            torch.testing.assert_close(found[parameter], expected[parameter], msg=parameter)
    # Moved values act, with and without autograd; merged they act in a plain model.
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(torch.randn_like(values))
    sz.write_back(model)
    moved = loss_of(model)
    assert abs(moved.item() - base) > 1e-3
    with torch.no_grad():
        # (torch's attention has another kernel there.)
        torch.testing.assert_close(loss_of(model), moved, rtol=1e-6, atol=0.0)
    undo = sz.merge(model)
    torch.testing.assert_close(loss_of(model), moved)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(vars(module).keys() == vars(other).keys() for module, other in zip(model.modules(), plain.modules(), strict=True) if module is not model)  # fmt: skip
    sz.unmerge(model, undo)
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_function_that_is_recomputed_after_its_module_still_reaches_the_values(placement, reentrant):
    model, selection = make("checks_within")
    expected = dense_gradients(model, selection)
    sz.sparsify(model, selection, placement)
    model.reentrant = reentrant
    loss_of(model).backward()
    torch.testing.assert_close(gradients_of_values(model), expected)


def test_without_autograd_the_parameter_itself_is_read():
    model, selection = make("tied")
    sz.sparsify(model, selection)
    dense = model.embed._parameters["weight"]
    assert model.embed.weight is not dense
    assert model.embed.weight.grad_fn is not None
    assert model.embed.weight.data_ptr() == dense.data_ptr()
    with torch.no_grad():
        assert model.embed.weight is dense
        assert model.head.weight is dense
    # Nor where nothing trains: a loaded adapter.
    for values in sz.trainable_parameters(model).values():
        values.requires_grad_(False)
    assert model.head.weight is dense


class ReadsTwice(nn.Module):
    """Keeps what it reads, with autograd off first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.append(self.weight)
        self.seen += [self.weight, self.weight]
        return x @ self.seen[1] + x @ self.seen[2]


def test_under_delta_the_reads_of_one_forward_share_a_copy():
    model = ReadsTwice()
    sz.sparsify(model, sz.Selection({"weight": WeightSelection(shape=(SIZE, SIZE), rows=[1])}), "delta")
    (values,) = sz.trainable_parameters(model).values()
    model(torch.ones(1, SIZE)).sum().backward()
    # One copy, but a node and hence a short-lived dense gradient for each read.
    assert len({read.data_ptr() for read in model.seen}) == 1
    assert model.seen[1].data_ptr() != model._parameters["weight"].data_ptr()
    assert model.seen[0].grad_fn is None
    assert model.seen[1].grad_fn is not model.seen[2].grad_fn
    assert values.grad is not None
    assert torch.equal(values.grad, torch.full((SIZE,), 2.0))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_forward_leaves_nothing_behind(placement, error):
    model, selection = make("recurrent")
    sz.sparsify(model, selection, placement)

    def raising(*_: Any) -> None:
        raise error("in the middle")

    # Called after the inner forward of the layer, within the outer one.
    hook = model.layer.register_forward_hook(raising)
    with pytest.raises(error, match="in the middle"):
        model(TOKENS)
    hook.remove()
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(1.0)
    sz.write_back(model)
    twin, _ = make("recurrent")
    sz.sparsify(twin, selection, placement)
    twin.load_state_dict(model.state_dict())
    sz.write_back(twin)
    assert torch.equal(model(TOKENS), twin(TOKENS))
    assert all(not carrier._shared for _, carrier in carriers(model) if isinstance(carrier, SparseParameter))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_copies_and_pickles_train_by_themselves(placement):
    model, selection = make("tied")
    sz.sparsify(model, selection, placement)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    before = copy.deepcopy(model.state_dict())
    for twin in twins:
        assert twin.head._parameters["weight"] is twin.embed._parameters["weight"]
        assert str(twin) == str(model)
        loss_of(twin).backward()
        with torch.no_grad():
            for values in sz.trainable_parameters(twin).values():
                assert values.grad is not None
                values.sub_(values.grad)
        sz.write_back(twin)
        assert loss_of(twin).item() < loss_of(model).item()
        assert all(values.grad is None for values in sz.trainable_parameters(model).values())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(twins[0](TOKENS), twins[1](TOKENS))
    sz.merge(twins[0])
    assert type(twins[0].embed) is nn.Embedding
    assert isinstance(model.embed, nn.Embedding)
    assert type(model.embed).__name__ == "Embedding"


def test_gradients_add_up_over_backward_passes():
    model, selection = make("tied")
    expected = dense_gradients(model, selection)["embed.weight"]
    sz.sparsify(model, selection)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    loss_of(model).backward()
    torch.testing.assert_close(gradients_of_values(model)["embed.weight"], 3 * expected)


def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients():
    model, selection = make("tied")
    expected = dense_gradients(model, selection)["embed.weight"]
    sz.sparsify(model, selection)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model).backward()
    found = gradients_of_values(model)["embed.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=5e-2)


class Children(nn.Sequential):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(SIZE, SIZE))
        self.scale = nn.Parameter(torch.ones(SIZE))


def test_parameters_that_cannot_be_read_through_values_are_refused():
    model = nn.Module()
    model.children_of_one = Children()
    chosen = sz.Selection({"children_of_one.scale": WeightSelection(shape=(SIZE, 1), whole=True)})
    with pytest.raises(InputError, match="scale belongs to a Children, which iterates over its submodules"):
        sz.sparsify(model, chosen)
    # Recurrent layers hold their parameters in a list that nothing can be put into.
    model = nn.Module()
    model.lstm, model.proj = nn.LSTM(SIZE, SIZE), nn.Linear(SIZE, SIZE)
    found = sz.default_module_map(model)
    assert [matrix.parameter for matrix in found.matrices] == ["proj.weight"]
    assert found.vectors == ("proj.bias",)


# -- what is kept in memory


class _DenseTensors(TorchDispatchMode):
    """Counts the new storages of some sizes that are alive at once."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.most, self.made = sizes, 0, 0
        self.alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() in self.sizes:
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self.alive[storage._cdata] = StorageWeakRef(storage)
                    self.made += 1
        self.alive = {key: reference for key, reference in self.alive.items() if not reference.expired()}
        self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("name", "experts", "most"),
    [
        ("llama_tied", None, 1),
        ("gpt2", None, 1),
        ("mixtral", "eager", 1),
        ("mixtral", "grouped_mm", 1),
        ("gpt_oss", "eager", 1),
        ("gpt_oss", "grouped_mm", 1),
        # The indexing of this implementation adds to zeros of the same size.
        ("mixtral", "batched_mm", 2),
    ],
)
def test_one_dense_gradient_is_alive_at_a_time(name, experts, most, placement):
    family = FAMILIES[name]
    model = family.make(**({} if experts is None else {"experts_implementation": experts}))
    # Tied embeddings and heads are one parameter with two uses, experts two parameters of one forward.
    large = list(family.experts) or [next(iter(family.matrices))]
    sizes = {parameter.nbytes for key, parameter in model.named_parameters() if key in large}
    selection = hand_made_selection(family, model, "row")
    selection = sz.Selection({key: w for key, w in selection.weights.items() if key.partition("[")[0] in large})
    sz.sparsify(model, selection, placement)
    loss = family_loss(family, model, make_batches(1)[0][:, :5])
    with _DenseTensors(sizes) as dense:
        loss.backward()
    assert dense.made >= 2
    assert dense.most == most
    assert not dense.alive
    assert all(values.grad.abs().sum() > 0 for values in sz.trainable_parameters(model).values())
    assert all(p.grad is None for key, p in model.named_parameters() if "values_" not in key)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    order=st.permutations([0, 1, 2]),
    expanded=st.booleans(),
    offset=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_entries_of_transposed_and_expanded_gradients_are_taken_in_place(sizes, order, expanded, offset, data):
    order = [axis for axis in order if axis < len(sizes)]
    storage = torch.arange(offset + torch.Size(sizes).numel(), dtype=torch.float64)[offset:]
    tensor = storage.view(sizes).permute(order)
    if expanded:
        tensor = tensor[..., :1].expand(*tensor.shape[:-1], 4)
    flat = tensor.reshape(-1)
    positions = torch.tensor(data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=9)), dtype=torch.int64)
    assert torch.equal(_take(tensor, positions), flat[positions])


def test_taking_entries_makes_no_dense_copy():
    gradient = torch.randn(40, 30).T
    with _DenseTensors({gradient.nbytes}) as dense:
        taken = _take(gradient, torch.tensor([0, 41, 1199]))
    assert dense.made == 0
    assert torch.equal(taken, torch.stack([gradient[0, 0], gradient[1, 1], gradient[29, 39]]))
