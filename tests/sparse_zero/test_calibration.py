"""Does calibration give every rule what it asks for, on any kind of matrix, and leave the model as it was?"""

import gc
import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.module_map import default_module_map
from sparse_zero.selection.calibration import Key, calibrate, default_loss
from sparse_zero.selection.candidates import Candidates, find_candidates
from sparse_zero.selection.scores import SCORES, ScoreRule, generator_for
from tests.sparse_zero.helpers import TinyAttention, TinyModel, tiny_loss

LINEARS = "layers.*.self_attn.{q,k,v,o}_proj"


# -- rules: what they return tells what they were given


def sums(regions: Candidates, *, gradient_sums: Tensor) -> Tensor:
    return gradient_sums


def squares(regions: Candidates, *, gradient: Tensor) -> Tensor:
    return regions.sums(gradient.square())


def dense_sums(regions: Candidates, *, gradient: Tensor) -> Tensor:
    return regions.sums(gradient)


def failing_in_one(regions: Candidates, *, gradient: Tensor) -> Tensor:
    if regions.weight == "layers.0.mlp.weight":
        raise ArithmeticError("a rule that fails")
    return regions.sums(gradient)


def of_norms(regions: Candidates, *, weight: Tensor, input_norm: Tensor, output_norm: Tensor) -> Tensor:
    return regions.sums(weight.abs() * input_norm * output_norm.unsqueeze(1))


def input_and_output(regions: Candidates, *, input_norm: Tensor, output_norm: Tensor) -> Tensor:
    return regions.sums(input_norm * output_norm.unsqueeze(1))


def everything(
    regions: Candidates,
    *,
    gradient_sums: Tensor,
    gradient: Tensor,
    weight: Tensor,
    input_norm: Tensor,
    output_norm: Tensor,
    generator: torch.Generator,
) -> Tensor:
    noise = torch.rand(regions.grid, dtype=torch.float64, generator=generator)
    mixed = (gradient * weight).abs() * input_norm * output_norm.unsqueeze(1)
    return gradient_sums + regions.sums(mixed) + 1e-3 * noise


def rule(function: Callable[..., Tensor]) -> ScoreRule:
    needs = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return ScoreRule(function.__name__, function, frozenset(needs))


RULES = {
    function.__name__: rule(function)
    for function in (sums, squares, dense_sums, failing_in_one, of_norms, input_and_output, everything)
} | dict(SCORES)


# -- models and data


class Experts(nn.Module):
    """Three experts in one tensor; every token passes all of them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 14, hidden) / 5)
        self.down_proj = nn.Parameter(torch.randn(3, hidden, 14) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ebti->bto", self.down_proj, torch.tanh(torch.einsum("eoi,bti->ebto", self.up_proj, x)))


class MixedModel(nn.Module):
    """All that a parameter can be: linear with and without bias, Conv1D, experts in one tensor, a tied head."""

    def __init__(self, hidden: int = 20, vocabulary: int = 32) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList()
        for number in range(2):
            layer = nn.Module()
            layer.self_attn = TinyAttention(hidden)
            layer.mlp = Conv1D(hidden, hidden)
            layer.mlp.weight = nn.Parameter(torch.randn(hidden, hidden) * 0.3)
            if number == 1:
                layer.experts = Experts(hidden)
            self.layers.append(layer)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.checkpointing: str = "off"

    def layer(self, number: int, x: Tensor) -> Tensor:
        layer = self.layers[number]
        x = x + torch.tanh(layer.mlp(layer.self_attn(x)))
        return x + layer.experts(x) if number == 1 else x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for number in range(2):
            if self.checkpointing == "off":
                x = self.layer(number, x)
            else:
                x = checkpoint(self.layer, number, x, use_reentrant=self.checkpointing == "reentrant")
        logits: Tensor = self.lm_head(x)
        return logits


def make_mixed(checkpointing: str = "off") -> MixedModel:
    torch.manual_seed(11)
    model = MixedModel()
    model.checkpointing = checkpointing
    return model


def make_model(**options: Any) -> TinyModel:
    torch.manual_seed(11)
    return TinyModel(**options)


def make_batches(number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 32, (2, 9), generator=generator) for _ in range(number)]


def families(score: str, linears: str = LINEARS) -> tuple[sz.RegionConfig, ...]:
    """Ragged square blocks, oblong blocks, rows and columns of the linears."""
    square, oblong = linears.replace("{q,k,v,o}", "{q,k}"), linears.replace("{q,k,v,o}", "{v,o}")
    return (
        sz.RegionConfig(kind="block", modules=(square,), block_size=6, per_matrix=1, score=score),
        sz.RegionConfig(kind="block", modules=(oblong,), blocks_per_side=3, per_matrix=1, score=score),
        sz.RegionConfig(kind="row", modules=(linears,), per_matrix=1, score=score),
        sz.RegionConfig(kind="column", modules=(linears,), per_matrix=1, score=score),
    )


def all_families(score: str) -> tuple[sz.RegionConfig, ...]:
    """The same for everything in a MixedModel."""
    others = ("layers.*.mlp", "layers.1.experts.{up,down}_proj", "embed_tokens")
    return (
        *families(score),
        sz.RegionConfig(kind="block", modules=others, block_size=6, per_matrix=1, score=score),
        sz.RegionConfig(kind="row", modules=others, per_matrix=1, score=score),
        sz.RegionConfig(kind="column", modules=others, per_matrix=1, score=score),
    )


def calibrated(
    model: nn.Module,
    regions: Sequence[sz.RegionConfig],
    batches: Sequence[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] = tiny_loss,
    **options: Any,
) -> tuple[dict[Key, Tensor], list[Candidates]]:
    """Scores, and the candidates that have them."""
    config = sz.SelectionConfig(regions=tuple(regions), **options)
    module_map = default_module_map(model)
    candidates = find_candidates(config, module_map)
    batches = make_batches() if batches is None else batches
    scores, number = calibrate(model, batches, candidates, RULES, loss_fn, config=config, module_map=module_map)
    assert number == len(batches)
    return scores, candidates


# -- the reference: dense gradients by plain autograd


@dataclass
class Observed:
    """What plain autograd and plain hooks see of one micro-batch."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def plainly_observed(
    model: nn.Module, batches: Sequence[Any], loss_fn: Callable[[Any, Any], Tensor] = tiny_loss
) -> list[Observed]:
    steps = []
    for batch in batches:
        step = Observed()
        handles = []
        for name, module in model.named_modules():

            def see(module: nn.Module, args: Any, output: Any, name: str = name, step: Observed = step) -> None:
                if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                    for side, seen in (("input_norm", args[0]), ("output_norm", output)):
                        flat = seen.detach().double().reshape(-1, seen.shape[-1])
                        step.squares[name, side] = flat.square().sum(0)

            handles.append(module.register_forward_hook(see))
        model.zero_grad()
        loss_fn(model, batch).backward()
        for handle in handles:
            handle.remove()
        step.gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        steps.append(step)
    return steps


def region_sums(candidates: Candidates, matrix_OI: Tensor) -> Tensor:
    """By loops over slices, the slow and plain way."""
    if candidates.kind == "row":
        return torch.stack([row.sum() for row in matrix_OI])
    if candidates.kind == "column":
        return torch.stack([column.sum() for column in matrix_OI.T])
    height, width = candidates.block_shape
    return torch.stack([
        torch.stack([
            matrix_OI[i * height : (i + 1) * height, j * width : (j + 1) * width].sum()
            for j in range(candidates.grid[1])
        ])
        for i in range(candidates.grid[0])
    ])  # fmt: skip


def expected(model: nn.Module, steps: Sequence[Observed], candidates: Candidates, *, per_step: bool) -> Tensor:
    """What the rule gives on dense gradients and plain norms."""
    wanted = RULES[candidates.score]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def call(members: Sequence[Observed]) -> Tensor:
        zeros = torch.zeros_like(parameters[candidates.matrix.parameter], dtype=torch.float64)
        stored = torch.stack([step.gradients.get(candidates.matrix.parameter, zeros) for step in members]).mean(0)
        gradient = candidates.matrix.view(stored, candidates.slice_index)
        given: dict[str, Any] = {
            "gradient": gradient,
            "gradient_sums": region_sums(candidates, gradient),
            "weight": candidates.matrix.view(parameters[candidates.matrix.parameter], candidates.slice_index),
            "generator": generator_for(candidates, 0),
        }
        for side, length in zip(("output_norm", "input_norm"), candidates.shape, strict=True):
            found = [step.squares.get((candidates.module, side), torch.zeros(length)).double() for step in members]
            given[side] = torch.stack(found).sum(0).sqrt()
        return wanted.function(candidates, **{name: given[name] for name in wanted.needs})

    if per_step and wanted.needs_gradient:
        return torch.stack([call([step]) for step in steps]).mean(0)
    return call(steps)


def assert_as_expected(
    model: nn.Module,
    steps: Sequence[Observed],
    found: tuple[dict[Key, Tensor], list[Candidates]],
    *,
    per_step: bool,
    tolerance: float,
) -> None:
    scores, candidates = found
    assert {(c.weight, c.kind) for c in candidates} == set(scores)
    for c in candidates:
        wanted = expected(model, steps, c, per_step=per_step)
        assert float(wanted.abs().max()) > 1e-7, f"nothing to compare in {c.weight}"
        got = scores[c.weight, c.kind]
        assert got.dtype == torch.float64
        difference = float((got - wanted).abs().max() / wanted.abs().max())
        assert difference <= tolerance, f"{c.weight} {c.kind}: {difference}"


# -- every need, every matrix, every checkpointing


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("score", ["sums", "squares"])
def test_gradients_of_every_kind_of_matrix_equal_the_dense_ones(score, checkpointing, accumulate):
    model, batches = make_mixed(checkpointing).double(), make_batches()
    found = calibrated(
        model, all_families(score), batches, accumulate=accumulate, accumulator_dtype="float64"
    )  # fmt: skip
    kinds = {(c.weight, c.kind) for c in found[1]}
    assert ("layers.1.experts.up_proj[2]", "block") in kinds
    assert ("embed_tokens.weight", "row") in kinds
    plain = make_mixed().double()
    steps = plainly_observed(plain, batches)
    assert_as_expected(plain, steps, found, per_step=accumulate == "per_step", tolerance=1e-12)


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("score", ["of_norms", "everything"])
def test_weights_norms_and_generators_reach_the_rule(score, checkpointing, accumulate):
    model, batches = make_mixed(checkpointing).double(), make_batches()
    regions = families(score)
    regions += (sz.RegionConfig(kind="column", modules=("layers.*.mlp",), per_matrix=1, score=score),)
    found = calibrated(model, regions, batches, accumulate=accumulate, accumulator_dtype="float64")
    plain = make_mixed().double()
    steps = plainly_observed(plain, batches)
    assert_as_expected(plain, steps, found, per_step=accumulate == "per_step", tolerance=1e-12)


@pytest.mark.parametrize("score", ["sums", "squares", "everything"])
def test_under_autocast_gradients_are_those_of_autograd_in_bf16(score):
    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tiny_loss(model, tokens)

    model = make_mixed()
    regions = families(score)
    found = calibrated(model, regions, loss_fn=loss_fn)
    plain = make_mixed()
    # What remains is that autograd rounds each entry of dW to bf16, which sums of X and dY do not.
    assert_as_expected(plain, plainly_observed(plain, make_batches(), loss_fn), found, per_step=False, tolerance=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around, _ = calibrated(model, regions)
    for key, scores in found[0].items():
        torch.testing.assert_close(around[key], scores, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-5)]
)  # fmt: skip
def test_accumulators_of_every_dtype_and_on_disk(dtype, tolerance, tmp_path):
    batches = make_batches()
    in_memory = calibrated(make_mixed(), all_families("squares"), batches, accumulator_dtype=dtype)
    plain = make_mixed()
    steps = plainly_observed(plain, batches)
    assert_as_expected(plain, steps, in_memory, per_step=False, tolerance=tolerance)
    mapped, _ = calibrated(
        make_mixed(), all_families("squares"), batches, accumulator_dtype=dtype, accumulator_folder=str(tmp_path)
    )
    assert all(torch.equal(mapped[key], scores) for key, scores in in_memory[0].items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_transformers_model_with_padding_and_gradient_checkpointing(reentrant):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
        )
    ).double()  # fmt: skip
    tokens = torch.randint(0, 32, (3, 2, 10))
    mask = torch.ones(3, 2, 10, dtype=torch.int64)
    mask[1, 0, 6:] = 0
    batches = [
        {"input_ids": t, "attention_mask": m, "labels": t.masked_fill(m == 0, -100)}
        for t, m in zip(tokens, mask, strict=True)
    ]
    regions = families("everything", "model.layers.*.self_attn.{q,k,v,o}_proj")
    steps = plainly_observed(model, batches, default_loss)
    # The plain hooks count padding: look at every micro-batch again, without it.
    seen: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: seen.append((name, args[0], output)))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    for step, batch in zip(steps, batches, strict=True):
        seen.clear()
        with torch.no_grad():
            model(**batch)
        attended = batch["attention_mask"].bool()
        for name, x, y in seen:
            step.squares[name, "input_norm"] = x[attended].square().sum(0)
            step.squares[name, "output_norm"] = y[attended].square().sum(0)
    for handle in handles:
        handle.remove()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = calibrated(model, regions, batches, default_loss, accumulator_dtype="float64")
    assert_as_expected(model, steps, found, per_step=False, tolerance=1e-12)


def test_weights_in_four_bits():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
    model, dense = make_model(), make_model()
    for (name, module), plain in zip(list(model.named_modules()), dense.modules(), strict=True):
        if name.endswith("_proj"):
            quantized = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, quant_type="nf4",
                compute_dtype=torch.float32,
            )  # fmt: skip
            quantized.load_state_dict(module.state_dict())
            quantized = quantized.to("cpu")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized)
            values = bnb.functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
            plain.weight.data.copy_(values)
    steps = plainly_observed(dense, make_batches())
    for score in ("sums", "squares", "input_and_output"):
        for accumulate in ("sum", "per_step"):
            found = calibrated(model, families(score), accumulate=accumulate)
            assert all(c.matrix.is_quantized for c in found[1])
            assert_as_expected(dense, steps, found, per_step=accumulate == "per_step", tolerance=1e-5)
    assert all(module.weight.dtype == torch.uint8 for name, module in model.named_modules() if name.endswith("_proj"))


# -- precision


class Wide(nn.Module):
    """One linear whose inputs and gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(520, 300, bias=False)


def test_sums_of_fp32_are_within_a_millionth_of_the_exact_gradient():
    """With offsets that make strips large and their gradients cancel over the tokens."""
    torch.manual_seed(0)
    model = Wide()
    x = torch.randn(3, 150, 520) + 3.0
    weights = torch.randn(3, 150, 300)
    weights -= weights.mean(1, keepdim=True)
    regions = (
        sz.RegionConfig(kind="block", modules=("proj",), block_size=64, per_matrix=1, score="sums"),
        sz.RegionConfig(kind="row", modules=("proj",), per_matrix=1, score="sums"),
        sz.RegionConfig(kind="column", modules=("proj",), per_matrix=1, score="sums"),
    )
    batches = list(zip(x, weights, strict=True))
    scores, candidates = calibrated(
        model, regions, batches, lambda model, batch: (model.proj(batch[0]) * batch[1]).sum()
    )
    exact = sum(dy.double().T @ each.double() for each, dy in batches) / 3
    assert isinstance(exact, Tensor)
    for c in candidates:
        difference = (scores[c.weight, c.kind] - region_sums(c, exact)).abs()
        assert float((difference / region_sums(c, exact.abs())).max()) < 1e-6, c.kind


@pytest.mark.parametrize(("factor", "is_near"), [(1.0 + 2e-7, True), (1.001, False)])
def test_a_near_tie_at_the_cut_is_reported(factor, is_near):
    """Two rows stand out, and all but tie; one is chosen."""
    torch.manual_seed(0)
    x, weights = torch.randn(40, 520), torch.randn(40, 300)
    weights[:, 17] *= 100.0
    weights[:, 211] = weights[:, 17] * factor
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="row", modules=("proj",)),), budget=sz.BudgetConfig(regions=1)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selection = sz.select(Wide(), [x], config, lambda model, x: (model.proj(x) * weights).sum())
    assert selection.weights["proj.weight"].rows.tolist() == [211]
    assert [("within summation noise" in str(each.message)) for each in caught] == [True] * is_near


def test_small_gradients_of_an_fp16_model_do_not_underflow():
    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        return tiny_loss(model, tokens) * 1e-5

    half = make_model().half()
    regions = families("sums")
    plain = make_model().half().float()
    steps = plainly_observed(plain, make_batches(), loss_fn)
    for accumulate in ("sum", "per_step"):
        found = calibrated(half, regions, loss_fn=loss_fn, accumulate=accumulate)
        assert_as_expected(plain, steps, found, per_step=accumulate == "per_step", tolerance=0.03)
    lost = float((plainly_observed(half, make_batches(), loss_fn)[0].gradients["lm_head.weight"] == 0).double().mean())
    assert lost > 0.1, "nothing underflows without the scale: the test shows nothing"


# -- what is computed, and what is not


class Calls(TorchDispatchMode):
    """Records the operations that run, and the shapes of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            self.seen.append((str(function), tuple(args[0].shape), tuple(result.shape)))
        return result


def test_linear_scores_form_no_weight_gradient():
    with Calls() as calls:
        calibrated(make_model(), families("sums"))
    assert any("mm" in name for name, _, _ in calls.seen)
    products = {shape for name, _, shape in calls.seen if "mm" in name}
    assert products.isdisjoint({(20, 20), (10, 20), (20, 10)})


def test_siblings_share_the_strip_sums_of_their_input():
    calls = Calls()

    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        with calls:
            return tiny_loss(model, tokens)

    regions = (sz.RegionConfig(kind="block", modules=("*.{q,k,v}_proj",), block_size=5, per_matrix=1, score="sums"),)
    calibrated(make_model(), regions, make_batches(1), loss_fn)
    strips = [shapes for name, *shapes in calls.seen if "sum" in name and shapes[0] == (18, 4, 5)]
    assert len(strips) == 3, "one for each layer"


def test_the_graph_begins_at_the_lowest_scored_matrix():
    model = make_model()
    required: list[bool] = []
    model.layers[1].self_attn.register_forward_hook(lambda _, args, output: required.append(output.requires_grad))
    model.layers[2].self_attn.register_forward_hook(lambda _, args, output: required.append(output.requires_grad))
    with Calls() as calls:
        calibrated(model, families("sums", "layers.2.self_attn.{q,k,v,o}_proj"), make_batches(1))
    assert required == [False, True]
    # Backward multiplies in the head, o_proj, and nowhere below: 13 products forward, two of gradients.
    products = [name for name, _, shape in calls.seen if "mm" in name and shape[0] == 18]
    assert len(products) == 13 + 2


def test_only_norms_need_no_backward():
    enabled: list[bool] = []

    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return tiny_loss(model, tokens)

    found = calibrated(make_model(), families("of_norms"), loss_fn=loss_fn)
    assert enabled == [False] * 3
    model = make_model()
    assert_as_expected(model, plainly_observed(model, make_batches()), found, per_step=False, tolerance=1e-5)


def test_one_dense_gradient_is_alive_at_a_time():
    """In per_step calibration each is scored, and dropped before the next one is formed."""
    alive: list[int] = []
    gradients: list[weakref.ref[Tensor]] = []

    def watching(regions: Candidates, *, gradient: Tensor) -> Tensor:
        gradients.append(weakref.ref(gradient))
        alive.append(sum(each() is not None for each in gradients))
        return regions.sums(gradient.square())

    RULES["watching"] = rule(watching)
    try:
        gc.disable()
        calibrated(make_mixed(), [
            sz.RegionConfig(kind="row", modules=("layers.*",), per_matrix=1, score="watching"),
        ], accumulate="per_step")  # fmt: skip
    finally:
        gc.enable()
        del RULES["watching"]
    assert len(alive) > 20
    # The matrices of one stack lie in one tensor, and are scored one after another.
    assert max(alive) <= 2


# -- models that do uncommon things


class Inplace(nn.Module):
    """Changes what its linears return in place, also that of the lowest one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.low_proj, self.up_proj, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.low_proj(self.embed(tokens)).relu_()
        x = self.up_proj(x)
        x.mul_(2.0).relu_()
        logits: Tensor = self.head(input=x)
        return logits


class Repeated(nn.Module):
    """One layer that is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj, self.head = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = x + torch.tanh(self.proj(x))
        with torch.no_grad():
            self.proj(x)  # Seen, and without a gradient.
        logits: Tensor = self.head(x)
        return logits


class Routed(nn.Module):
    """Two linears, of which a micro-batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.a_proj, self.b_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        chosen = self.a_proj if int(tokens[0, 0]) % 2 else self.b_proj
        logits: Tensor = self.head(torch.tanh(chosen(self.embed(tokens))))
        return logits


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("score", ["sums", "squares"])
@pytest.mark.parametrize("kind_of_model", [Inplace, Repeated, Routed])
def test_models_that_do_uncommon_things(kind_of_model, score, accumulate):
    def make() -> nn.Module:
        torch.manual_seed(2)
        model: nn.Module = kind_of_model().double()
        return model

    batches = make_batches(4)
    for number, batch in enumerate(batches):
        batch[0, 0] = number == 2
    regions = (
        sz.RegionConfig(kind="block", modules=("*proj",), block_size=5, per_matrix=1, score=score),
        sz.RegionConfig(kind="row", modules=("*proj",), per_matrix=1, score=score),
        sz.RegionConfig(kind="column", modules=("*proj",), per_matrix=1, score=score),
    )
    found = calibrated(make(), regions, batches, accumulate=accumulate, accumulator_dtype="float64")
    plain = make()
    steps = plainly_observed(plain, batches)
    assert_as_expected(plain, steps, found, per_step=accumulate == "per_step", tolerance=1e-12)


class InParts(nn.Module):
    """Reads a parameter by hand inside two reentrant checkpoints: its gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.holder = nn.Module()
        self.holder.table = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(x @ self.holder.table.T), x, use_reentrant=True)
        logits: Tensor = self.head(x)
        return logits


def test_a_gradient_in_parts_is_added_up_or_refused():
    torch.manual_seed(2)
    model = InParts().double()
    # The embedding is scored too, so that its output requires grad and the checkpoints pass gradients on.
    regions = (sz.RegionConfig(kind="row", modules=("holder.table", "embed"), per_matrix=1, score="squares"),)
    found = calibrated(model, regions, accumulator_dtype="float64")
    steps = plainly_observed(model, make_batches())
    assert_as_expected(model, steps, found, per_step=False, tolerance=1e-12)
    with pytest.raises(InputError, match=r"gradient of holder\.table came in parts"):
        calibrated(model, regions, accumulate="per_step")


def test_a_sparse_embedding_gradient_is_read_like_a_dense_one():
    torch.manual_seed(2)
    model = Routed()
    regions = (sz.RegionConfig(kind="row", modules=("embed",), per_matrix=1, score="squares"),)
    dense, _ = calibrated(model, regions)
    model.embed.sparse = True
    sparse, _ = calibrated(model, regions)
    torch.testing.assert_close(sparse["embed.weight", "row"], dense["embed.weight", "row"])


def test_a_sparse_model_is_calibrated_as_it_stands():
    """Inplace, W is what the values were written into; the scores are those of the dense model."""
    regions = families("sums")
    plain, _ = calibrated(make_model(), regions)
    model = make_model()
    chosen = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="row", modules=("*.{q,o}_proj",), per_matrix=2),), score="first"
    )
    for placement in ("inplace", "delta"):
        model = make_model()
        sz.sparsify(model, sz.select(model, None, chosen), placement=placement)
        trained = sz.trainable_parameters(model)
        found, _ = calibrated(model, regions)
        assert found.keys() == plain.keys()
        for key, scores in found.items():
            torch.testing.assert_close(scores, plain[key], rtol=1e-5, atol=1e-9)
        assert all(values.requires_grad and values.grad is None for values in trained.values())


# -- nothing is changed


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._forward_hooks_with_kwargs))
        for m in model.modules()
    ]
    return {
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "hooks": hooks,
        "on_parameters": {
            name: (len(p._post_accumulate_grad_hooks or ()), len(p._backward_hooks or ()))
            for name, p in model.named_parameters()
        },
        "random": torch.get_rng_state().tolist(),
        "training": [m.training for m in model.modules()],
    }


@pytest.mark.parametrize("checkpointing", ["off", "reentrant"])
@pytest.mark.parametrize("fails", ["no", "in forward", "in backward", "in the rule"])
def test_the_model_is_left_as_it_was(fails, checkpointing, tmp_path):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            raise ArithmeticError("in backward")

    def failing_rule(regions: Candidates, *, gradient: Tensor) -> Tensor:
        raise ArithmeticError("in the rule")

    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        if fails == "in forward" and len(done) == 1:
            model.embed_tokens(tokens)
            raise ArithmeticError("in forward")
        done.append(1)
        loss = tiny_loss(model, tokens)
        applied: Tensor = Failing.apply(loss) if fails == "in backward" and len(done) > 2 else loss
        return applied

    done: list[int] = []
    model = make_mixed(checkpointing).train()
    model.layers[0].mlp.weight.requires_grad_(False)
    model.layers[0].self_attn.q_proj.weight.grad = torch.ones(20, 20)
    model.layers[1].self_attn.eval()
    before, weights = state_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    RULES["failing_rule"] = rule(failing_rule)
    try:
        if fails == "no":
            calibrated(model, all_families("squares"), loss_fn=loss_fn, accumulator_folder=str(tmp_path))
        else:
            score = "failing_rule" if fails == "in the rule" else "squares"
            with pytest.raises(ArithmeticError, match=fails):
                calibrated(model, all_families(score), loss_fn=loss_fn, accumulator_folder=str(tmp_path))
    finally:
        del RULES["failing_rule"]
    assert done
    assert state_of(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert list(tmp_path.iterdir()) == []


def test_what_was_seen_is_not_kept_alive():
    """Nor are inputs, outputs and graphs, once calibration is over."""
    kept: list[weakref.ref[Tensor]] = []

    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        loss = tiny_loss(model, tokens)
        kept.append(weakref.ref(loss))
        return loss

    model = make_model()
    model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, output: kept.append(weakref.ref(args[0])))
    gc.disable()
    try:
        calibrated(model, families("everything"), loss_fn=loss_fn)
        assert len(kept) == 6
        assert all(each() is None for each in kept)
    finally:
        gc.enable()


def test_every_micro_batch_has_its_own_seed():
    """Dropout is that of the micro-batch, whatever ran before; and the generator is left as it was."""
    model = make_model()
    model.layers[1].self_attn.register_forward_hook(lambda _, args, output: nn.functional.dropout(output, 0.3))
    regions = families("sums")
    first, _ = calibrated(model, regions)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second, _ = calibrated(model, regions)
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = calibrated(model, regions, seed=1)
    key = ("layers.1.self_attn.q_proj.weight", "row")
    assert torch.equal(first[key], second[key])
    assert not torch.equal(first[key], other[key])


# -- errors


def test_wrong_input_is_named():
    regions = families("sums")
    with pytest.raises(InputError, match="got no batches"):
        calibrated(make_model(), regions, [])
    config = sz.SelectionConfig(regions=regions)
    model = make_model()
    candidates = find_candidates(config, default_module_map(make_model(hidden=24)))
    with pytest.raises(InputError, match=r"candidates in layers\.0\.self_attn.* are not in the model's module_map"):
        calibrate(
            model, make_batches(), candidates, RULES, tiny_loss, config=config, module_map=default_module_map(model)
        )
    with pytest.raises(InputError, match=r"depends on none of the matrices"):
        calibrated(model, regions, loss_fn=lambda model, tokens: model.embed_tokens(tokens).sum())
    with pytest.raises(InputError, match="which is not a folder"):
        calibrated(model, families("squares"), accumulator_folder="/nonexistent")


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("score", ["sums", "squares", "everything"])
def test_numbers_that_are_not_finite_are_named(score, accumulate):
    regions = families(score)
    model = make_model()
    calls: list[int] = []

    def second_is_nan(model: Any, tokens: Tensor) -> Tensor:
        calls.append(1)
        return tiny_loss(model, tokens) * (float("nan") if len(calls) == 2 else 1.0)

    with pytest.raises(InputError, match=r"micro-batch 1 has the non-finite loss nan"):
        calibrated(model, regions, loss_fn=second_is_nan, accumulate=accumulate)
    # A finite loss whose gradient is not, in one micro-batch and one layer.
    calls.clear()

    def poison(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            output.register_hook(lambda gradient: gradient * float("inf"))

    model.layers[0].self_attn.register_forward_hook(poison)
    with pytest.raises(InputError, match=r"non-finite gradient of layers\.0\.self_attn\.\w_proj\.weight"):
        calibrated(model, regions, accumulate=accumulate)


def test_codes_without_a_gradient_are_named():
    model = make_mixed()
    model.layers[1].experts.up_proj = nn.Parameter(torch.zeros(3, 14, 20, dtype=torch.int8), requires_grad=False)
    regions = (sz.RegionConfig(kind="row", modules=("layers.1.experts.up_proj",), per_matrix=1, score="sums"),)
    with pytest.raises(InputError, match=r"experts\.up_proj\[0\] holds torch\.int8 codes"):
        calibrated(model, regions)


def test_a_model_without_a_loss_is_named():
    class Output:
        loss = None

    with pytest.raises(InputError, match="returned no loss"):
        default_loss(lambda **batch: Output(), {"input_ids": torch.zeros(1, 2)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda regions: torch.zeros(3), r"squares.*shape \(3,\)|shape \(3,\)"),
        (lambda regions: torch.full(regions.grid, float("nan")), "is NaN"),
        (lambda regions: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
def test_what_is_no_score_is_named(returned, message, accumulate):
    def wrong(regions: Candidates, *, gradient: Tensor) -> Tensor:
        result: Tensor = returned(regions)
        return result

    RULES["wrong"] = rule(wrong)
    try:
        with pytest.raises(InputError, match=message):
            calibrated(make_model(), families("wrong"), accumulate=accumulate)
    finally:
        del RULES["wrong"]
