"""What does one operation of a layer keep for backward, and what does it hold for a moment, in bytes?

A layer is a sequence of steps in the order of forward. At a moment of forward there is what the steps so far keep, and
what the step at work holds beside it. Backward goes through them in reverse: there is what the steps up to the one at
work have kept, and what its gradients take. What the steps behind it kept has been released by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import Attention, MemoryJob


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation; all numbers are bytes."""

    # Of the module that is at work, within its layer: "self_attn.q_proj"; "" for the layer itself.
    name: str
    # From forward to the end of the step's own backward, by what it is: "attention", "inputs of trained parts".
    kept: Mapping[str, int] = field(default_factory=dict)
    # In forward beside what is kept: outputs on their way to the next step, and what dies at once.
    forward: int = 0
    # Of what is kept so far, what is counted among what stage 3 has gathered as long as the step is at work in forward.
    counted: int = 0
    # In forward where nothing is kept: below the graph, and in the first pass of gradient checkpointing.
    alone: int = 0
    # Of ``forward``, what is not come to where gradient checkpointing repeats a layer and this is its last step: the
    # repetition ends with the last tensor that is kept.
    unrepeated: int = 0
    # In backward: gradients on their way, and what dies at once. None: no gradient comes here.
    backward: int | None = None

    @property
    def kept_bytes(self) -> int:
        """The sum of what is kept."""
        return sum(self.kept.values())


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Bytes that are there while a step is at work, and belong to others in its layer."""

    # In forward, where they are not kept: the residual stream, the input of a group of linears.
    forward: int
    # In forward where nothing is kept.
    alone: int
    # In backward: gradients that wait.
    backward: int

    def plus(self, forward: int = 0, backward: int = 0, alone: int | None = None) -> Beside:
        """More of them; ``alone`` is as much as ``forward`` unless given."""
        return Beside(
            forward=self.forward + forward,
            alone=self.alone + (forward if alone is None else alone),
            backward=self.backward + backward,
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the tensors that steps are made of."""

    shape: DecoderShape
    job: MemoryJob
    # Of the micro-batch, or those with logits.
    tokens: int

    @cached_property
    def element(self) -> int:
        """Of one entry."""
        return self.job.element_bytes

    @cached_property
    def is_low(self) -> bool:
        """Whether activations have fewer bits than what is computed in fp32: the latter is a copy then."""
        return self.element < 4

    def of(self, features: int) -> int:
        """[tokens, features] in the dtype of activations."""
        return self.tokens * features * self.element

    @cached_property
    def stream(self) -> int:
        """The hidden states between layers: [tokens, hidden]."""
        return self.of(self.shape.hidden_size)

    @cached_property
    def queries(self) -> int:
        """[tokens, heads * head_dim]."""
        return self.of(self.shape.num_heads * self.shape.head_dim)

    @cached_property
    def keys(self) -> int:
        """[tokens, kv heads * head_dim]: keys, and values as well."""
        return self.of(self.shape.num_kv_heads * self.shape.head_dim)

    @cached_property
    def attention(self) -> Attention:
        """The one that runs: some families have eager only."""
        return self.job.attention if self.shape.has_sdpa else "eager"

    @cached_property
    def has_mask(self) -> bool:
        """Whether a mask of positions by positions is made: always by eager attention."""
        window, attention = self.shape.window, self.attention
        is_cut = window is not None and self.job.row_length >= window
        return attention == "eager" or (attention == "sdpa" and (self.job.needs_mask or is_cut))

    @cached_property
    def positions_squared(self) -> int:
        """Entries of one mask: rows * length * length."""
        return self.job.rows * self.job.row_length**2

    @cached_property
    def scores(self) -> int:
        """Entries of the attention's scores: rows * heads * length * length."""
        return self.positions_squared * self.shape.num_heads

    @cached_property
    def keeps_inputs(self) -> bool:
        """Whether frozen linears keep inputs that require grad.

        At stage 3 DeepSpeed puts a function of its own in the place of torch's linear, which does
        (``runtime/zero/linear.py: LinearFunctionForZeroStage3``); this package's linears are no part of that.
        """
        return self.job.stage == 3 and self.job.method in ("lora", "dora")

    @cached_property
    def position_embeddings(self) -> int:
        """Cosines and sines of the positions, which all layers share."""
        if self.shape.positions != "rope":
            return 0
        return 2 * self.job.row_length * self.shape.head_dim * self.element
