"""Is a model without its weights the one with them, but for the weights?"""

from pathlib import Path

import pytest

from models.loading import ModelConfig, load_model
from models.skeleton import load_skeleton
from sparse_zero.errors import InputError
from sparse_zero.module_map import default_module_map
from tests.models.tiny import write_tiny_llama


@pytest.mark.parametrize("tie", [False, True])
def test_names_shapes_dtypes_and_ties_are_those_of_the_model(tie: bool, tmp_path: Path) -> None:
    config = ModelConfig(
        name_or_path=str(write_tiny_llama(tmp_path / "m", tie=tie, attention_bias=True)), dtype="bfloat16"
    )
    skeleton, model = load_skeleton(config), load_model(config)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    found = {name: (parameter.shape, parameter.dtype) for name, parameter in skeleton.named_parameters()}
    assert found == {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    assert default_module_map(skeleton) == default_module_map(model)
    assert skeleton.training == model.training


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        load_skeleton(ModelConfig(name_or_path=str(tmp_path)))
