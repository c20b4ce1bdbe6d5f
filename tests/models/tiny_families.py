"""What do the tests of model families share: small random models of each, hand-made selections, a dense reference?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparse_zero as sz
from scripts.dense_reference import adamw_on_entries
from sparse_zero.layers.sparsify import by_parameter
from sparse_zero.selection.regions import WeightSelection, grid_shape
from tests.sparse_zero.helpers import owner_matrix

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
    "use_cache": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24}
PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
KINDS = ("block", "row", "column", "mixed", "whole")


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """A model type at a few thousand parameters, and by name what the tests train of it, with (out, in) of each."""

    model_type: str
    matrices: Mapping[str, tuple[int, int]]
    # Parameters that hold one matrix per expert.
    experts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # No bias of keys: softmax takes it away, so that Adam would step along the rounding of its gradient.
    vectors: tuple[str, ...]
    # Which of the parameters are stored as [in, out].
    transposed: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    classifies: bool = False

    def make(self, **changes: Any) -> Any:
        """The model with random numbers in every parameter, always the same ones."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        given = {**SMALL, **self.changes, **changes}
        experts = given.pop("experts_implementation", None)
        config = AutoConfig.for_model(self.model_type, **given)
        kind = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = kind.from_config(config, attn_implementation="eager").float()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Norms start at one or zero, and experts at nothing: no number is left where it was.
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                    else:
                        parameter.copy_(torch.randn_like(parameter) * 0.15)
        if experts is not None:
            model.set_experts_implementation(experts)
        return model


def _llama_like(model_type: str, *vectors: str, **changes: Any) -> TinyFamily:
    return TinyFamily(
        model_type=model_type,
        matrices={
            "model.embed_tokens.weight": (64, 32),
            "model.layers.0.self_attn.q_proj.weight": (32, 32),
            "model.layers.0.self_attn.v_proj.weight": (16, 32),
            "model.layers.1.self_attn.o_proj.weight": (32, 32),
            "model.layers.0.mlp.gate_proj.weight": (48, 32),
            "model.layers.1.mlp.down_proj.weight": (32, 48),
        },
        vectors=("model.layers.1.input_layernorm.weight", "model.norm.weight", *vectors),
        changes=changes,
    )


def _mixture(
    model_type: str,
    block: str,
    gate_up: tuple[int, int],
    down: tuple[int, int],
    router: str,
    *,
    transposed: bool = False,
    changes: Mapping[str, Any],
    more: Mapping[str, tuple[int, int]] | None = None,
    vectors: Sequence[str] = (),
) -> TinyFamily:
    experts = {f"{block}.experts.gate_up_proj": gate_up, f"{block}.experts.down_proj": down}
    return TinyFamily(
        model_type=model_type,
        matrices={
            "model.embed_tokens.weight": (64, 32),
            "model.layers.0.self_attn.q_proj.weight": (32, 32),
            "model.layers.0.self_attn.k_proj.weight": (16, 32),
            f"{block}.{router}.weight": (4, 32),
            "lm_head.weight": (64, 32),
            **(more or {}),
        },
        experts=experts,
        vectors=("model.layers.0.post_attention_layernorm.weight", *vectors),
        transposed=tuple(experts) if transposed else (),
        changes={**EXPERTS, **changes},
    )


def _bert_like(model_type: str, head: str) -> TinyFamily:
    layer = f"{model_type}.encoder.layer"
    return TinyFamily(
        model_type=model_type,
        matrices={
            f"{model_type}.embeddings.word_embeddings.weight": (64, 32),
            f"{layer}.0.attention.self.query.weight": (32, 32),
            f"{layer}.0.attention.self.key.weight": (32, 32),
            f"{layer}.1.attention.output.dense.weight": (32, 32),
            f"{layer}.1.intermediate.dense.weight": (48, 32),
            f"{layer}.0.output.dense.weight": (32, 48),
            f"{head}.weight": (3, 32),
        },
        vectors=(f"{layer}.0.attention.self.query.bias", f"{layer}.1.output.LayerNorm.bias", f"{head}.bias"),
        changes=NO_DROPOUT_BERT,
        classifies=True,
    )


FAMILIES: dict[str, TinyFamily] = {
    "llama": _llama_like("llama"),
    "llama_tied": _llama_like("llama", tie_word_embeddings=True),
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2", "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.v_proj.bias"),
    "qwen3": _llama_like("qwen3", "model.layers.0.self_attn.q_norm.weight"),
    "gemma": _llama_like("gemma"),
    "gemma2": _llama_like("gemma2", "model.layers.1.pre_feedforward_layernorm.weight"),
    "gemma3_text": _llama_like("gemma3_text", "model.layers.1.self_attn.k_norm.weight"),
    "bloom": TinyFamily(
        model_type="bloom",
        matrices={
            "transformer.word_embeddings.weight": (64, 32),
            "transformer.h.0.self_attention.query_key_value.weight": (96, 32),
            "transformer.h.1.self_attention.dense.weight": (32, 32),
            "transformer.h.0.mlp.dense_h_to_4h.weight": (128, 32),
            "transformer.h.1.mlp.dense_4h_to_h.weight": (32, 128),
        },
        vectors=(
            "transformer.h.1.self_attention.dense.bias",
            "transformer.word_embeddings_layernorm.weight",
            "transformer.h.0.mlp.dense_4h_to_h.bias",
        ),
    ),
    "gpt2": TinyFamily(
        model_type="gpt2",
        matrices={
            "transformer.wte.weight": (64, 32),
            "transformer.wpe.weight": (64, 32),
            "transformer.h.0.attn.c_attn.weight": (96, 32),
            "transformer.h.1.attn.c_proj.weight": (32, 32),
            "transformer.h.0.mlp.c_fc.weight": (128, 32),
            "transformer.h.1.mlp.c_proj.weight": (32, 128),
        },
        vectors=("transformer.h.1.attn.c_proj.bias", "transformer.h.1.ln_2.weight", "transformer.h.1.mlp.c_fc.bias"),
        transposed=(
            "transformer.h.0.attn.c_attn.weight",
            "transformer.h.1.attn.c_proj.weight",
            "transformer.h.0.mlp.c_fc.weight",
            "transformer.h.1.mlp.c_proj.weight",
        ),
        changes=NO_DROPOUT_GPT2,
    ),
    "gpt_neox": TinyFamily(
        model_type="gpt_neox",
        matrices={
            "gpt_neox.embed_in.weight": (64, 32),
            "gpt_neox.layers.0.attention.query_key_value.weight": (96, 32),
            "gpt_neox.layers.1.attention.dense.weight": (32, 32),
            "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (48, 32),
            "gpt_neox.layers.1.mlp.dense_4h_to_h.weight": (32, 48),
        },
        vectors=("gpt_neox.layers.1.attention.dense.bias", "gpt_neox.final_layer_norm.weight"),
    ),
    "bert": _bert_like("bert", "classifier"),
    "roberta": _bert_like("roberta", "classifier.out_proj"),
    "mixtral": _mixture("mixtral", "model.layers.0.mlp", (96, 32), (32, 48), "gate", changes={"num_local_experts": 4}),
    "qwen2_moe": _mixture(
        "qwen2_moe",
        "model.layers.1.mlp",
        (40, 32),
        (32, 20),
        "gate",
        changes={"num_experts": 4},
        more={
            "model.layers.1.mlp.shared_expert.up_proj.weight": (24, 32),
            "model.layers.1.mlp.shared_expert_gate.weight": (1, 32),
        },
        vectors=["model.layers.0.self_attn.q_proj.bias"],
    ),
    "qwen3_moe": _mixture("qwen3_moe", "model.layers.1.mlp", (40, 32), (32, 20), "gate", changes={"num_experts": 4}),
    "gpt_oss": _mixture(
        "gpt_oss",
        "model.layers.0.mlp",
        (96, 32),
        (32, 48),
        "router",
        transposed=True,
        changes={"num_local_experts": 4, "rope_parameters": PLAIN_ROTARY},
        # One bias per expert: a row each.
        more={"model.layers.0.mlp.experts.gate_up_proj_bias": (4, 96)},
        vectors=["model.layers.0.self_attn.sinks", "model.layers.0.mlp.router.bias"],
    ),
    # Its experts' parameters are read by another module than the one that holds them.
    "dbrx": TinyFamily(
        model_type="dbrx",
        matrices={
            "transformer.wte.weight": (64, 32),
            "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight": (64, 32),
            "transformer.blocks.1.ffn.experts.mlp.w1": (80, 32),
            "transformer.blocks.1.ffn.experts.mlp.v1": (80, 32),
            "transformer.blocks.0.ffn.experts.mlp.w2": (80, 32),
        },
        vectors=("transformer.blocks.0.norm_attn_norm.norm_2.weight",),
        changes={
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2},
            "tie_word_embeddings": False,
            # By the names of its own.
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
        },
    ),
    # A mixer that reads the weights of its linears instead of calling them.
    "mamba": TinyFamily(
        model_type="mamba",
        matrices={
            "backbone.embeddings.weight": (64, 32),
            "backbone.layers.0.mixer.in_proj.weight": (96, 32),
            "backbone.layers.1.mixer.dt_proj.weight": (48, 6),
            "backbone.layers.1.mixer.x_proj.weight": (14, 48),
            "backbone.layers.1.mixer.A_log": (48, 4),
        },
        vectors=("backbone.layers.1.mixer.dt_proj.bias", "backbone.layers.0.mixer.D", "backbone.layers.1.norm.weight"),
        changes={"state_size": 4, "time_step_rank": 6},
    ),
    "llama4_text": _mixture(
        "llama4_text",
        "model.layers.1.feed_forward",
        (96, 32),
        (32, 48),
        "router",
        transposed=True,
        changes={"num_local_experts": 4, "rope_parameters": PLAIN_ROTARY},
        more={"model.layers.1.feed_forward.shared_expert.down_proj.weight": (32, 48)},
    ),
}


def _regions(shape: tuple[int, int], kind: str) -> WeightSelection:
    """Regions of one kind, or of all three overlapping; the blocks do not divide the shapes."""
    out_features, in_features = shape
    size = min(5, *shape)
    grid = grid_shape(shape, size)
    everything: dict[str, Any] = {
        "blocks": [[0, grid[1] - 1], [grid[0] - 1, min(1, grid[1] - 1)], [grid[0] // 2, min(2, grid[1] - 1)]],
        "rows": sorted({out_features // 3, out_features - 1}),
        "columns": [0, in_features // 2],
    }
    everything["blocks"] = [list(cell) for cell in sorted({tuple(cell) for cell in everything["blocks"]})]
    wanted = everything if kind == "mixed" else {f"{kind}s": everything[f"{kind}s"]}
    return WeightSelection(shape=shape, block_size=size, **wanted)


def hand_made_selection(family: TinyFamily, model: nn.Module, kind: str) -> sz.Selection:
    """Regions of ``kind`` over attention, MLP, experts and embeddings; whole vectors for ``whole`` and ``mixed``."""
    weights: dict[str, WeightSelection] = {}
    if kind != "whole":
        weights.update({name: _regions(shape, kind) for name, shape in family.matrices.items()})
        # Not every expert: the others are frozen.
        for name, shape in family.experts.items():
            weights.update({f"{name}[{number}]": _regions(shape, kind) for number in (0, 3)})
    if kind in ("whole", "mixed"):
        lengths = {name: len(parameter) for name, parameter in model.named_parameters() if parameter.ndim == 1}
        weights.update({name: WeightSelection(shape=(lengths[name], 1), whole=True) for name in family.vectors})
    return sz.Selection(weights)


def make_batches(steps: int, batch: int = 4, length: int = 9) -> Tensor:
    """[steps, batch, length] token ids, from 3 (none of the special ones) to 47."""
    return torch.randint(3, 48, (steps, batch, length), generator=torch.Generator().manual_seed(5))


def family_loss(family: TinyFamily, model: Any, tokens: Tensor) -> Tensor:
    """Next-token loss, or a classification of what each row starts with."""
    logits = model(input_ids=tokens).logits
    if family.classifies:
        return nn.functional.cross_entropy(logits, tokens[:, 0] % 3)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _stored_mask(family: TinyFamily, name: str, parameter: Tensor, chosen: Mapping[int | None, Any]) -> Tensor:
    """Which numbers of the parameter are trained, in the order of memory."""
    mask = torch.zeros_like(parameter, dtype=torch.bool)
    for number, selection in chosen.items():
        owned = torch.ones(len(parameter), dtype=torch.bool) if selection.whole else owner_matrix(selection) > 0
        place = mask if number is None else mask[number]
        place.copy_(owned.T if name in family.transposed else owned)
    return mask


def dense_training(
    family: TinyFamily,
    selection: sz.Selection,
    placement: str,
    batches: Tensor,
    *,
    learning_rate: float,
    decay: float,
    clip: float | None = None,
    **changes: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Plain AdamW on the dense model that updates (and decays) the selected entries only: losses, parameters."""
    model = family.make(**changes)
    parameters = dict(model.named_parameters())
    masks = {
        name: _stored_mask(family, name, parameters[name], chosen)
        for name, chosen in by_parameter(selection).items()
    }  # fmt: skip
    return adamw_on_entries(
        model,
        masks,
        partial(family_loss, family),
        batches,
        placement,
        learning_rate=learning_rate,
        decay=decay,
        clip=clip,
    )
