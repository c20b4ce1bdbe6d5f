"""Does a base in 4 or 8 bits train as its dense form would, stay as it is, and merge into a plain model?"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers
from sparse_zero.layers.quantized import dense_parameter, quantization_of
from sparse_zero.layers.quantized_linear import QuantizedLinear, adopt
from sparse_zero.layers.sparse_linear import SparseLinear
from tests.models.tiny import write_tiny_llama
from tests.sparse_zero.helpers import TinyModel, mixed_selection, owner_matrix, plain_entries, tiny_loss
from tests.sparse_zero.quantizing import FORMS, dequantized, numbers_of, quantize, quantize_linear, stored_bytes

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def make_linear(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> nn.Linear:
    out_features, in_features = shape
    torch.manual_seed(out_features)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def make_model(form: str, hidden: int = 20) -> TinyModel:
    torch.manual_seed(7)
    model = TinyModel(hidden=hidden)
    quantize(model, form)
    return model


def batches(number: int) -> Tensor:
    return torch.randint(0, 32, (number, 6, 9), generator=torch.Generator().manual_seed(3))


# -- the dense form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (64, 96), (16, 40), (33, 31), (7, 13), (1, 2)])
def test_the_dense_form_is_that_of_the_formulas(form, dtype, shape):
    quantized = quantize_linear(make_linear(shape, bias=False, dtype=dtype), form)
    expected = numbers_of(quantized, dtype)
    model = nn.Module()
    model.norm, model.proj = nn.LayerNorm(4, dtype=dtype), quantized
    assert torch.equal(dense_parameter(model, "proj.weight"), expected)
    if form == "int8":  # A forward moves the scales elsewhere.
        quantized.train()(torch.ones(1, shape[1], dtype=dtype))
        assert quantized.weight.SCB is None
    adopt(model)
    assert isinstance(model.proj, QuantizedLinear)
    assert type(model.proj.weight) is nn.Parameter
    found = dense_parameter(model, "proj.weight")
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    # The bits of it are few, and yet it is that weight.
    before = make_linear(shape, bias=False, dtype=dtype).weight.detach()
    assert float((expected - before).abs().max()) < 0.2 * float(before.abs().max())


# -- gradients


def some_regions(shape: tuple[int, int], kinds: str) -> sz.WeightSelection:
    grid = (-(-shape[0] // 6), -(-shape[1] // 6))
    return sz.WeightSelection(
        shape=shape,
        block_size=6,
        blocks=[[0, 0], [grid[0] - 1, grid[1] - 1]] if "b" in kinds else [],
        rows=[1, shape[0] - 1] if "r" in kinds else [],
        columns=[0, shape[1] - 2] if "c" in kinds else [],
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "kinds", "bias", "dtype", "values_dtype"),
    [
        ((24, 18), "b", True, torch.float32, None),
        ((20, 13), "r", False, torch.float32, None),
        ((13, 20), "c", True, torch.float32, None),
        ((33, 31), "brc", True, torch.float32, torch.float32),
        ((33, 32), "brc", True, torch.bfloat16, None),
        ((33, 32), "brc", False, torch.bfloat16, torch.float32),
        ((33, 32), "brc", True, torch.float32, torch.bfloat16),
    ],
)
def test_gradients_equal_the_masked_ones_of_the_dense_form(form, shape, kinds, bias, dtype, values_dtype):
    model = nn.Module()
    model.proj = quantize_linear(make_linear(shape, bias=bias, dtype=dtype), form)
    model.norm = nn.LayerNorm(shape[1], dtype=dtype)
    weight = numbers_of(model.proj, dtype).float()
    dense_bias = model.proj.bias.detach().float() if bias else None
    regions = some_regions(shape, kinds)
    sz.sparsify(model, sz.Selection({"proj.weight": regions}), "delta", values_dtype=values_dtype)
    torch.manual_seed(1)
    layer: Any = model.proj
    delta = torch.zeros(shape)
    for kind, values in layer.values().items():
        assert values.dtype == (values_dtype or dtype)
        assert torch.equal(layer.originals[kind], plain_entries(weight, regions)[kind].to(dtype))
        values.data = torch.randn(values.shape).mul(0.1).to(values.dtype)
        delta.view(-1)[regions.flat_indices(kind)] = values.detach().to(dtype).float()
    x = torch.randn(3, 5, shape[1]).to(dtype)
    dy = torch.randn(3, 5, shape[0]).to(dtype)

    exact = x.float().requires_grad_()
    combined = (weight + delta).requires_grad_()
    expected = nn.functional.linear(exact, combined, dense_bias)
    expected.backward(dy.float())

    x.requires_grad_()
    y = model.proj(x)
    y.backward(dy)
    close = partial(torch.testing.assert_close, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    close(y.float(), expected)
    close(x.grad.float(), exact.grad)
    tolerance = TOLERANCE[torch.bfloat16 if torch.bfloat16 in (dtype, values_dtype) else dtype]
    assert combined.grad is not None
    for kind, entries in plain_entries(combined.grad, regions).items():
        found = layer.values()[kind].grad.float()
        torch.testing.assert_close(found, entries, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", ["nf4-double", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_the_dense_reference_and_changes_no_code(form, checkpointing):
    from scripts.dense_reference import adamw_on_entries

    model = make_model(form)
    reference = copy.deepcopy(model)
    dequantized(reference)
    masks = {name: owner_matrix(weight) > 0 for name, weight in mixed_selection(reference).weights.items()}
    expected, weights = adamw_on_entries(
        reference, masks, tiny_loss, batches(6), "delta", learning_rate=3e-2, decay=0.1
    )
    selection = mixed_selection(copy.deepcopy(reference))
    sz.sparsify(model, selection, "delta")
    model.checkpointing = checkpointing
    before = {name: stored for name, stored in stored_bytes(model).items() if "values" not in name}
    optimizer = torch.optim.AdamW(sz.parameter_groups(model), lr=3e-2, weight_decay=0.1)
    for step, tokens in enumerate(batches(6)):
        optimizer.zero_grad()
        loss = tiny_loss(model, tokens)
        loss.backward()
        optimizer.step()
        sz.write_back(model)
        assert abs(loss.item() - expected[step]) <= 1e-5 * expected[step]
    assert abs(expected[-1] - expected[0]) > 1e-2
    assert {name: stored for name, stored in stored_bytes(model).items() if "values" not in name} == before
    # Evaluation is the same function, and leaves the codes alone as well.
    model.eval()
    with torch.no_grad():
        evaluated = model(batches(1)[0])
    model.train()
    assert torch.equal(evaluated, model(batches(1)[0]))
    assert {name: stored for name, stored in stored_bytes(model).items() if "values" not in name} == before
    sz.merge(model)
    for name in masks:
        torch.testing.assert_close(model.get_parameter(name).data, weights[name], atol=2e-5, rtol=0)
    torch.testing.assert_close(model(batches(1)[0]), evaluated, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_no_dense_weight_is_kept_for_backward(form):
    model = make_model(form, hidden=96)
    sz.sparsify(model, sz.Selection({"layers.1.self_attn.q_proj.weight": some_regions((96, 96), "b")}), "delta")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = tiny_loss(model, batches(1)[0][:1])
    shapes = {tuple(tensor.shape) for tensor in kept if tensor.is_floating_point()}
    assert not shapes & {(96, 96), (48, 96), (96, 48)}
    codes = {id(module.weight) for module in model.modules() if isinstance(module, QuantizedLinear | SparseLinear)}
    assert {tensor.dtype for tensor in kept if not tensor.is_floating_point()} <= {torch.uint8, torch.int8, torch.int64}
    # The parameters themselves, and nothing else that holds codes.
    assert {id(tensor) for tensor in kept if tensor.dtype in (torch.uint8, torch.int8)} <= codes
    loss.backward()
    assert all(values.grad.abs().sum() > 0 for values in sz.trainable_parameters(model).values())


def test_a_bias_of_a_quantized_linear_is_trained_on_the_hook_path():
    model = make_model("nf4")
    reference = copy.deepcopy(model)
    dequantized(reference)
    bias, other = "layers.1.self_attn.q_proj.bias", "layers.2.self_attn.q_proj.bias"
    whole = sz.WeightSelection(shape=(20, 1), whole=True)
    rows = sz.WeightSelection(shape=(20, 20), rows=[2])
    selection = sz.Selection({bias: whole, other: whole, "layers.1.self_attn.q_proj.weight": rows})
    sz.sparsify(model, selection, "delta")
    tiny_loss(model, batches(1)[0]).backward()
    tiny_loss(reference, batches(1)[0]).backward()
    values = sz.trainable_parameters(model)
    for name, parameter in values.items():
        if name.endswith("whole"):
            expected = reference.get_parameter(name.replace("sparse_bias.values_whole", "bias")).grad
            torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)
        with torch.no_grad():
            parameter.add_(0.5)
    assert len(values) == 3
    trained = model(batches(1)[0])
    before = reference.get_parameter(bias).detach().clone()
    undo = sz.merge(model)
    torch.testing.assert_close(model(batches(1)[0]), trained, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model.get_parameter(bias).data, before + 0.5)
    sz.unmerge(model, undo)
    assert torch.equal(model.get_parameter(bias), before)


def test_a_copy_trains_on_its_own():
    model = make_model("nf4-double")
    sz.sparsify(model, mixed_selection(TinyModel()), "delta")
    copied = copy.deepcopy(model)
    kept = stored_bytes(copied)
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(1.0)
        quantization_of(model, "layers.1.self_attn.q_proj.weight").constants()[0].zero_()
    assert stored_bytes(copied) == kept
    assert not torch.equal(copied(batches(1)[0]), model(batches(1)[0]))


# -- what is refused


def inplace(model: nn.Module) -> None:
    sz.sparsify(model, mixed_selection(TinyModel()), "inplace")


def delta(model: nn.Module) -> None:
    sz.sparsify(model, mixed_selection(TinyModel()), "delta")


def unquantized_yet(model: Any) -> None:
    import bitsandbytes

    model.layers[0].self_attn.v_proj = bitsandbytes.nn.Linear4bit(20, 10, bias=False)
    delta(model)


def in_floats(model: Any) -> None:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(20, 10, bias=False, quant_storage=torch.bfloat16)
    model.layers[0].self_attn.v_proj = made.to("cpu")
    delta(model)


def in_fp16(model: Any) -> None:
    import bitsandbytes

    model.layers[0].self_attn.v_proj = bitsandbytes.nn.Linear8bitLt(20, 10, bias=False)
    delta(model)


def with_a_forward(model: Any) -> None:
    layer = model.layers[0].self_attn.v_proj
    layer.forward = lambda x: x
    delta(model)


def repacked(model: Any) -> None:
    model.layers[0].self_attn.v_proj.weight.quant_state.packing_format_for_cpu = True
    delta(model)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (inplace, r"layers\.1\..* is quantized, and placement 'inplace' writes into it: use placement 'delta'"),
        (unquantized_yet, r"layers\.0\.self_attn\.v_proj is to be quantized and has not been yet"),
        (in_floats, r"v_proj stores its codes as torch\.bfloat16.*quant_storage=torch\.uint8"),
        (in_fp16, r"v_proj keeps its weight in torch\.float32.*has_fp16_weights=False"),
        (with_a_forward, r"v_proj has a forward that something else has put there"),
        (repacked, r"v_proj was repacked by bitsandbytes.*load the base again"),
        (
            lambda model: sz.sparsify(model, mixed_selection(TinyModel()), "delta", values_dtype=torch.int8),
            r"values_dtype is torch\.int8",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name_and_nothing_changes(attempt, message):
    model = make_model("nf4")
    with pytest.raises(InputError, match=message):
        attempt(model)
    assert not any(True for _ in carriers(model))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "embed" in name)


# -- merge, adapters


def load(folder: Path, form: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    if form != "int8":
        double = form == "nf4-double"
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=double
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    ).train()


def llama_selection(model: nn.Module) -> sz.Selection:
    regions = (
        sz.RegionConfig(kind="block", modules=("*.self_attn.*",), block_size=24),
        sz.RegionConfig(kind="row", modules=("*.mlp.up_proj",)),
        sz.RegionConfig(kind="column", modules=("*.mlp.down_proj",)),
    )
    config = sz.SelectionConfig(regions=regions, score="random", budget=sz.BudgetConfig(fraction=0.05))
    return sz.select(model, None, config)


def train_a_little(model: Any) -> None:
    optimizer = torch.optim.AdamW(sz.trainable_parameters(model).values(), lr=1e-2)
    tokens = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("form", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_6_merge_gives_a_plain_model_and_unmerge_the_quantized_one(form, dtype, tmp_path):
    folder = write_tiny_llama(tmp_path / "base", layers=2, tie=form == "nf4")
    plain = type(load(folder, form, dtype)).from_pretrained(folder, dtype=dtype)
    model = load(folder, form, dtype)
    dense = copy.deepcopy(model)
    dequantized(dense)
    settings = model.config.to_dict()
    assert "quantization_config" in settings
    selection = llama_selection(model)
    sz.sparsify(model, selection, "delta")
    quantized = {name: data for name, data in stored_bytes(model).items() if "values" not in name}
    train_a_little(model)
    masters = {name: values.detach().clone() for name, values in sz.trainable_parameters(model).items()}
    tokens = torch.arange(4, 24).unsqueeze(0)
    model.eval()
    with torch.no_grad():
        trained = model(tokens, use_cache=False).logits
    undo = sz.merge(model)

    # The same keys and classes as a model that was never quantized, and nothing that says so.
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert all(tensor.dtype == dtype for tensor in model.state_dict().values())
    assert "quantization_config" not in model.config.to_dict()
    with torch.no_grad():
        merged = model(tokens, use_cache=False).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, trained, atol=tolerance, rtol=tolerance)
    # Dense form + values in fp32, rounded once; elsewhere the dense form.
    for name, parameter in dense.named_parameters():
        expected = parameter.detach().float()
        for kind in selection.weights[name].kinds() if name in selection.weights else ():
            at = selection.weights[name].flat_indices(kind)
            expected.view(-1)[at] += masters[name.replace("weight", f"values_{kind}")].float()
        assert torch.equal(model.get_parameter(name), expected.to(dtype)), name
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.to(dtype)  # It may be cast again.

    sz.unmerge(model, undo)
    assert model.config.to_dict()["quantization_config"] == settings["quantization_config"]
    after = stored_bytes(model)
    assert quantized
    assert all(after[name] == data for name, data in quantized.items())
    with pytest.raises(ValueError, match="cast"):
        model.to(torch.bfloat16)


def test_adapters_belong_to_the_dense_form_of_their_base(tmp_path):
    folder = write_tiny_llama(tmp_path / "base", layers=2)
    model = load(folder, "nf4", torch.float32)
    sz.sparsify(model, llama_selection(model), "delta")
    train_a_little(model)
    tokens = torch.arange(4, 24).unsqueeze(0)
    with torch.no_grad():
        trained = model(tokens, use_cache=False).logits
    sz.save_adapter(model, tmp_path / "adapter")

    again = load(folder, "nf4", torch.float32)
    with pytest.raises(InputError, match="is quantized, and placement 'inplace' writes into it"):
        sz.load_adapter(again, tmp_path / "adapter")
    assert not any(True for _ in carriers(again))
    sz.load_adapter(again, tmp_path / "adapter", placement="delta")
    with torch.no_grad():
        assert torch.equal(again(tokens, use_cache=False).logits, trained)
    before = stored_bytes(again)
    sz.set_adapter(again, None)
    assert not any(True for _ in carriers(again))
    sz.set_adapter(again, "default")
    assert stored_bytes(again) == before
    # Another quantization is another base, and so is the dense one; the dense form itself is the same.
    for other in (load(folder, "int8", torch.float32), type(model).from_pretrained(folder)):
        with pytest.raises(InputError, match="was trained on another base"):
            sz.load_adapter(other, tmp_path / "adapter", placement="delta")
    dense = load(folder, "nf4", torch.float32)
    dequantized(dense)
    sz.load_adapter(dense, tmp_path / "adapter", placement="inplace")
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens, use_cache=False).logits, trained, atol=1e-5, rtol=1e-5)


# -- selection


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("score", ["squared", "gradient_times_weight", "magnitude", "wanda", "mean_of_abs"])
@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
def test_scores_are_those_of_the_dense_form(form, score, accumulate):
    model = make_model(form).eval()
    kinds = {id(module): type(module) for module in model.modules()}
    reference = copy.deepcopy(model)
    dequantized(reference)
    regions = (
        sz.RegionConfig(kind="block", modules=("*.q_proj",), block_size=6, per_matrix=1),
        sz.RegionConfig(kind="row", modules=("*.k_proj",), per_matrix=1),
    )
    config = sz.SelectionConfig(regions=regions, score=score, accumulate=accumulate)
    found = sz.score_regions(model, list(batches(3)), config, tiny_loss)
    expected = sz.score_regions(reference, list(batches(3)), config, tiny_loss)
    assert found.scores.keys() == expected.scores.keys()
    for key, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[key], scores, rtol=1e-4, atol=1e-9)
    # Afterwards it is the model that it was.
    assert {id(module): type(module) for module in model.modules()} == kinds
    assert not getattr(
        getattr(model.layers[0].self_attn.q_proj.weight, "quant_state", None), "packing_format_for_cpu", False
    )


def test_what_a_model_says_of_its_quantization():
    model = make_model("nf4-double")
    found = quantization_of(model, "layers.0.self_attn.q_proj.weight")
    assert found is not None
    assert (found.shape, found.dtype, found.compute_dtype) == ((20, 20), torch.float32, torch.float32)
    assert quantization_of(model, "layers.0.self_attn.q_proj.bias") is None
    assert quantization_of(model, "lm_head.weight") is None
    (matrix,) = (m for m in sz.default_module_map(model).matrices if m.name == "layers.1.self_attn.k_proj")
    assert (matrix.shape, matrix.is_quantized, matrix.is_linear, matrix.is_product) == ((10, 20), True, True, True)
    adopt(model)
    assert matrix in sz.default_module_map(model).matrices
