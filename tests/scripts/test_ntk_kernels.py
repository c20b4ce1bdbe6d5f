"""Are the kernels of subsets those of brute-force Jacobians, and of the closed forms of linear models?"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from scripts.ntk.factors import Collector
from scripts.ntk.functions import SampleFunction
from scripts.ntk.kernels import Kernels, Subset, compute_kernels
from scripts.ntk.study_config import SubsetsConfig
from scripts.ntk.subsets import SubsetMaker, named_subsets
from sparse_zero.errors import InputError
from sparse_zero.selection.regions import WeightSelection
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES

NUM_TRAIN = 3
GIB = 2**30


def samples_of(vocab: int, lengths: tuple[int, ...] = (5, 3, 7, 4), seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    # Some token twice in a sample, and 0 among them, which is the padding of some models.
    return [{"input_ids": torch.randint(0, vocab, (1, length), generator=generator)} for length in lengths]


def jacobians(function: SampleFunction, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[M, C, ...] of every parameter by autograd, one sample and output at a time."""
    parameters = dict(function.base.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for inputs in samples:
        outputs = function(inputs)
        rows = [
            torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
            for output in outputs
        ]
        for number, (name, parameter) in enumerate(parameters.items()):
            found[name].append(
                torch.stack([torch.zeros_like(parameter) if row[number] is None else row[number] for row in rows])
            )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {name: torch.stack(each) for name, each in found.items()}


def kernel_of(subset: Subset, jacobian: dict[str, Tensor]) -> Tensor:
    """By dense masks over the brute-force Jacobians."""
    pieces = []
    for name, full in jacobian.items():
        flat = full.flatten(2)
        if subset.parameters is not None and name in subset.parameters:
            pieces.append(flat)
        if subset.selection is not None and name in subset.selection.weights:
            weight = subset.selection.weights[name]
            mask = torch.zeros(weight.shape, dtype=torch.bool)
            height, width = weight.block_shape
            for i, j in weight.blocks.tolist():
                mask[i * height : (i + 1) * height, j * width : (j + 1) * width] = True
            mask[weight.rows] = True
            mask[:, weight.columns] = True
            pieces.append(flat[:, :, mask.flatten() | weight.whole])
        if subset.lora and name in subset.lora:
            pieces.append((full @ subset.lora[name].to(full).T).flatten(2))
    stacked = torch.cat(pieces, dim=2).flatten(1)
    return stacked @ stacked[:NUM_TRAIN].T


def bert(num_labels: int) -> tuple[SampleFunction, list[dict[str, Tensor]]]:
    model = FAMILIES["bert"].make(num_labels=num_labels).double().eval().requires_grad_(False)
    return SampleFunction(model), samples_of(64)


def llama(tie: bool) -> tuple[SampleFunction, list[dict[str, Tensor]]]:
    model = tiny_llama(tie=tie, hidden=24, layers=2, intermediate=40, vocab=48, attention_bias=True)
    model.set_attn_implementation("eager")
    model.double().requires_grad_(False)
    return SampleFunction(model, tokens=torch.tensor([5, 9])), samples_of(48)


CASES: dict[str, Any] = {
    "bert": lambda: bert(2),
    "bert_of_three_classes": lambda: bert(3),
    "llama": lambda: llama(False),
    "llama_tied": lambda: llama(True),
}


def all_subsets(function: SampleFunction, samples: list[dict[str, Tensor]]) -> list[Any]:
    """The study's, and one of mixed kinds that overlap, on the embedding too."""
    config = SubsetsConfig(per_matrix=(1, 3), block_size=5, lora_ranks=(1, 3), scores=("random", "abs_of_mean"))
    maker = SubsetMaker(config, function, samples[:NUM_TRAIN], [0, 1, 0], seed=3)
    return [maker.make(named) for named in named_subsets(config)]


def mixed(function: SampleFunction) -> Subset:
    weights = {}
    for matrix in sz.default_module_map(function.base).matrices:
        blocks = [(0, 0), (1, 1)] if min(matrix.shape) > 7 else [(0, 0)]
        weights[matrix.parameter] = WeightSelection(
            shape=matrix.shape,
            block_size=(5, 7),
            blocks=blocks,
            rows=[0, matrix.shape[0] - 1],
            columns=[1, matrix.shape[1] - 1],
        )
    return Subset(name="mixed", selection=sz.Selection(weights))


@pytest.mark.parametrize(
    "case", [case if case in ("bert", "llama_tied") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_subsets_have_the_kernels_of_brute_force(case: str) -> None:
    function, samples = CASES[case]()
    made = all_subsets(function, samples)
    subsets = [*(each.subset for each in made), mixed(function)]
    found = compute_kernels(function, samples, NUM_TRAIN, subsets, max_bytes=GIB)
    # The same, when only the subset's part is formed; whole matrices have less rows than directions here.
    direct = compute_kernels(function, samples, NUM_TRAIN, subsets, max_bytes=GIB, sketch=4096)
    jacobian = jacobians(function, samples)
    assert found.num_passes == 1
    for subset in subsets:
        expected = kernel_of(subset, jacobian)
        assert expected.norm() > 0
        for kernels in (found, direct):
            value = kernels.values[subset.name]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12 * float(expected.norm()))
            train = value[:NUM_TRAIN]
            torch.testing.assert_close(train, train.T, rtol=1e-10, atol=1e-14)
            assert torch.linalg.eigvalsh(train).min() > -1e-12 * train.trace()
    # Budgets are what was selected.
    for each in made:
        if each.subset.selection is not None:
            assert each.num_parameters == each.subset.selection.num_parameters
        if each.subset.lora:
            base = dict(function.base.named_parameters())
            rank = each.named.budget
            assert each.num_parameters == sum(rank * sum(base[name].shape) for name in each.subset.lora)
    by_name = {each.named.name: each.num_parameters for each in made}
    rows = sum(
        weight.shape[1] for weight in next(m for m in made if m.named.kind == "rows").subset.selection.weights.values()
    )
    assert by_name["rows-3-random"] == 3 * rows
    assert 0 <= 3 * rows - by_name["blocks-3-random"] < 25
    assert by_name["full"] == sum(parameter.numel() for parameter in function.base.parameters())


@pytest.mark.slow
def test_a_small_bound_takes_more_passes_and_gives_the_same() -> None:
    function, samples = bert(3)
    subsets = [each.subset for each in all_subsets(function, samples)]
    expected = compute_kernels(function, samples, NUM_TRAIN, subsets, max_bytes=GIB)
    collector = Collector(function, samples, GIB)
    single = max(collector._bytes(name) for name in collector.parameters)
    bound = 2 * int(1.5 * single)
    found = compute_kernels(function, samples, NUM_TRAIN, subsets, max_bytes=bound)
    assert found.num_passes > 2
    for name, value in expected.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-10, atol=1e-12 * float(value.norm()))
    # What is kept is what was reckoned with, at most.
    for group in Collector(function, samples, bound // 2).groups:
        factors = collector.collect(group)
        tensors = list(factors.dense.values())
        for per_sample in factors.uses.values():
            for uses in per_sample:
                tensors += [t for use in uses for t in (use.inputs, use.ids, use.deltas) if t is not None]
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= bound // 2
    with pytest.raises(InputError, match=r"kernel.max_memory_gib is too small: .* alone needs"):
        compute_kernels(function, samples, NUM_TRAIN, subsets, max_bytes=single)


class Linears(nn.Module):
    """Linears without anything between them, on vectors as samples; what transformers would return."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(given, made, bias=False).double() for given, made in pairwise(sizes))

    def forward(self, input_ids: Tensor) -> Any:
        states = input_ids
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(logits=states.mean(1), last_hidden_state=states)


def vectors(number: int, width: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    given = torch.randn(number, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return given, [{"input_ids": vector.reshape(1, 1, -1)} for vector in given]


def of_region(name: str, shape: tuple[int, int], **regions: Any) -> Subset:
    weights = {name: WeightSelection(shape=shape, **regions)}
    return Subset(name=str(regions), selection=sz.Selection(weights))


def test_a_linear_model_has_the_kernel_of_its_inputs() -> None:
    torch.manual_seed(0)
    base = Linears(6, 4).requires_grad_(False)
    head = torch.randn(1, 4, dtype=torch.float64)
    given, samples = vectors(5, 6)
    name, shape = "layers.0.weight", (4, 6)
    rows, columns = of_region(name, shape, rows=[1, 3]), of_region(name, shape, columns=[0, 5])
    block = of_region(name, shape, block_size=2, blocks=[(1, 2)])
    lora = Subset(name="lora", lora={name: torch.randn(2, 6, dtype=torch.float64)})
    subsets = [Subset(name="full", parameters=(name,)), rows, columns, block, lora]
    function = SampleFunction(base, weight=head)
    values = compute_kernels(function, samples, 5, subsets, max_bytes=GIB).values
    # f = v.W x: the gradient of W is v x.T.
    gram, squares = given @ given.T, head.square()[0]
    expected = {
        "full": gram * squares.sum(),
        rows.name: gram * squares[[1, 3]].sum(),
        columns.name: given[:, [0, 5]] @ given[:, [0, 5]].T * squares.sum(),
        block.name: given[:, 4:6] @ given[:, 4:6].T * squares[2:4].sum(),
        "lora": (given @ lora.lora["layers.0.weight"].T) @ (given @ lora.lora["layers.0.weight"].T).T * squares.sum(),
    }
    for each, value in expected.items():
        torch.testing.assert_close(values[each], value)


def test_a_net_of_two_linears_has_its_closed_form() -> None:
    torch.manual_seed(0)
    base = Linears(6, 5, 3).requires_grad_(False)
    given, samples = vectors(4, 6)
    names = ("layers.0.weight", "layers.1.weight")
    rows = of_region(names[0], (5, 6), rows=[2])
    columns = of_region(names[1], (3, 5), columns=[0, 4])
    subsets = [Subset(name="full", parameters=names), rows, columns]
    # Three outputs: their kernels are added up.
    values = compute_kernels(SampleFunction(base), samples, 4, subsets, max_bytes=GIB).values
    first, second = (layer.weight for layer in base.layers)
    hidden = given @ first.T
    gram = given @ given.T
    torch.testing.assert_close(values["full"], gram * second.square().sum() + 3 * hidden @ hidden.T)
    torch.testing.assert_close(values[rows.name], gram * second[:, 2].square().sum())
    torch.testing.assert_close(values[columns.name], 3 * hidden[:, [0, 4]] @ hidden[:, [0, 4]].T)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_is_what_peft_trains_at_its_start() -> None:
    peft = pytest.importorskip("peft")
    function, samples = bert(2)
    modules = ["query", "value", "intermediate.dense"]
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=modules, lora_dropout=0.0)
    plain = {name: parameter.clone() for name, parameter in function.base.named_parameters()}
    adapted = peft.get_peft_model(function.base, config)
    tuned = {name: each for name, each in adapted.named_parameters() if ".lora_" in name}
    rows = []
    for inputs in samples:
        output = SampleFunction(adapted)(inputs)[0]
        gradients = torch.autograd.grad(output, list(tuned.values()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    expected = torch.stack(rows) @ torch.stack(rows)[:NUM_TRAIN].T
    down = {
        name.removeprefix("base_model.model.").replace("lora_A.default.weight", "weight"): each.detach()
        for name, each in tuned.items()
        if "lora_A" in name
    }
    assert set(down) <= set(plain)
    fresh, _ = bert(2)
    found = compute_kernels(fresh, samples, NUM_TRAIN, [Subset(name="lora", lora=down)], max_bytes=GIB)
    torch.testing.assert_close(found.values["lora"], expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


def sketched(function: SampleFunction, samples: Any, sketch: int, seed: int) -> Kernels:
    subsets = [Subset(name="full", parameters=tuple(dict(function.base.named_parameters())))]
    return compute_kernels(function, samples, NUM_TRAIN, subsets, max_bytes=GIB, sketch=sketch, seed=seed)


@pytest.mark.slow
def test_a_sketch_errs_as_much_as_it_says() -> None:
    function, samples = bert(2)
    expected = sketched(function, samples, 4096, 0)
    # All matrices have less rows: nothing was sketched.
    assert expected.errors["full"].bound == 0.0
    assert expected.errors["full"].estimate < 1e-12
    exact = expected.values["full"][:NUM_TRAIN]
    for sketch in (8, 24):
        errors, estimates, bounds, values = [], [], [], []
        for seed in range(6):
            found = sketched(function, samples, sketch, seed)
            value = found.values["full"][:NUM_TRAIN]
            errors.append(float((value - exact).norm() / exact.norm()))
            estimates.append(found.errors["full"].estimate)
            bounds.append(found.errors["full"].bound)
            values.append(value)
            torch.testing.assert_close(value, value.T, rtol=1e-10, atol=1e-12)
            assert torch.linalg.eigvalsh(value).min() > -1e-10 * value.trace()
        root = (sum(error**2 for error in errors) / len(errors)) ** 0.5
        told = (sum(estimate**2 for estimate in estimates) / len(estimates)) ** 0.5
        assert 0 < root <= max(bounds)
        assert root == pytest.approx(told, rel=0.6)
        # Without bias: the mean over seeds is nearer than one of them.
        assert float((torch.stack(values).mean(0) - exact).norm() / exact.norm()) < 0.8 * root


def test_what_is_not_the_models_own_is_refused() -> None:
    function, samples = bert(2)
    unknown = Subset(name="other", parameters=("no.such.weight",))
    with pytest.raises(InputError, match=r"the subset other has no.such.weight, which is no parameter"):
        compute_kernels(function, samples, NUM_TRAIN, [unknown], max_bytes=GIB)
    wrong = of_region("classifier.weight", (32, 2), rows=[0])
    with pytest.raises(InputError, match=r"stores it as \(2, 32\)"):
        compute_kernels(function, samples, NUM_TRAIN, [wrong], max_bytes=GIB)


class ReadsTwice(Linears):
    """Uses the matrix of a linear also without calling it."""

    def forward(self, input_ids: Tensor) -> Any:
        states = super().forward(input_ids).last_hidden_state + input_ids @ self.layers[0].weight.T
        return SimpleNamespace(logits=states.mean(1), last_hidden_state=states)


def test_a_matrix_that_is_used_otherwise_is_found_out() -> None:
    samples = vectors(2, 6)[1]
    function = SampleFunction(ReadsTwice(6, 2).requires_grad_(False))
    with pytest.raises(InputError, match=r"uses layers.0.weight otherwise than by calling its module"):
        compute_kernels(function, samples, 1, [Subset(name="full", parameters=("layers.0.weight",))], max_bytes=GIB)
