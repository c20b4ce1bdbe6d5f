"""Does a base load in 4 and 8 bits as its files say, and is what cannot be loaded so refused before it is tried?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from models.families import module_map
from models.loading import ModelConfig, load_model, validate_model_source
from models.quantization import adopt_quantized
from sparse_zero.errors import InputError
from sparse_zero.layers.quantized import FourBit, dense_parameter, quantization_of
from sparse_zero.layers.quantized_linear import QuantizedLinear
from sparse_zero.selection.select import num_parameters
from tests.models.tiny import write_tiny_llama

TOKENS = torch.arange(4, 40).view(2, 18)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2, attention_bias=True)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"quantization": "nf4"}, 4.5),
        ({"quantization": "nf4", "double_quantization": True}, 4.2),
        ({"quantization": "nf4", "dtype": "bfloat16"}, 4.5),
        ({"quantization": "int8", "dtype": "bfloat16"}, 8.6),
    ],
)
def test_a_quantized_base_is_that_of_its_files(folder: Path, options: dict[str, Any], bits: float) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
    dense = load_model(ModelConfig(name_or_path=str(folder), dtype=options.get("dtype", "float32")))
    model: Any = load_model(ModelConfig(name_or_path=str(folder), **options))
    assert not model.training
    weights = dict(dense.named_parameters())
    found = module_map(model)
    assert found.by_parameter().keys() == module_map(dense).by_parameter().keys()
    assert num_parameters(model) == num_parameters(dense)
    for matrix in found.matrices:
        name = matrix.parameter
        assert matrix.is_quantized == ("layers" in name)
        assert isinstance(model.get_submodule(matrix.module), QuantizedLinear) == ("layers" in name)
        numbers, exact = dense_parameter(model, name), weights[name].detach()
        assert numbers.dtype == exact.dtype
        error = float((numbers - exact).float().norm() / exact.float().norm())
        assert error < (0.01 if options["quantization"] == "int8" else 0.12) if matrix.is_quantized else error == 0
        if matrix.is_quantized:
            quantization = quantization_of(model, name)
            assert quantization is not None
            constants = [getattr(quantization, "scales", None)]
            if isinstance(quantization, FourBit):
                state = quantization.state
                assert state.quant_type == "nf4"
                assert state.nested == options.get("double_quantization", False)
                constants = [state.absmax, state.state2.absmax if state.nested else None]
            stored = [model.get_parameter(name).data, *(each for each in constants if each is not None)]
            assert 8 * sum(each.nbytes for each in stored) / exact.numel() <= bits
            assert quantization.compute_dtype == exact.dtype
    for vector in found.vectors:
        assert torch.equal(model.get_parameter(vector), weights[vector])
    with torch.no_grad():
        difference = (model(TOKENS).logits - dense(TOKENS).logits).float()
    assert 0 < float(difference.norm() / dense(TOKENS).logits.detach().float().norm()) < 0.15


def test_linears_that_are_stored_transposed_are_trained_and_merged(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: Any = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 384}
    torch.manual_seed(0)
    exact = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    exact.save_pretrained(tmp_path)
    model: Any = load_model(ModelConfig(name_or_path=str(tmp_path), quantization="nf4"))
    name = "transformer.h.1.attn.c_attn"
    assert model.get_submodule(name).quantization.shape == (96, 32)
    rows = sz.WeightSelection(shape=(96, 32), rows=[3, 50])
    sz.sparsify(model, sz.Selection({f"{name}.weight": rows}), "delta", module_map=module_map(model))
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(0.5)
        trained = model(TOKENS).logits
        sz.merge(model)
        torch.testing.assert_close(model(TOKENS).logits, trained, atol=1e-5, rtol=1e-5)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in exact.named_modules()}
    assert model.state_dict().keys() == exact.state_dict().keys()
    # The rows of W[out, in] are columns of what is stored.
    difference = (model.get_parameter(f"{name}.weight") - exact.get_parameter(f"{name}.weight")).abs().mean(0)
    assert difference[[3, 50]].min() > 0.4
    assert difference.sort().values[-3] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp8"}, "model.quantization is 'fp8': use one of none, nf4, int8"),
        ({"quantization": "int8", "double_quantization": True}, "model.double_quantization is true.*'int8'.*use nf4"),
        ({"double_quantization": True}, "model.double_quantization is true with model.quantization 'none'"),
        ({"quantization": "nf4", "gguf_file": "a.gguf"}, "model.quantization is 'nf4' with model.gguf_file 'a.gguf'"),
    ],
)
def test_settings_that_disagree_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(name_or_path="somewhere", **options)


def test_the_missing_package_is_named_with_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"'bitsandbytes' is needed to load the base in nf4.*sparse-zero\[quant\]"):
        validate_model_source(ModelConfig(name_or_path=str(folder), quantization="nf4"))
    validate_model_source(ModelConfig(name_or_path=str(folder)))


def test_a_model_without_linears_to_quantize_is_refused() -> None:
    with pytest.raises(InputError, match="found no linear to quantize"):
        adopt_quantized(torch.nn.Linear(2, 2))
