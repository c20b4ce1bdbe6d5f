"""What do well-known models look like, for whom has neither their weights nor a network?

Facts: the values of each model's published ``config.json``, as far as shapes follow from them, and the number of
parameters that the hub counts in its safetensors files. A test builds each and counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class KnownShape:
    """One published model."""

    # What a command line calls it: "llama-2-7b".
    name: str
    # Repositories on the hub with this shape; the first is where the values are from.
    hub_names: tuple[str, ...]
    # Entries of all parameters, tied ones once.
    num_parameters: int
    # Of the config.json, without what decides neither shape nor memory.
    config: Mapping[str, Any]


def _llama(
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    *,
    eps: float = 1e-5,
    tied: bool = False,
    theta: float = 10_000.0,
    kind: str = "llama",
    **more: Any,
) -> dict[str, Any]:
    """The config of a decoder that is built like Llama, in the order in which papers list it."""
    return {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        # The ids differ from model to model, and some lie outside of small vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **more,
    }


def _roberta(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """The config of an encoder of RoBERTa; two of its 514 positions stand for padding."""
    return {
        "model_type": "roberta",
        "vocab_size": 50_265,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _known(name: str, num_parameters: int, hub_names: tuple[str, ...], config: Mapping[str, Any]) -> KnownShape:
    return KnownShape(name=name, hub_names=hub_names, num_parameters=num_parameters, config=config)


_LLAMA_31: dict[str, Any] = {"theta": 500_000.0, "rope_parameters": _llama3_rope(8.0)}
_LLAMA_32: dict[str, Any] = {"theta": 500_000.0, "rope_parameters": _llama3_rope(32.0), "tied": True}
_QWEN_25: dict[str, Any] = {"theta": 1_000_000.0, "kind": "qwen2"}

KNOWN_SHAPES: tuple[KnownShape, ...] = (
    _known("roberta-base", 124_697_433, ("FacebookAI/roberta-base",), _roberta(768, 3072, 12, 12)),
    _known(
        "smollm2-135m", 134_515_008,
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        _llama(49_152, 576, 1536, 30, 9, 3, 8192, tied=True, theta=100_000.0),
    ),
    _known("roberta-large", 355_412_057, ("FacebookAI/roberta-large",), _roberta(1024, 4096, 24, 16)),
    _known(
        "tinyllama-1.1b", 1_100_048_384,
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        _llama(32_000, 2048, 5632, 22, 32, 4, 2048),
    ),
    _known(
        "llama-3.2-1b", 1_235_814_400,
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
        _llama(128_256, 2048, 8192, 16, 32, 8, 131_072, head_dim=64, **_LLAMA_32),
    ),
    _known(
        "llama-3.2-3b", 3_212_749_824,
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
        _llama(128_256, 3072, 8192, 28, 24, 8, 131_072, head_dim=128, **_LLAMA_32),
    ),
    _known(
        "llama-2-7b", 6_738_415_616,
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b"),
        _llama(32_000, 4096, 11_008, 32, 32, 32, 4096),
    ),
    _known(
        "bloom-7b1", 7_069_016_064,
        ("bigscience/bloom-7b1", "bigscience/bloomz-7b1"),
        {
            "model_type": "bloom", "vocab_size": 250_880, "hidden_size": 4096, "n_layer": 30, "n_head": 32,
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        },
    ),
    _known(
        "mistral-7b", 7_241_732_096,
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
        _llama(32_000, 4096, 14_336, 32, 32, 8, 32_768, kind="mistral", sliding_window=4096),
    ),
    _known(
        "qwen2.5-7b", 7_615_616_512,
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        _llama(152_064, 3584, 18_944, 28, 28, 4, 131_072, eps=1e-6, **_QWEN_25),
    ),
    _known(
        "llama-3-8b", 8_030_261_248,
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
        _llama(128_256, 4096, 14_336, 32, 32, 8, 8192, theta=500_000.0),
    ),
    _known(
        "llama-3.1-8b", 8_030_261_248,
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B"),
        _llama(128_256, 4096, 14_336, 32, 32, 8, 131_072, **_LLAMA_31),
    ),
    _known(
        "qwen3-8b", 8_190_735_360,
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"),
        _llama(151_936, 4096, 12_288, 36, 32, 8, 40_960, eps=1e-6, theta=1_000_000.0, kind="qwen3", head_dim=128),
    ),
    _known(
        "llama-2-13b", 13_015_864_320,
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf", "meta-llama/Llama-2-13b"),
        _llama(32_000, 5120, 13_824, 40, 40, 40, 4096),
    ),
    _known(
        "qwen2.5-14b", 14_770_033_664,
        ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-14B-Instruct"),
        _llama(152_064, 5120, 13_824, 48, 40, 8, 131_072, **_QWEN_25),
    ),
    _known(
        "qwen2.5-32b", 32_763_876_352,
        ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct"),
        _llama(152_064, 5120, 27_648, 64, 40, 8, 131_072, **_QWEN_25),
    ),
    _known(
        "mixtral-8x7b", 46_702_792_704,
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        _llama(
            32_000, 4096, 14_336, 32, 32, 8, 32_768, theta=1_000_000.0, kind="mixtral",
            num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
        ),
    ),
    _known(
        "llama-2-70b", 68_976_648_192,
        ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b"),
        _llama(32_000, 8192, 28_672, 80, 64, 8, 4096),
    ),
    _known(
        "llama-3-70b", 70_553_706_496,
        ("meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B-Instruct"),
        _llama(128_256, 8192, 28_672, 80, 64, 8, 8192, theta=500_000.0),
    ),
    _known(
        "llama-3.1-70b", 70_553_706_496,
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B"),
        _llama(128_256, 8192, 28_672, 80, 64, 8, 131_072, **_LLAMA_31),
    ),
    _known(
        "qwen2.5-72b", 72_706_203_648,
        ("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-72B-Instruct"),
        _llama(152_064, 8192, 29_568, 80, 64, 8, 131_072, **_QWEN_25),
    ),
)  # fmt: skip

_BY_NAME = {each.name: each for each in KNOWN_SHAPES} | {
    name.lower(): each for each in KNOWN_SHAPES for name in each.hub_names
}


def known_shape(name: str) -> KnownShape | None:
    """The built-in model of a short name or a hub name, in any case of letters; None where there is none."""
    return _BY_NAME.get(name.lower())


def nearest_known(name: str) -> str | None:
    """The short name that a misspelt one may have meant."""
    found = difflib.get_close_matches(name.lower(), [each.name for each in KNOWN_SHAPES], n=1, cutoff=0.5)
    return found[0] if found else None


def transformers_config(shape: KnownShape) -> PretrainedConfig:
    """The config of transformers from which the model is built."""
    from transformers import AutoConfig

    values = dict(shape.config)
    config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    return config
