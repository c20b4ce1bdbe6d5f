"""At which moments of forward and backward may a rank hold most, and what of it are activations?

A pass is: embedding, layers, norm, head and loss, and the same backwards. What layers keep grows in forward and shrinks
in backward, while gradients of what is trained grow; so the moments are the loss, the last layer, the first one that
is trained, and between them any that holds more than both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sparse_zero.memory.decoder_shape import DecoderShape
from sparse_zero.memory.job import MemoryJob
from sparse_zero.memory.layer_activations import NORMS, keeps_stream, layer_steps
from sparse_zero.memory.linear_activations import linear_use
from sparse_zero.memory.moments import Moment, Phase, Term
from sparse_zero.memory.steps import Sizes, Step
from sparse_zero.memory.trained import Trained

POSITIONS = "positions and masks"
INPUTS = "layer inputs"


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """What of one layer matters for the others."""

    index: int
    steps: tuple[Step, ...]
    # Whether its input requires grad.
    has_graph: bool

    @property
    def is_reached(self) -> bool:
        """Whether backward comes here."""
        return any(step.backward is not None for step in self.steps)


@dataclass(kw_only=True)
class _Held:
    """What is kept at a moment, by what it is."""

    of: dict[str, int] = field(default_factory=dict)

    def add(self, kept: Mapping[str, int]) -> None:
        for name, num_bytes in kept.items():
            self.of[name] = self.of.get(name, 0) + num_bytes

    def copy(self) -> _Held:
        return _Held(of=dict(self.of))

    def terms(self) -> tuple[Term, ...]:
        return tuple(
            Term(name=f"kept activations: {name}", kind="activations", num_bytes=num_bytes)
            for name, num_bytes in self.of.items()
            if num_bytes
        )

    @property
    def num_bytes(self) -> int:
        return sum(self.of.values())


class _Pass:
    """One forward and backward pass of a job."""

    def __init__(self, shape: DecoderShape, job: MemoryJob, trained: Trained) -> None:
        self.shape, self.job, self.trained = shape, job, trained
        self.sizes = Sizes(shape=shape, job=job, tokens=job.tokens)
        self.checkpoints = job.gradient_checkpointing
        self.trains_embedding = self._trains("embed", "word_embeddings")
        self.trains_head = job.method == "full" or (not shape.tied and self._trains("lm_head", "embed_out"))
        # Checkpointing makes the embedding's output require grad.
        self.starts_with_graph = self.checkpoints or self.trains_embedding
        self.layers = tuple(self._layers())
        self.has_graph = self.starts_with_graph or any(layer.is_reached for layer in self.layers)

    def _trains(self, *parts: str) -> bool:
        if self.job.method == "full":
            return True
        return any(
            part in name and not name.startswith(self.shape.layers_name)
            for name in self.trained.others
            for part in parts
        )

    def _layers(self) -> Iterator[_Layer]:
        has_graph, others = self.starts_with_graph, self._others()
        for index in range(self.shape.num_layers):
            prefix = f"{self.shape.layers_name}.{index}."
            uses = {
                linear.name: linear_use(self.sizes, linear, self.trained.linears.get(prefix + linear.name))
                for linear in self.shape.linears
            }
            named = ("*",) if self.job.method == "full" else others.get(index, ())
            steps, goes_on = layer_steps(self.sizes, uses, has_graph=has_graph, trained=named)
            yield _Layer(index=index, steps=tuple(steps), has_graph=has_graph)
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

    def outer(self) -> _Held:
        """What is kept outside of the layers' own steps, from the embedding on, while anything of the graph is left."""
        sizes, held = self.sizes, _Held()
        masks = 0
        if self.checkpoints and sizes.has_mask:
            # The layers' arguments: bool for torch's kernels, numbers for eager attention.
            masks = sizes.positions_squared * (sizes.element if sizes.attention == "eager" else 1)
        held.add({POSITIONS: sizes.position_embeddings + masks})
        if self.trains_embedding:
            held.add({POSITIONS: 8 * sizes.tokens})
        return held

    def ends(self) -> _Held:
        """What the last norm and the head keep."""
        sizes, held = self.sizes, _Held()
        if self.has_graph:
            wide = 4 * sizes.tokens * self.shape.hidden_size
            is_trained = self._trains("norm", "ln_f")
            own = sizes.stream + 8 * sizes.tokens if self.shape.norm == "layer" else wide + 4 * sizes.tokens
            held.add({NORMS: own + (sizes.stream if is_trained and self.shape.norm == "rms" else 0)})
        if self.trains_head:
            held.add({"for trained parts": self.job.logit_rows * self.shape.hidden_size * sizes.element})
        return held

    def kept(self, layer: _Layer) -> dict[str, int]:
        """What a layer leaves behind in forward."""
        if self.checkpoints:
            return {INPUTS: self.sizes.stream}
        found = _Held()
        for step in layer.steps:
            found.add(step.kept)
        return found.of

    def below(self, index: int) -> _Held:
        """What is kept when forward comes to a layer, or when backward has left the one above."""
        held = self.outer()
        for layer in self.layers[:index]:
            held.add(self.kept(layer))
        return held

    # -- forward

    def forward(self) -> Iterator[Moment]:
        """The moments of forward."""
        sizes, shape, last = self.sizes, self.shape, self.layers[-1]
        batch = 3 * 8 * sizes.tokens
        shared = self._masks() + batch + self._embedded()
        held = self.below(last.index)
        best: dict[str, tuple[int, _Held, int]] = {}
        for step in last.steps:
            if not self.checkpoints:
                held.add(step.kept)
            # A checkpointed layer's input is what a step alone counts as held.
            extra = step.alone if self.checkpoints else step.forward
            total = held.num_bytes + extra
            if step.name not in best or total > best[step.name][0]:
                best[step.name] = (total, held.copy(), extra)
        for name, (_, kept, extra) in best.items():
            yield self._moment("forward", last.index, name, kept.terms(), extra + shared)
        held = self.below(shape.num_layers)
        own = self.ends()
        held.add({NORMS: own.of.get(NORMS, 0)})
        is_kept = self.has_graph and keeps_stream(sizes)
        is_low_rms = shape.norm == "rms" and sizes.is_low and not self._trains("norm", "ln_f")
        norm = (0 if is_kept else sizes.stream) + sizes.stream * (1 + is_low_rms)
        norm += 4 * sizes.tokens * shape.hidden_size if shape.norm == "rms" else 0
        yield self._moment("forward", None, "norm", held.terms(), norm + shared)
        held = self.below(shape.num_layers)
        held.add(own.of)
        logits = self.job.logit_rows * shape.vocab_size
        numbers = logits * (8 + (sizes.element if sizes.is_low else 0))
        yield Moment(
            phase="forward",
            name="loss",
            terms=(
                *held.terms(),
                Term(name="logits and loss", kind="logits", num_bytes=numbers + batch),
            ),
        )

    def _masks(self) -> int:
        """Masks that all layers of forward share."""
        sizes = self.sizes
        if not sizes.has_mask or self.checkpoints:
            return 0
        return sizes.positions_squared * (sizes.element if sizes.attention == "eager" else 1)

    def _embedded(self) -> int:
        """The embedding's output, which a variable holds until the model returns, where nothing keeps it."""
        is_kept = self.checkpoints or (self.starts_with_graph and keeps_stream(self.sizes))
        return 0 if is_kept and not self.shape.has_embedding_norm else self.sizes.stream

    # -- backward

    def backward(self) -> Iterator[Moment]:
        """The moments of backward."""
        sizes, shape = self.sizes, self.shape
        held = self.below(shape.num_layers)
        held.add(self.ends().of)
        logits = self.job.logit_rows * shape.vocab_size
        # The softmax is kept from forward; its gradient, and that of what the loss reads.
        yield Moment(
            phase="backward",
            name="loss",
            terms=(
                *held.terms(),
                Term(name="logits and loss", kind="logits", num_bytes=4 * logits),
                Term(name="gradients of the logits", kind="temporaries", num_bytes=8 * logits),
            ),
        )
        if not self.has_graph and not self.trains_head:
            return
        head = logits * sizes.element + self.job.logit_rows * shape.hidden_size * sizes.element
        if self.trains_head or (shape.tied and self.trains_embedding):
            head += shape.vocab_size * shape.hidden_size * sizes.element
        yield self._moment("backward", None, "head", held.terms(), head)
        wide = 4 * sizes.tokens * shape.hidden_size
        norm = 2 * sizes.stream
        if shape.norm == "rms":
            norm = 5 * wide - (sizes.stream if self._trains("norm", "ln_f") else 0)
        yield self._moment("backward", None, "norm", held.terms(), norm)
        yield from self._layers_backward()
        if self.trains_embedding:
            dense = shape.vocab_size * shape.hidden_size * sizes.element
            yield self._moment("backward", None, "embedding", self.outer().terms(), dense + sizes.stream)

    def _layers_backward(self) -> Iterator[Moment]:
        reached = [layer for layer in self.layers if layer.is_reached]
        if not reached:
            return
        above = self._entries_above()
        ends = {reached[0].index, reached[-1].index}
        held = self.outer()
        most: dict[int, tuple[int, list[Moment]]] = {}
        for layer in self.layers:
            if layer.is_reached:
                moments = list(self._layer_backward(layer, held))
                top = max(moment.num_bytes() for moment in moments)
                most[layer.index] = (top + above[layer.index] * self.sizes.element, moments)
            held.add(self.kept(layer))
        bar = max(most[index][0] for index in ends)
        for index, (top, moments) in most.items():
            if index in ends:
                yield from moments
            elif top > bar:
                yield max(moments, key=lambda moment: moment.num_bytes())

    def _entries_above(self) -> dict[int, int]:
        """Trained entries whose gradients are there when backward has gone through a layer."""
        found: dict[int, int] = dict.fromkeys(range(-1, self.shape.num_layers + 1), 0)
        for tensor in self.trained.tensors():
            found[tensor.layer] = found.get(tensor.layer, 0) + tensor.numel
        total = 0
        for index in sorted(found, reverse=True):
            total += found[index]
            found[index] = total
        return found

    def _layer_backward(self, layer: _Layer, below: _Held) -> Iterator[Moment]:
        """The most of each module of a layer; of checkpointed ones, whose steps are repeated, with what that makes."""
        held, made = below.copy(), 0
        if self.checkpoints:
            held.add({INPUTS: self.sizes.stream})
            # What a norm keeps of the stream is the kept input itself.
            made = -self.sizes.stream if keeps_stream(self.sizes) and layer.has_graph else 0
        best: dict[str, tuple[int, _Held, int, int]] = {}
        for step in layer.steps:
            if self.checkpoints:
                made += step.kept_bytes
            else:
                held.add(step.kept)
            if step.backward is None:
                continue
            extra = step.backward
            if self.checkpoints:
                # Repeated, the step takes what it took in forward, beside the gradient that waits.
                extra = max(extra, step.forward + self._waiting())
            total = held.num_bytes + made + extra
            if step.name not in best or total > best[step.name][0]:
                best[step.name] = (total, held.copy(), made, extra)
        for name, (_, kept, repeated, extra) in best.items():
            terms = kept.terms()
            if repeated > 0:
                terms += (Term(name="recomputed activations", kind="temporaries", num_bytes=repeated),)
            yield self._moment("backward", layer.index, name, terms, extra)

    def _waiting(self) -> int:
        """What there is in backward while a layer is repeated, without its input, which forward counts as well."""
        sizes, outputs = self.sizes, self.shape.reading("mlp_output")
        waits = 0 if not keeps_stream(sizes) else sizes.stream
        targets, wide = self.job.lora_targets, self.job.trained_bytes
        if self.job.method in ("lora", "dora") and any(each.name.rpartition(".")[2] in targets for each in outputs):
            # The gradient has been scaled by then, in the dtype of the adapter.
            waits += sizes.stream if wide == sizes.element else sizes.stream + 2 * sizes.stream // sizes.element * wide
        return waits

    def _moment(self, phase: Phase, layer: int | None, name: str, terms: tuple[Term, ...], extra: int) -> Moment:
        what = "gradients on their way" if phase == "backward" else "outputs on their way"
        where = name if layer is None else f"layer {layer}, {name}"
        return Moment(
            phase=phase,
            name=where,
            terms=(*terms, Term(name=what, kind="temporaries", num_bytes=extra)),
            module="" if layer is None else f"{self.shape.layers_name}.{layer}.{name}",
        )


def activation_moments(shape: DecoderShape, job: MemoryJob, trained: Trained) -> list[Moment]:
    """The moments of forward and backward at which most may be held, without the states.

    Names are "loss", "head", "norm" and "embedding", and "layer 31, mlp.down_proj" for a module of a layer, whose full
    name is :attr:`~sparse_zero.memory.moments.Moment.module`.
    """
    found = _Pass(shape, job, trained)
    return [*found.forward(), *found.backward()]
