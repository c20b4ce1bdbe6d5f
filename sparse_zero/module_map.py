"""What must be known of a model's family: which linears there are, their layer, role, and shared inputs?"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

Role = Literal["attention", "mlp", "head", "other"]

# Projections that read the same tensor in Llama-like layers, by the last component of their names.
_SHARED_INPUT_NAMES = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))


@dataclass(frozen=True, kw_only=True)
class ModuleMap:
    """The linears of a model, by module name, in the order of the model."""

    # Every nn.Linear with a 2-D weight of its own, tied ones included.
    linears: tuple[str, ...]
    # Groups of linears that read the very same input tensor: what backward keeps of it is kept once.
    shared_inputs: tuple[tuple[str, ...], ...]
    # Index of the decoder layer a linear lies in; absent outside the layers.
    layer_of: Mapping[str, int]
    role_of: Mapping[str, Role]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers: one more than the highest index."""
        return 1 + max(self.layer_of.values(), default=-1)


def layer_index(name: str) -> int | None:
    """The first integer component of a dotted module name: 3 for ``model.layers.3.mlp.up_proj``."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def role_from_name(name: str) -> Role:
    """Attention, MLP or head, judged by the components of a dotted module name."""
    components = name.lower().split(".")
    if any("attn" in part or "attention" in part for part in components):
        return "attention"
    if any(part in ("mlp", "ffn", "feed_forward", "experts") for part in components):
        return "mlp"
    if components[-1] in ("lm_head", "score", "classifier", "embed_out"):
        return "head"
    return "other"


def default_module_map(model: nn.Module) -> ModuleMap:
    """The map that module names alone tell; right for Llama-like models."""
    from sparse_zero.layers.sparse_linear import SparseLinear

    linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear | SparseLinear))
    siblings: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in linears:
        parent, _, last = name.rpartition(".")
        for number, shared in enumerate(_SHARED_INPUT_NAMES):
            if last in shared:
                siblings[(parent, number)].append(name)
    return ModuleMap(
        linears=linears,
        shared_inputs=tuple(tuple(group) for group in siblings.values() if len(group) > 1),
        layer_of={name: index for name in linears if (index := layer_index(name)) is not None},
        role_of={name: role_from_name(name) for name in linears},
    )
