"""Does a shape say of each family what its model is: names, sizes, parameters, and which linears read the same?"""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.decoder_shapes import CHECKED_FAMILIES, ShapeWarning, decoder_shape
from models.loading import ModelConfig
from models.skeleton import load_shapes
from sparse_zero.errors import InputError
from sparse_zero.module_map import default_module_map
from tests.models.decoders import FAMILIES, decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_counts_the_parameters_of_its_model(family: str) -> None:
    model = decoder(family)
    shape = decoder_shape(model)
    assert shape.is_checked
    assert shape.num_parameters == sum(each.numel() for each in model.parameters())
    assert shape.tied == (family == "bloom")
    layer = model.get_submodule(f"{shape.layers_name}.{shape.num_layers - 1}")
    assert shape.layer_parameters == sum(each.numel() for each in layer.parameters())
    for linear in shape.linears:
        module = layer.get_submodule(linear.name)
        assert (linear.out_features, linear.in_features) == tuple(module.weight.shape)
        assert linear.has_bias == (module.bias is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_one_tensor_are_those_of_the_module_map(family: str) -> None:
    model = decoder(family)
    shape, groups = decoder_shape(model), default_module_map(model).shared_inputs
    prefix = f"{shape.layers_name}.0."
    found = {
        tuple(prefix + linear.name for linear in shape.reading(reads))
        for reads in ("attention_input", "attention_output", "mlp_input", "mlp_output")
    }
    assert {group for group in groups if group[0].startswith(prefix)} == {each for each in found if len(each) > 1}
    assert {each.reads for each in shape.linears} >= {"attention_input", "attention_output"}


def test_what_sets_families_apart() -> None:
    shapes = {family: decoder_shape(decoder(family)) for family in FAMILIES}
    assert set(FAMILIES) == CHECKED_FAMILIES
    assert {family for family, shape in shapes.items() if shape.has_qk_norm} == {"qwen3", "qwen3_moe"}
    assert {family for family, shape in shapes.items() if not shape.has_sdpa} == {"bloom"}
    assert {family for family, shape in shapes.items() if shape.num_experts} == {"mixtral", "qwen3_moe"}
    assert {family for family, shape in shapes.items() if shape.window} == {"mistral"}
    assert {family for family, shape in shapes.items() if shape.norm == "layer"} == {"bloom"}
    # Of each expert, not of a dense MLP that the config describes as well.
    assert (shapes["qwen3_moe"].intermediate_size, shapes["qwen3_moe"].experts_per_token) == (48, 2)
    assert shapes["llama"].intermediate_size == 344


def test_a_family_nobody_has_checked_says_so() -> None:
    model = decoder("stablelm")
    with pytest.warns(ShapeWarning, match="stablelm"):
        shape = decoder_shape(model)
    assert not shape.is_checked
    assert shape.num_parameters == sum(each.numel() for each in model.parameters())


def test_layers_that_differ_have_no_closed_form() -> None:
    model = decoder("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(InputError, match="differ in shape"):
        decoder_shape(model)


@pytest.mark.parametrize(("family", "attention"), [("bloom", "eager"), ("llama", "sdpa")])
def test_shapes_are_loaded_with_the_attention_that_the_family_has(family: str, attention: str, tmp_path: Path) -> None:
    decoder(family).config.save_pretrained(tmp_path)
    model: Any = load_shapes(ModelConfig(name_or_path=str(tmp_path), dtype="bfloat16"))
    assert model.config._attn_implementation == attention
    assert model.dtype == torch.bfloat16
