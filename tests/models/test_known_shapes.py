"""Are the built-in shapes those of the published models?"""

from typing import Literal

import pytest

from models.known_shapes import KNOWN_SHAPES, KnownShape, known_shape, nearest_known
from models.loading import ModelConfig
from models.skeleton import load_shapes
from models.source import is_hub_name
from sparse_zero.selection.select import num_parameters


@pytest.mark.parametrize("shape", KNOWN_SHAPES, ids=lambda shape: shape.name)
def test_the_model_has_as_many_parameters_as_the_published_one(
    shape: KnownShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # transformers has no other attention for Bloom.
    attention: Literal["eager", "sdpa"] = "eager" if shape.name.startswith("bloom") else "sdpa"
    model = load_shapes(ModelConfig(name_or_path=shape.name, dtype="bfloat16", attention=attention))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert num_parameters(model) == shape.num_parameters


def test_the_count_that_everybody_knows() -> None:
    found = known_shape("llama-2-7b")
    assert found is not None
    assert found.num_parameters == 6_738_415_616


def test_short_names_and_hub_names_lead_to_the_same_shape() -> None:
    for shape in KNOWN_SHAPES:
        assert known_shape(shape.name) is shape
        for name in shape.hub_names:
            assert is_hub_name(name)
            assert known_shape(name) is shape
            assert known_shape(name.upper()) is shape
    assert len({shape.name for shape in KNOWN_SHAPES}) == len(KNOWN_SHAPES)
    hub_names = [name for shape in KNOWN_SHAPES for name in shape.hub_names]
    assert len(set(hub_names)) == len(hub_names)
    assert [shape.num_parameters for shape in KNOWN_SHAPES] == sorted(shape.num_parameters for shape in KNOWN_SHAPES)


def test_an_unknown_name_is_none_and_has_a_neighbour() -> None:
    assert known_shape("llama-9-7b") is None
    assert nearest_known("llama2-7b") == "llama-2-7b"
    assert nearest_known("zzz") is None
