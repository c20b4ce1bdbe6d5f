"""What do the tests of the memory's closed form share: one small decoder of each family, without data?"""

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 80},
    "qwen2": {},
    "qwen3": {"head_dim": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
}
FAMILIES = tuple(OWN)


def decoder(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model of ``family`` on the meta device; ``changes`` are fields of its config, or ``attn_implementation``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = {name: changes.pop(name) for name in ("attn_implementation",) if name in changes}
    config = AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {}), **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
