"""What of a decoder's architecture decides how much memory it takes?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which tensor a linear multiplies: those that read the same one keep it once.
Reads = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear of a decoder layer: ``W[out_features, in_features]``."""

    # Within its layer: "self_attn.q_proj".
    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    reads: Reads

    @property
    def num_parameters(self) -> int:
        """Entries of the weight and the bias."""
        return self.out_features * (self.in_features + self.has_bias)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder of equal layers, as the models of the Llama family and their relatives are."""

    # transformers' name of the family: "llama".
    model_type: str
    # Name of the list of layers: "model.layers".
    layers_name: str
    num_layers: int
    hidden_size: int
    # Of the MLP, or of one expert.
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    # Whether the output head is the embedding.
    tied: bool
    # rms: computed in fp32 by the model's own code. layer: torch's own kernel.
    norm: Literal["rms", "layer"] = "rms"
    # gated: down(act(gate(x)) * up(x)); plain: down(act(up(x))).
    mlp: Literal["gated", "plain"] = "gated"
    positions: Literal["rope", "alibi"] = "rope"
    # Whether queries and keys are normalized, each head by itself (Qwen 3).
    has_qk_norm: bool = False
    # Whether the embedding's output is normalized (Bloom).
    has_embedding_norm: bool = False
    # Whether the family's code can call torch's attention kernels; else its attention is eager, whatever is asked for.
    has_sdpa: bool = True
    # Tokens that attention looks back on; None: all. Rows that are longer need a mask.
    window: int | None = None
    # Experts of each layer's MLP, and how many of them a token goes through; 0: the MLP is dense.
    num_experts: int = 0
    experts_per_token: int = 0
    # Of one layer, in the order of the model; experts, which are stacks, are not among them.
    linears: tuple[LinearShape, ...]
    # Entries of all other parameters of one layer (norms, experts, routers).
    other_parameters: int
    # Entries of the parameters outside of the layers, without embedding and head.
    outer_parameters: int
    # Whether the closed form is checked against the simulation for this family, or taken to be like its relatives.
    is_checked: bool = True

    @property
    def layer_parameters(self) -> int:
        """Entries of one layer."""
        return sum(linear.num_parameters for linear in self.linears) + self.other_parameters

    @property
    def num_parameters(self) -> int:
        """Entries of the model, tied ones once."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * self.layer_parameters + ends + self.outer_parameters

    def reading(self, reads: Reads) -> tuple[LinearShape, ...]:
        """The linears of one layer that multiply the same tensor."""
        return tuple(linear for linear in self.linears if linear.reads == reads)
