"""Which modules of a model family are attention or MLP, and which of them read the same input?"""

from __future__ import annotations

import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sparse_zero.errors import InputError
from sparse_zero.module_map import ModuleMap, default_module_map
from sparse_zero.selection.candidates import expand_braces

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Families for which the default map is right about shared inputs (q, k and v read one tensor, gate and up another, or
# none is shared). A test runs a small model of each and compares what the linears are given.
KNOWN_FAMILIES = frozenset(
    {
        # decoders built like Llama
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
        # decoders that fuse q, k and v
        "bloom",
        "gpt2",
        "gpt_neox",
        "phi3",
        # mixtures of experts, whose experts are one parameter per layer
        "dbrx",
        "gpt_oss",
        "llama4_text",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        # encoders
        "bert",
        "roberta",
    }
)

# Families whose layers tell from position ids where a packed sample begins: a test compares packed with padded batches
# of each. Not the known ones whose samples read one another nonetheless, nor encoders, which classify padded rows. Of
# families that are not known, many mix as well: state spaces, convolutions, and positions that are counted anew.
PACKABLE_FAMILIES = KNOWN_FAMILIES - {"bloom", "gpt_oss"} - {"bert", "roberta"}

# Projections that some families hold as one matrix: the fused name, and the names that it stands for.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class FamilyWarning(UserWarning):
    """A model's family is not among the known ones; what follows from that is in the message."""


def is_known(model: nn.Module) -> bool:
    """Whether the model's family is one of :data:`KNOWN_FAMILIES`."""
    return _model_type(model) in KNOWN_FAMILIES


def can_pack(model: nn.Module) -> bool:
    """Whether the model's family is one of :data:`PACKABLE_FAMILIES`."""
    return _model_type(model) in PACKABLE_FAMILIES


def check_can_pack(model: nn.Module) -> None:
    """Raise unless packed samples of the model are known not to read one another.

    Raises:
        InputError: names the setting and the family.
    """
    if not can_pack(model):
        raise InputError(
            f"data.batching is 'pack', but packed samples of {_model_type(model)} models read one another, or are not "
            "known not to: set data.batching to pad"
        )


def head_name(model: nn.Module) -> str | None:
    """Name of the module that computes the logits; None where there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is head), None)


def module_map(model: PreTrainedModel) -> ModuleMap:
    """The map of a model's matrices and vectors: layouts, layers, roles and shared inputs.

    For :data:`KNOWN_FAMILIES` it is complete. Other models get the map that names, classes and shapes tell, without
    shared inputs, which only costs memory, and a :class:`FamilyWarning`.

    Raises:
        InputError: the model has no matrix.
    """
    kind = _model_type(model)
    found = default_module_map(model)
    if not found.matrices:
        raise InputError(f"model.name_or_path is a {kind} model without a matrix to select from: use another model")
    if kind in KNOWN_FAMILIES:
        return found
    if found.shared_inputs:
        warnings.warn(
            f"model type {kind!r} is not among the families known to share inputs between projections: "
            "each linear keeps its own input for backward, which costs memory; its samples cannot be packed either "
            "(data.batching pack)",
            FamilyWarning,
            stacklevel=2,
        )
    return replace(found, shared_inputs=())


def check_not_fused(model: PreTrainedModel, patterns: tuple[str, ...]) -> None:
    """Refuse module patterns that ask for a projection which the model holds fused with others.

    Args:
        model: the model.
        patterns: module patterns as in a selection (``*.q_proj``).

    Raises:
        InputError: naming the fused module to ask for instead.
    """
    names = [name for matrix in default_module_map(model).matrices for name in matrix.names()]
    endings = {name.rpartition(".")[2] for name in names}
    for pattern in (each for whole in patterns for each in expand_braces(whole)):
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        for fused, parts in FUSED.items():
            asked = next((part for part in parts if pattern.endswith(part)), None)
            if fused in endings and asked is not None:
                raise InputError(
                    f"module pattern {pattern!r} matches nothing: a {_model_type(model)} model holds "
                    f"{', '.join(parts)} as one matrix, of which no part can be asked for; "
                    f"ask for all of it, {pattern.removesuffix(asked)}{fused}"
                )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
