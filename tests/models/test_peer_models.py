"""Do the models that ours is compared with train what people train with PEFT?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.peer_models import make_peer
from sparse_zero.errors import InputError
from tests.models.tiny import tiny_llama


def skeleton() -> Any:
    with torch.device("meta"):
        return tiny_llama(layers=2).bfloat16()


def test_all_of_a_model_is_trained() -> None:
    model = make_peer(skeleton().requires_grad_(False), "full", rank=4, targets=())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("method", "per_layer"), [("lora", 4 * (64 + 64) + 4 * (64 + 32)), ("dora", 896 + 64 + 32)])
def test_adapters_are_those_of_peft(method: Any, per_layer: int) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (extra: peft)")
    dense = dict(skeleton().named_parameters())
    model = make_peer(skeleton(), method, rank=4, targets=("q_proj", "v_proj"))
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert sum(each.numel() for each in trained.values()) == 2 * per_layer
    assert {each.dtype for each in trained.values()} == {torch.float32}
    frozen = {name.replace(".base_layer", "") for name in dict(model.named_parameters()) if name not in trained}
    assert frozen == dense.keys()


def test_a_target_that_is_not_there_is_refused() -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (extra: peft)")
    with pytest.raises(InputError, match=r"lora_targets has 'query', .* its linears are down_proj, .*, v_proj"):
        make_peer(skeleton(), "lora", rank=4, targets=("q_proj", "query"))
