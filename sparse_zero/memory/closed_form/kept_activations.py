"""What do the layers of a pass, its embedding and its head leave behind in forward, until backward has come back?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparse_zero.memory.closed_form.attention_activations import ATTENTION
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.layer_activations import NORMS, keeps_stream, layer_steps
from sparse_zero.memory.closed_form.linear_activations import linear_use
from sparse_zero.memory.closed_form.mlp_activations import GATHERED
from sparse_zero.memory.closed_form.moments import Term
from sparse_zero.memory.closed_form.steps import Sizes, Step
from sparse_zero.memory.closed_form.trained import Trained, TrainedLinear

POSITIONS = "positions and masks"
INPUTS = "layer inputs"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What of one layer matters for the others."""

    index: int
    steps: tuple[Step, ...]
    # Whether its input requires grad.
    has_graph: bool

    @cached_property
    def is_reached(self) -> bool:
        """Whether backward comes here."""
        return any(step.backward is not None for step in self.steps)


@dataclass(kw_only=True)
class Held:
    """What is kept at a moment, in bytes by what it is."""

    of: dict[str, int] = field(default_factory=dict)

    def add(self, kept: Mapping[str, int]) -> None:
        """Keep more."""
        for name, num_bytes in kept.items():
            self.of[name] = self.of.get(name, 0) + num_bytes

    def copy(self) -> Held:
        """What is kept now, whatever is added later."""
        return Held(of=dict(self.of))

    def terms(self) -> tuple[Term, ...]:
        """One for each name."""
        return tuple(
            Term(name=name, kind="gathered", num_bytes=num_bytes)
            if name == GATHERED
            else Term(name=f"kept activations: {name}", kind="activations", num_bytes=num_bytes)
            for name, num_bytes in self.of.items()
            if num_bytes
        )

    @property
    def num_bytes(self) -> int:
        """The sum."""
        return sum(self.of.values())


class Pass:
    """One forward and backward pass of a job.

    Args:
        shape: of the model.
        job: what trains it.
        trained: what is trained of it.
    """

    def __init__(self, shape: DecoderShape, job: MemoryJob, trained: Trained) -> None:
        self.shape, self.job, self.trained = shape, job, trained
        self.sizes = Sizes(shape=shape, job=job, tokens=job.tokens)
        self.checkpoints = job.gradient_checkpointing
        # Of layers that are alike, by the identity of their steps.
        self._kept: dict[int, dict[str, int]] = {}
        self.trains_embedding = self.trains("embed", "word_embeddings")
        self.trains_head = job.method == "full" or (not shape.tied and self.trains("lm_head", "embed_out"))
        self.layers = tuple(self._layers())
        self.has_graph = self.trains_embedding or any(layer.is_reached for layer in self.layers)
        # Positions whose logits exist at once; None: all, and their loss is an operation of its own. See
        # models.chunked_loss.
        forms_dense = job.method == "full" or (shape.tied and self.trains_embedding)
        chunk = None if job.loss_chunk is None or forms_dense else job.loss_chunk
        self.chunk = chunk if chunk is not None and chunk < job.logit_rows else None

    @cached_property
    def keeps_positions(self) -> bool:
        """Whether cosines and sines are kept: where a gradient goes through queries or keys."""
        return self.checkpoints or any(step.kept.get(ATTENTION) for layer in self.layers for step in layer.steps)

    def trains(self, *parts: str) -> bool:
        """Whether a parameter outside of the layers is trained whose name has one of ``parts`` in it."""
        if self.job.method == "full":
            return True
        return any(
            part in name and not name.startswith(self.shape.layers_name)
            for name in self.trained.others
            for part in parts
        )

    def _layers(self) -> Iterator[Layer]:
        has_graph, others = self.trains_embedding, self._others()
        # Layers of which as much is trained are alike.
        made: dict[Any, tuple[tuple[Step, ...], bool]] = {}
        for index in range(self.shape.num_layers):
            prefix = f"{self.shape.layers_name}.{index}."
            trained = [self.trained.linears.get(prefix + linear.name) for linear in self.shape.linears]
            named = ("*",) if self.job.method == "full" else others.get(index, ())
            key = (has_graph, named, *(each and _size_of(each) for each in trained))
            if key not in made:
                uses = {
                    linear.name: linear_use(self.sizes, linear, chosen)
                    for linear, chosen in zip(self.shape.linears, trained, strict=True)
                }
                steps, goes_on = layer_steps(self.sizes, uses, has_graph=has_graph, trained=named)
                made[key] = tuple(steps), goes_on
            found, goes_on = made[key]
            yield Layer(index=index, steps=found, has_graph=has_graph)
            has_graph = goes_on

    def _others(self) -> dict[int, tuple[str, ...]]:
        """Trained parameters within layers that no linear has, by layer."""
        found: dict[int, list[str]] = {}
        prefix = f"{self.shape.layers_name}."
        for name in self.trained.others:
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                found.setdefault(int(number), []).append(rest)
        return {index: tuple(names) for index, names in found.items()}

    # -- what is kept

    def outer(self) -> Held:
        """What is kept outside of the layers' own steps, from the embedding on, while anything of the graph is left."""
        sizes, held = self.sizes, Held()
        masks = 0
        if self.checkpoints and sizes.has_mask:
            # The layers' arguments: bool for torch's kernels, numbers for eager attention.
            masks = sizes.positions_squared * (sizes.element if sizes.attention == "eager" else 1)
        held.add({POSITIONS: (sizes.position_embeddings if self.keeps_positions else 0) + masks})
        if self.trains_embedding:
            held.add({POSITIONS: 8 * sizes.tokens})
        return held

    def ends(self) -> Held:
        """What the last norm and the head keep."""
        sizes, held = self.sizes, Held()
        if self.has_graph:
            wide = 4 * sizes.tokens * self.shape.hidden_size
            is_trained = self.trains("norm", "ln_f")
            own = sizes.stream + 8 * sizes.tokens if self.shape.norm == "layer" else wide + 4 * sizes.tokens
            held.add({NORMS: own + (sizes.stream if is_trained and self.shape.norm == "rms" else 0)})
        if self.chunk is None and (self.trains_head or (sizes.keeps_inputs and self.has_graph)):
            held.add({"for trained parts": self.job.logit_rows * self.shape.hidden_size * sizes.element})
        return held

    def kept(self, layer: Layer) -> dict[str, int]:
        """What a layer leaves behind in forward."""
        if self.checkpoints:
            # Below the lowest trained layer there is nothing to be repeated.
            return {INPUTS: self.sizes.stream} if layer.is_reached else {}
        if id(layer.steps) not in self._kept:
            found = Held()
            for step in layer.steps:
                found.add(step.kept)
            self._kept[id(layer.steps)] = found.of
        return self._kept[id(layer.steps)]

    def below(self, index: int) -> Held:
        """What is kept when forward comes to a layer, or when backward has left the one above."""
        held = self.outer()
        for layer in self.layers[:index]:
            held.add(self.kept(layer))
        return held

    # -- what variables of the model hold

    def masks(self) -> int:
        """Masks that all layers of forward share."""
        sizes = self.sizes
        if not sizes.has_mask or self.checkpoints:
            return 0
        return sizes.positions_squared * (sizes.element if sizes.attention == "eager" else 1)

    def embedded(self) -> int:
        """The embedding's output, which a variable holds until the model returns, where nothing keeps it."""
        is_repeated = self.checkpoints and self.layers[0].is_reached
        is_kept = is_repeated or (self.trains_embedding and keeps_stream(self.sizes))
        return 0 if is_kept and not self.shape.has_embedding_norm else self.sizes.stream

    def waiting(self) -> int:
        """What there is in backward while a layer is repeated, without its input, which forward counts as well."""
        sizes, outputs = self.sizes, self.shape.reading("mlp_output")
        waits = 0 if not keeps_stream(sizes) else sizes.stream
        targets, wide = self.job.lora_targets, self.job.trained_bytes
        if self.job.method in ("lora", "dora") and any(each.name.rpartition(".")[2] in targets for each in outputs):
            # The gradient has been scaled by then, in the dtype of the adapter; DoRA's unscaled one is still there.
            copies = 2 if self.job.method == "dora" else 1
            waits += sizes.stream + (copies * sizes.stream // sizes.element * wide if wide > sizes.element else 0)
        return waits


def _size_of(trained: TrainedLinear) -> tuple[Any, ...]:
    """What of a linear's selection its memory follows from."""
    return (
        trained.block_shape, trained.num_blocks, trained.num_strips, trained.num_rows, trained.num_columns,
        trained.keeps_input,
    )  # fmt: skip
