"""Do the module maps say what the modules really do?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from models.families import LLAMA_LIKE, FamilyWarning, check_not_fused, module_map
from sparse_zero.errors import InputError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}


def small_model(kind: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def inputs_of_linears(model: Any) -> dict[str, torch.Tensor]:
    """The very tensor that each linear is given in one forward pass."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    model(input_ids=torch.arange(6).unsqueeze(0) + 3, use_cache=False)
    return seen


@pytest.mark.parametrize("kind", sorted(LLAMA_LIKE))
def test_map_of_known_families_says_what_forward_does(kind: str) -> None:
    model = small_model(kind)
    found = module_map(model)
    seen = inputs_of_linears(model)
    assert set(found.linears) == set(seen)
    by_tensor: dict[int, set[str]] = {}
    for name, tensor in seen.items():
        by_tensor.setdefault(id(tensor), set()).add(name)
    assert {frozenset(group) for group in found.shared_inputs} == {
        frozenset(group) for group in by_tensor.values() if len(group) > 1
    }
    assert found.num_layers == 2
    for name in found.linears:
        last = name.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert found.role_of[name] == "attention"
        elif last in ("gate_proj", "up_proj", "down_proj"):
            assert found.role_of[name] == "mlp"
        else:
            assert (name, found.role_of[name]) == ("lm_head", "head")
            assert name not in found.layer_of


def test_unknown_family_keeps_its_inputs_apart_and_says_so() -> None:
    model = small_model("llama")
    model.config.model_type = "llama_of_tomorrow"
    with pytest.warns(FamilyWarning, match="llama_of_tomorrow"):
        found = module_map(model)
    assert found.shared_inputs == ()
    assert "model.layers.1.self_attn.q_proj" in found.linears


def test_model_without_linears_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head = nn.Identity()
    with pytest.raises(InputError, match="gpt2 model without"):
        module_map(model)


def test_part_of_a_fused_projection_is_refused_by_name() -> None:
    model = small_model("phi3")
    found = module_map(model)
    assert "model.layers.0.self_attn.qkv_proj" in found.linears
    with pytest.raises(InputError, match=r"'\*\.self_attn\.k_proj' .* ask for all of it, \*\.self_attn\.qkv_proj"):
        check_not_fused(model, ("*.o_proj", "*.self_attn.{k,v}_proj"))
    with pytest.raises(InputError, match=r"ask for all of it, \*\.gate_up_proj"):
        check_not_fused(model, ("*.up_proj",))
    check_not_fused(model, ("*.qkv_proj", "*.gate_up_proj", "*.nothing_of_the_kind"))
    check_not_fused(small_model("llama"), ("*.{q,k,v}_proj",))
