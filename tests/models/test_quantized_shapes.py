"""Does a model without weights store as many bytes as the same model, quantized for real?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.loading import ModelConfig, load_model
from models.quantization import adopt_quantized
from models.quantized_shapes import quantize_shapes
from models.skeleton import load_shapes
from sparse_zero.memory.simulation.quantized_bases import constants_of
from tests.models.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Widths that no group of constants divides.
    options: dict[str, Any] = {"layers": 2, "hidden": 72, "intermediate": 184, "attention_bias": True}
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", **options)


def stored(model: nn.Module) -> tuple[dict[str, Any], list[Any]]:
    """Shapes and dtypes of parameters by name, and of everything beside codes."""
    parameters = {name: (tuple(each.shape), each.dtype) for name, each in model.named_parameters()}
    return parameters, [(tuple(each.shape), each.dtype) for each in constants_of(model)]


@pytest.mark.parametrize(("quantization", "double"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_shapes_store_what_a_quantized_base_stores(folder: Path, quantization: Any, double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
    config = ModelConfig(
        name_or_path=str(folder), dtype="bfloat16", quantization=quantization, double_quantization=double
    )
    tables = dict(bitsandbytes.functional.name2qmap)
    shapes = load_shapes(config)
    quantize_shapes(shapes, quantization, double, torch.bfloat16)
    assert tables.keys() == bitsandbytes.functional.name2qmap.keys()
    assert all(each.is_meta for each in [*shapes.parameters(), *constants_of(shapes)])
    theirs = stored(shapes)
    adopt_quantized(shapes)
    real = load_model(config)
    assert (
        len(constants_of(real)) == 14 * {("nf4", False): 2, ("nf4", True): 5, ("int8", False): 1}[quantization, double]
    )
    assert stored(shapes) == stored(real) == theirs
