"""What does a GGUF file for the tests look like? The tiny Llama with its tokenizer, float32 or in Q8_0 blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.models.tiny import CHAT_TEMPLATE, tiny_tokenizer

# The GGUF names of a Llama's tensors.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF's order of the rows of q and k: the two halves of every head alternate."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_tiny_gguf(path: Path, model: Any, *, quantized: bool = False) -> None:
    """Write a tiny Llama (384 tokens) as GGUF; matrices as Q8_0 when ``quantized``."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config, tokenizer = model.config, tiny_tokenizer()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3] * 4 + [1] * (len(tokenizer) - 4))
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values, stem = parameter.detach().numpy(), name.removesuffix(".weight")
        if stem.rpartition(".")[2] in heads:
            values = interleaved(values, heads[stem.rpartition(".")[2]])
        _, _, within = stem.partition("model.layers.")
        layer, _, rest = within.partition(".")
        gguf_name = f"blk.{layer}.{NAMES[rest]}.weight" if within else f"{NAMES[stem]}.weight"
        if quantized and values.ndim == 2:
            blocks = quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    return list(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])
