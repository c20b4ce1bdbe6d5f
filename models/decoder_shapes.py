"""What of a transformers config decides how much memory its model takes?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from models import compat
from sparse_zero.errors import InputError
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape, LinearShape, Reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families of which the closed form is held against simulations, by tests and by scripts/verify_memory.py.
CHECKED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "bloom"})

_READS: dict[str, Reads] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"), "attention_input"),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), "attention_output"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"), "mlp_input"),
    **dict.fromkeys(("down_proj", "fc2", "dense_4h_to_h"), "mlp_output"),
}


class ShapeWarning(UserWarning):
    """The closed form of a family's activations is taken to be its relatives', and has not been checked."""


def decoder_shape(model: PreTrainedModel) -> DecoderShape:
    """The shape of a model, also of one on the meta device.

    A family that is not among :data:`CHECKED_FAMILIES` gets a :class:`ShapeWarning`: its parameters are counted right,
    its activations as those of a Llama with the same linears.

    Raises:
        InputError: no decoder of equal layers.
    """
    from torch import nn

    config: Any = model.config
    kind = str(config.model_type)
    layers_name, layers = _layers(model)
    if any(_sizes(layer) != _sizes(layers[0]) for layer in layers):
        raise InputError(f"the layers of this {kind} differ in shape: it has no closed form; use the simulation")
    linears = tuple(
        LinearShape(
            name=name,
            out_features=module.out_features,
            in_features=module.in_features,
            has_bias=module.bias is not None,
            reads=_reads(name),
        )
        for name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear)
    )
    of_layer = sum(each.numel() for each in layers[0].parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is None or head.weight is embedding
    total = sum(each.numel() for each in model.parameters())
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        raise InputError(f"{kind} models have no attention heads: they have no closed form")
    heads = config.num_attention_heads
    num_experts, intermediate = _experts(layers[0])
    outputs = [each.in_features for each in linears if each.reads == "mlp_output"]
    if not num_experts:
        intermediate = max(outputs, default=0) or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if kind not in CHECKED_FAMILIES:
        warnings.warn(
            f"the closed form of memory is not checked for {kind} models: what their layers keep is taken to be what "
            "a Llama's do",
            ShapeWarning,
            stacklevel=2,
        )
    return DecoderShape(
        model_type=kind,
        layers_name=layers_name,
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=embedding.shape[0],
        tied=tied,
        norm="layer" if any(isinstance(module, nn.LayerNorm) for module in layers[0].modules()) else "rms",
        mlp="gated" if any("gate_proj" in each.name for each in linears) else "plain",
        positions="alibi" if kind == "bloom" else "rope",
        has_qk_norm=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
        has_embedding_norm=kind == "bloom",
        has_sdpa=compat.supports_sdpa(model),
        window=getattr(config, "sliding_window", None),
        num_experts=num_experts,
        experts_per_token=int(getattr(config, "num_experts_per_tok", None) or 0),
        linears=linears,
        other_parameters=of_layer - sum(each.num_parameters for each in linears),
        outer_parameters=total - len(layers) * of_layer - embedding.numel() * (1 if tied else 2),
        is_checked=kind in CHECKED_FAMILIES,
    )


def _layers(model: PreTrainedModel) -> tuple[str, Any]:
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(model.config, "num_hidden_layers", None):
            return name, module
    raise InputError(f"{model.config.model_type} is no decoder with a list of layers: it has no closed form")


def _sizes(layer: Any) -> list[tuple[str, Any]]:
    return [(name, parameter.shape) for name, parameter in layer.named_parameters()]


def _reads(name: str) -> Reads:
    found = _READS.get(name.rpartition(".")[2])
    if found is not None:
        return found
    return "attention_input" if "att" in name else "mlp_input"


def _experts(layer: Any) -> tuple[int, int]:
    """Number of experts and the width of each; of a dense layer (0, 0)."""
    for name, parameter in layer.named_parameters():
        # [experts, hidden, intermediate], in whichever order of the last two.
        if parameter.dim() == 3 and name.endswith("down_proj"):
            hidden = layer.get_submodule(name.rpartition(".")[0])
            sides = set(parameter.shape[1:])
            sides.discard(getattr(hidden, "hidden_dim", None) or getattr(hidden, "hidden_size", None))
            return int(parameter.shape[0]), int(sides.pop() if sides else parameter.shape[2])
    return 0, 0
