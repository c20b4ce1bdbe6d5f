"""Is a run refused that cannot have the frozen-prefix cache that it asks for, before anything is written?"""

from pathlib import Path
from typing import Any

import pytest

from launcher.config import RunConfig, parse_config
from launcher.prefix_check import check_prefix_cache
from sparse_zero.errors import InputError
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES


def make(place: Path, batching: str = "pad", **cache: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": "model"},
            "data": {"train": "train.json", "batching": batching},
            "selection": {"regions": [{"kind": "row", "modules": ["*.q_proj"], "per_matrix": 1}]},
            "training": {"steps": 2, "prefix_cache": cache},
            "zero": {},
            "output": {"folder": str(place / "run")},
        }
    )


def dropping_llama() -> Any:
    model = tiny_llama()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    return model


# No disk has room for so many tokens.
MANY = (10**15,)


@pytest.mark.parametrize(
    ("make_model", "lengths", "settings", "says"),
    [
        (tiny_llama, MANY, {}, ("1,000,000,000,000,000 tokens of 256 bytes", "max_gib", "float8")),
        (tiny_llama, MANY, {"dtype": "float8"}, ("tokens of 68 bytes",)),
        (dropping_llama, (3,), {}, ("model.layers.0.self_attn.attention_dropout = 0.1", "set it to 0")),
        (FAMILIES["mamba"].make, (3,), {}, ("mamba models", "leave training.prefix_cache out")),
        (tiny_llama, (3,), {"folder": __file__}, ("training.prefix_cache.folder is", "is a file")),
    ],
)
def test_what_cannot_be_is_refused(make_model, lengths, settings, says, tmp_path):
    with pytest.raises(InputError) as error:
        check_prefix_cache(make(tmp_path, **settings), make_model(), lengths)
    assert all(each in str(error.value) for each in says), str(error.value)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_what_can_be_is_not(tmp_path):
    check_prefix_cache(make(tmp_path), tiny_llama(), (3, 4))
    check_prefix_cache(make(tmp_path, max_gib=0.001), tiny_llama(), (3, *MANY))
    check_prefix_cache(make(tmp_path), FAMILIES["bloom"].make(), (3,))
    assert not any(tmp_path.iterdir())
