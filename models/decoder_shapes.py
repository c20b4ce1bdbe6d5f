"""What of a transformers config decides how much memory its model takes?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_zero.errors import InputError
from sparse_zero.memory.decoder_shape import DecoderShape, LinearShape, Reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READS: dict[str, Reads] = {
    "q_proj": "attention_input", "k_proj": "attention_input", "v_proj": "attention_input",
    "o_proj": "attention_output", "gate_proj": "mlp_input", "up_proj": "mlp_input", "down_proj": "mlp_output",
    "query_key_value": "attention_input", "dense": "attention_output",
    "dense_h_to_4h": "mlp_input", "dense_4h_to_h": "mlp_output",
}  # fmt: skip


def decoder_shape(model: PreTrainedModel) -> DecoderShape:
    """The shape of a model, also of one on the meta device.

    Raises:
        InputError: no decoder of equal layers.
    """
    from torch import nn

    config = model.config
    layers_name, layers = next(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
        ),
        ("", None),
    )
    if layers is None:
        raise InputError(f"{config.model_type} is no decoder with a list of layers: it has no closed form")
    linears = tuple(
        LinearShape(
            name=name,
            out_features=module.out_features,
            in_features=module.in_features,
            has_bias=module.bias is not None,
            reads=_READS.get(name.rpartition(".")[2], "mlp_input"),
        )
        for name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear)
    )
    of_layer = sum(each.numel() for each in layers[0].parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = head is embedding
    total = sum(each.numel() for each in model.parameters())
    intermediate = max((each.in_features for each in linears if each.reads == "mlp_output"), default=0)
    heads = config.num_attention_heads
    return DecoderShape(
        model_type=config.model_type,
        layers_name=layers_name,
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        intermediate_size=intermediate or getattr(config, "intermediate_size", 4 * config.hidden_size),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=embedding.shape[0],
        tied=tied,
        norm="rms" if hasattr(config, "rms_norm_eps") else "layer",
        mlp="gated" if any(each.name.endswith("gate_proj") for each in linears) else "plain",
        positions="alibi" if config.model_type == "bloom" else "rope",
        has_qk_norm=config.model_type == "qwen3",
        num_experts=getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0,
        experts_per_token=getattr(config, "num_experts_per_tok", None) or 0,
        linears=linears,
        other_parameters=of_layer - sum(each.num_parameters for each in linears),
        outer_parameters=total - len(layers) * of_layer - embedding.numel() * (1 if tied else 2),
    )
