"""Do the module maps say what the modules really do, and can every kind of parameter of every family be trained?"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparse_zero as sz
from models.collate import collate
from models.data import IGNORED, TokenizedSample
from models.families import (
    KNOWN_FAMILIES,
    PACKABLE_FAMILIES,
    FamilyWarning,
    check_can_pack,
    check_not_fused,
    module_map,
)
from models.loss import response_nll
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers
from sparse_zero.layers.merge import remove_values
from sparse_zero.layers.sparse_parameter import SparseParameter
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.config import PLACEMENTS
from tests.models.tiny import write_tiny_llama
from tests.models.tiny_families import (
    EXPERTS,
    FAMILIES,
    KINDS,
    TinyFamily,
    dense_training,
    family_loss,
    hand_made_selection,
    make_batches,
)

LEARNING_RATE, DECAY = 2e-2, 0.1
TOKENS = torch.arange(6).unsqueeze(0) + 3

# By the last components of its name, the longest that fits: what a matrix is for.
ROLE_OF_ENDING = {
    "attention": (
        *(
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "qkv_proj",
            "query_key_value",
            "query",
            "key",
            "value",
            "c_attn",
            "Wqkv",
        ),
        *("attn.c_proj", "self_attention.dense", "attention.dense", "attention.output.dense", "attn.out_proj"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj_bias"),
        *("dense_h_to_4h", "dense_4h_to_h", "c_fc", "mlp.c_proj", "intermediate.dense", "output.dense"),
        *("mlp.gate", "router", "router.layer", "shared_expert_gate", "w1", "v1", "w2"),
    ),
    "head": ("lm_head", "classifier", "classifier.dense", "out_proj"),
    "embedding": (
        *("embed_tokens", "embed_in", "wte", "wpe"),
        *("word_embeddings", "position_embeddings", "token_type_embeddings"),
    ),
    "other": ("pooler.dense",),
}


def tiny_model(kind: str, **changes: Any) -> Any:
    """A family of the table, or another type without anything of its own."""
    bare = TinyFamily(model_type=kind, matrices={}, vectors=(), changes={**EXPERTS, "num_experts": 4})
    return FAMILIES.get(kind, bare).make(**changes).eval()


def expected_role(name: str) -> str:
    fitting = [
        (len(ending), role)
        for role, endings in ROLE_OF_ENDING.items()
        for ending in endings
        if f".{name}".endswith(f".{ending}")
    ]
    return max(fitting)[1]


def seen_in_forward(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The very tensor that each linear is given in one forward pass, and what comes out of it."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {}

    def kept(output: Any) -> Any:
        # Some models add to what a linear gave, in place.
        return output.clone() if isinstance(output, Tensor) else output

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
            module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, kept(output)))
    with torch.no_grad():
        model(input_ids=TOKENS)
    return inputs, outputs


@pytest.mark.parametrize("kind", sorted(KNOWN_FAMILIES))
def test_map_of_known_families_says_what_forward_does(kind: str) -> None:
    model = tiny_model(kind)
    found = module_map(model)
    inputs, outputs = seen_in_forward(model)
    # Every linear is called a product, unless more comes out of it than the product.
    assert set(found.linears) == {name for name, output in outputs.items() if isinstance(output, Tensor)}
    for matrix in found.matrices:
        if matrix.is_product:
            module = model.get_submodule(matrix.module)
            product = nn.functional.linear(inputs[matrix.name], matrix.view(module.weight, None), module.bias)
            torch.testing.assert_close(outputs[matrix.name], product)
    by_tensor: dict[int, set[str]] = defaultdict(set)
    for name in found.linears:
        by_tensor[id(inputs[name])].add(name)
    assert {frozenset(group) for group in found.shared_inputs} == {
        frozenset(group) for group in by_tensor.values() if len(group) > 1
    }
    assert found.num_layers == 2
    for name, role in found.role_of.items():
        assert role == expected_role(name), name
        inside = [number for number in (0, 1) if f".{number}." in name]
        assert found.layer_of.get(name) == (inside[0] if inside else None), name
    # Nothing is left out or counted twice.
    everything = [matrix.parameter for matrix in found.matrices] + list(found.vectors)
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_map_knows_how_each_family_stores_its_matrices(name: str) -> None:
    family = FAMILIES[name]
    found = module_map(family.make()).by_parameter()
    for parameter, shape in {**family.matrices, **family.experts}.items():
        matrix = found[parameter]
        assert matrix.shape == shape, parameter
        assert matrix.layout == ("in_out" if parameter in family.transposed else "out_in"), parameter
        assert matrix.num_slices == (4 if parameter in family.experts else None), parameter
        assert not matrix.is_quantized


def test_unknown_family_keeps_its_inputs_apart_and_says_so() -> None:
    model = tiny_model("llama")
    model.config.model_type = "llama_of_tomorrow"
    with pytest.warns(FamilyWarning, match=r"llama_of_tomorrow.* cannot be packed either \(data\.batching pack\)"):
        found = module_map(model)
    assert found.shared_inputs == ()
    assert "model.layers.1.self_attn.q_proj" in found.linears


def test_model_without_matrices_is_refused() -> None:
    with pytest.raises(InputError, match="LayerNorm model without a matrix"):
        module_map(nn.LayerNorm(4))


def test_part_of_a_fused_projection_is_refused_by_name() -> None:
    model = tiny_model("phi3")
    found = module_map(model)
    assert "model.layers.0.self_attn.qkv_proj" in found.linears
    with pytest.raises(InputError, match=r"'\*\.self_attn\.k_proj' .* ask for all of it, \*\.self_attn\.qkv_proj"):
        check_not_fused(model, ("*.o_proj", "*.self_attn.{k,v}_proj"))
    with pytest.raises(InputError, match=r"ask for all of it, \*\.gate_up_proj"):
        check_not_fused(model, ("*.up_proj",))
    check_not_fused(model, ("*.qkv_proj", "*.gate_up_proj", "*.nothing_of_the_kind"))
    check_not_fused(tiny_model("llama"), ("*.{q,k,v}_proj",))


@pytest.mark.parametrize(
    ("kind", "pattern", "fused"),
    [
        ("gpt2", "*.q_proj", r"\*\.c_attn"),
        ("bloom", "*.v_proj", r"\*\.query_key_value"),
        ("gpt_neox", "*.attention.q_proj", r"\*\.attention\.query_key_value"),
        ("mixtral", "*.experts.up_proj", r"\*\.experts\.gate_up_proj"),
        ("gpt_oss", "*.gate_proj", r"\*\.gate_up_proj"),
    ],
)
def test_fused_projections_of_each_family_are_refused_by_name(kind: str, pattern: str, fused: str) -> None:
    with pytest.raises(InputError, match=f"ask for all of it, {fused}"):
        check_not_fused(tiny_model(kind), (pattern,))


# -- packed samples


def losses_of(model: Any) -> tuple[float, float]:
    """Summed loss of three samples, padded and packed."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (9, 7, 11)]
    samples = [TokenizedSample(each, [IGNORED] * 3 + each[3:]) for each in ids]
    with torch.no_grad():
        padded, packed = (
            response_nll(model, collate(samples, batching=batching, pad_token_id=0)).item()
            for batching in ("pad", "pack")
        )
    return padded, packed


@pytest.mark.parametrize("kind", sorted(PACKABLE_FAMILIES))
def test_packed_samples_of_the_families_that_are_allowed_do_not_read_one_another(kind: str) -> None:
    model = tiny_model(kind)
    check_can_pack(model)
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        padded, packed = losses_of(model)
        assert packed == pytest.approx(padded, rel=1e-5), attention


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bloom", {}),
        ("gpt_oss", {}),
        # Not known; each passes by the position ids in a way of its own.
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
        ("mamba", {}),
        ("jamba", {"mamba_dt_rank": 2, "use_mamba_kernels": False}),
        ("xglm", {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "layerdrop": 0.0}),
    ],
)
def test_families_whose_packed_samples_read_one_another_are_refused(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(kind, **changes)
    padded, packed = losses_of(model)
    assert packed != pytest.approx(padded, rel=1e-3)
    with pytest.raises(InputError, match=f"data.batching is 'pack', but .* of {kind} models .* data.batching to pad"):
        check_can_pack(model)


def test_a_family_that_nobody_has_tried_is_not_packed() -> None:
    model = tiny_model("llama")
    model.config.model_type = "llama_of_tomorrow"
    with pytest.raises(InputError, match="llama_of_tomorrow"):
        check_can_pack(model)


# -- training: every family, every kind of region, both placements


def train(family: TinyFamily, model: Any, batches: Tensor) -> list[float]:
    """Plain AdamW on the values, with write-back by hand."""
    optimizer = torch.optim.AdamW(sz.trainable_parameters(model).values(), lr=LEARNING_RATE, weight_decay=DECAY)
    losses = []
    for tokens in batches:
        optimizer.zero_grad()
        loss = family_loss(family, model, tokens)
        loss.backward()
        optimizer.step()
        sz.write_back(model)
        losses.append(loss.item())
    return losses


def logits_of(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def training_cases() -> list[Any]:
    """Every family, kind and placement; slow are all but a few for each family: one kind of layer serves them all."""
    cases = []
    for name, kind, placement in itertools.product(sorted(FAMILIES), KINDS, PLACEMENTS):
        quick = name == "llama" or (kind in ("mixed", "whole") and placement == "delta")
        # Matrices of another kind than a plain linear's.
        quick = quick or (kind == "mixed" and name in ("gpt2", "bert", "mixtral"))
        cases.append(pytest.param(name, kind, placement, marks=() if quick else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("name", "kind", "placement"), training_cases())
def test_training_a_selection_equals_dense_adamw_on_its_entries(name, kind, placement, tmp_path):
    family = FAMILIES[name]
    base, model = family.make(), family.make()
    selection = hand_made_selection(family, base, kind)
    expected_losses, expected = dense_training(
        family, selection, placement, make_batches(4), learning_rate=LEARNING_RATE, decay=DECAY
    )
    sz.sparsify(model, selection, placement, module_map=module_map(model))
    # Beside the values, everything is called as in the plain model.
    assert [key for key in model.state_dict() if "values_" not in key] == list(base.state_dict())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == selection.num_parameters
    model.train()
    if kind in ("mixed", "whole"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    losses = train(family, model, make_batches(4))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0.0)
    untrained = [family_loss(family, base.train(), tokens).item() for tokens in make_batches(4)]
    assert max(abs(loss - other) for loss, other in zip(expected_losses, untrained, strict=True)) > 1e-3
    assert not any(p.grad is not None for key, p in model.named_parameters() if "values_" not in key)
    trained = logits_of(model)

    # The adapter: bit for bit in its own placement, rounded once in the other.
    sz.save_adapter(model, tmp_path)
    for placed in PLACEMENTS:
        loaded = copy.deepcopy(base)
        sz.load_adapter(loaded, tmp_path, placement=placed)
        if placed == placement:
            assert torch.equal(logits_of(loaded), trained)
        torch.testing.assert_close(logits_of(loaded), trained, rtol=1e-4, atol=1e-5)
        sz.set_adapter(loaded, None)
        assert equal_states(loaded, base)

    # Merged: a plain model that predicts the same; unmerged: the base.
    undo = sz.merge(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    if placement == "inplace":
        assert torch.equal(logits_of(model), trained)
    torch.testing.assert_close(logits_of(model), trained, rtol=1e-4, atol=1e-5)
    merged, originals = dict(model.named_parameters()), dict(base.named_parameters())
    for key, parameter in expected.items():
        # Adam divides gradients by their size, so the smallest ones carry the rounding of their sums.
        torch.testing.assert_close(merged[key], parameter, rtol=1e-4, atol=5e-5)
        assert torch.equal(merged[key] != originals[key], parameter != originals[key]), key
    sz.unmerge(model, undo)
    assert equal_states(model, base)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_experts_train_alike_in_every_implementation(name, experts):
    family = FAMILIES[name]
    model = family.make(experts_implementation=experts)
    assert model.config._experts_implementation == experts
    selection = hand_made_selection(family, model, "mixed")
    expected, _ = dense_training(
        family, selection, "inplace", make_batches(3), learning_rate=LEARNING_RATE, decay=DECAY
    )
    sz.sparsify(model, selection, module_map=module_map(model))
    torch.testing.assert_close(train(family, model, make_batches(3)), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3_text", "mixtral", "gpt_oss"])
def test_a_sparse_model_generates_what_the_merged_one_does(name, placement):
    family = FAMILIES[name]
    model = family.make(use_cache=True)
    sz.sparsify(model, hand_made_selection(family, model, "mixed"), placement)
    train(family, model, make_batches(2))
    model.eval()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    sparse = model.generate(TOKENS, **settings)
    assert sparse.shape == (1, 14)
    sz.merge(model)
    assert torch.equal(model.generate(TOKENS, **settings), sparse)


@pytest.mark.parametrize(("name", "changes"), [("gpt2", {}), ("mixtral", {"experts_implementation": "eager"})])
def test_a_sparse_model_is_copied_moved_and_cast_as_a_whole(name, changes):
    family = FAMILIES[name]
    model = family.make(**changes)
    sz.sparsify(model, hand_made_selection(family, model, "mixed"))
    twin = copy.deepcopy(model)
    before = train(family, twin, make_batches(2))
    # The copy trained by itself: the original is where it was, and then takes the same way.
    assert equal_states(model.to("cpu", torch.float32), model)
    assert train(family, model, make_batches(2)) == before
    assert equal_states(model, twin)
    hooked = [carrier for _, carrier in carriers(model) if isinstance(carrier, SparseParameter)]
    assert hooked
    wide = copy.deepcopy(model).double()
    assert all(values.dtype == torch.float64 for values in sz.trainable_parameters(wide).values())
    torch.testing.assert_close(logits_of(wide), logits_of(model).double(), rtol=1e-4, atol=1e-5)
    assert train(family, wide, make_batches(1))[0] > 0
    assert all(torch.equal(c.entries(kind), v) for _, c in carriers(wide) for kind, v in c.values().items())


# -- quantized bases


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra quant)")
def test_quantized_linears_are_known_and_trained_under_delta_only(bits, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    folder = write_tiny_llama(tmp_path / "base", layers=2, hidden=64, intermediate=96)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    found = module_map(model).by_parameter()
    shapes = {"self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 96)}
    for name, shape in shapes.items():
        matrix = found[f"model.layers.1.{name}.weight"]
        assert (matrix.shape, matrix.is_quantized, matrix.is_product, matrix.is_linear) == (shape, True, True, True)
    assert not found["model.embed_tokens.weight"].is_quantized

    quantized = {"model.layers.1.self_attn.k_proj.weight": WeightSelection(shape=(32, 64), rows=[3])}
    others = {
        "model.embed_tokens.weight": WeightSelection(shape=(384, 64), rows=[3, 4, 5]),
        "model.layers.1.input_layernorm.weight": WeightSelection(shape=(64, 1), whole=True),
    }
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.k_proj\.weight is quantized, and placement 'inplace'"):
        sz.sparsify(model, sz.Selection({**others, **quantized}))
    assert not any(True for _ in carriers(model))
    # What is not quantized can be trained inplace on such a base, too.
    for selection in (others, {**others, **quantized}):
        sz.sparsify(model, sz.Selection(selection), "inplace" if selection is others else "delta")
        model.train()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(values.grad.abs().sum() > 0 for values in sz.trainable_parameters(model).values())
        remove_values(model)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra quant)")
def test_weights_that_will_be_quantized_are_known_before_they_are():
    import bitsandbytes

    model = nn.Module()
    model.q_proj = bitsandbytes.nn.Linear4bit(16, 24)
    (before,) = sz.default_module_map(model).matrices
    model.to("cpu")
    assert model.q_proj.weight.dtype == torch.uint8
    (after,) = sz.default_module_map(model).matrices
    assert before == after
    assert (after.shape, after.is_quantized) == ((24, 16), True)
