"""At which moments of forward and backward may a rank hold most, and what of it are activations?

A pass is: embedding, layers, norm, head and loss, and the same backwards. What layers keep grows in forward and shrinks
in backward, while gradients of what is trained grow; so the moments are the loss, the last layer, the first one that
is trained, and between them any that holds more than both.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.kept_activations import INPUTS, Held, Layer, Pass
from sparse_zero.memory.closed_form.layer_activations import NORMS, keeps_stream
from sparse_zero.memory.closed_form.mlp_activations import GATHERED
from sparse_zero.memory.closed_form.moments import Moment, Phase, Term
from sparse_zero.memory.closed_form.partitions import zero_sizes
from sparse_zero.memory.closed_form.trained import Trained

# Layers before the last one that stage 3 may still hold, or have gathered ahead.
_LAYERS_AHEAD = 6


class _Moments(Pass):
    """The moments of a pass."""

    def forward(self) -> Iterator[Moment]:
        """The moments of forward."""
        sizes, shape, last = self.sizes, self.shape, self.layers[-1]
        batch = 3 * 8 * sizes.tokens
        shared = self.masks() + batch + self.embedded()
        shared += 0 if self.keeps_positions else sizes.position_embeddings
        yield from self._layer_forward(last, shared)
        if self.job.stage == 3:
            # What stage 3 has gathered ahead differs from layer to layer, and may be least in the last one.
            for layer in self.layers[-1 - _LAYERS_AHEAD : -1]:
                yield max(self._layer_forward(layer, shared), key=lambda moment: moment.num_bytes())
        held = self.below(shape.num_layers)
        own = self.ends()
        held.add({NORMS: own.of.get(NORMS, 0)})
        is_kept = self.has_graph and keeps_stream(sizes)
        is_low_rms = shape.norm == "rms" and sizes.is_low and not self.trains("norm", "ln_f")
        norm = (0 if is_kept else sizes.stream) + sizes.stream * (1 + is_low_rms)
        norm += 4 * sizes.tokens * shape.hidden_size if shape.norm == "rms" else 0
        yield self._moment("forward", None, "norm", held.terms(), norm + shared)
        held = self.below(shape.num_layers)
        held.add(own.of)
        if self.chunk is not None:
            yield self._chunk_forward(held, batch)
            return
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

    def backward(self) -> Iterator[Moment]:
        """The moments of backward."""
        sizes, shape = self.sizes, self.shape
        held = self.below(shape.num_layers)
        held.add(self.ends().of)
        if self.chunk is None:
            yield from self._loss_backward(held)
        else:
            # The gradients that forward has formed, times a factor: in fp32, and rounded; of what the head read first.
            read = self.job.logit_rows * shape.hidden_size if self.has_graph else 0
            rounded = sizes.element if sizes.is_low else 0
            wide = max(read * (8 if sizes.is_low else 4), read * sizes.element + self.num_of_head * (4 + rounded))
            yield self._moment("backward", None, "loss", (*held.terms(), self._chunk_kept()), wide)
        if not self.has_graph:
            return
        wide = 4 * sizes.tokens * shape.hidden_size
        norm = 2 * sizes.stream
        if shape.norm == "rms":
            norm = 5 * wide - (sizes.stream if self.trains("norm", "ln_f") else 0)
        held = self.below(shape.num_layers)
        held.add({NORMS: self.ends().of.get(NORMS, 0)})
        yield self._moment("backward", None, "norm", held.terms(), norm)
        yield from self._layers_backward()
        if self.trains_embedding:
            dense = shape.vocab_size * shape.hidden_size * sizes.element
            yield self._moment("backward", None, "embedding", self.outer().terms(), dense + sizes.stream)

    def _loss_backward(self, held: Held) -> Iterator[Moment]:
        """Of the logits at once."""
        sizes, shape = self.sizes, self.shape
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
        if self.job.method == "full" or (shape.tied and self.trains_embedding):
            head += shape.vocab_size * shape.hidden_size * sizes.element
        yield self._moment("backward", None, "head", held.terms(), head)

    def _chunk_kept(self) -> Term:
        """What a loss in chunks leaves behind: the gradients that it has formed."""
        read = self.job.logit_rows * self.shape.hidden_size * self.sizes.element if self.has_graph else 0
        return Term(name="gradients of the loss", kind="logits", num_bytes=read + 4 * self.num_of_head)

    @property
    def num_of_head(self) -> int:
        """Trained entries of the head; with those of the last norm, if it has any."""
        last = (tensor.numel for tensor in self.trained.tensors() if tensor.layer == self.shape.num_layers)
        return sum(last) if self.trains_head else 0

    def _chunk_forward(self, held: Held, batch: int) -> Moment:
        """The loss in chunks, within the head: beside it is what the model gives, and what of it the head reads."""
        sizes, shape, chunk = self.sizes, self.shape, self.chunk
        assert chunk is not None
        logits, hidden = chunk * shape.vocab_size, chunk * shape.hidden_size * sizes.element
        # The logits, and in fp32 their copy and logarithms of probabilities; then those, and their gradient.
        forms, learns = logits * (8 + (sizes.element if sizes.is_low else 0)), 0
        if self.has_graph or self.trains_head:
            learns = logits * 8 + (hidden if self.has_graph else 0)
        read = sizes.stream + self.job.logit_rows * shape.hidden_size * sizes.element
        return Moment(
            phase="forward",
            name="loss",
            terms=(
                *held.terms(),
                self._chunk_kept(),
                Term(name="logits of a chunk", kind="temporaries", num_bytes=max(forms, learns) + read + batch),
            ),
        )

    def _layer_forward(self, layer: Layer, shared: int) -> Iterator[Moment]:
        """The most of each module of a layer; ``shared`` bytes are held beside it."""
        held = self.below(layer.index)
        best: dict[str, tuple[int, Held, int]] = {}
        for step in layer.steps:
            if not self.checkpoints:
                held.add(step.kept)
            # A checkpointed layer's input is what a step alone counts as held.
            extra = step.forward if layer.is_reached and not self.checkpoints else step.alone
            total = held.num_bytes + extra - step.counted
            if step.name not in best or total > best[step.name][0]:
                best[step.name] = (total, held.copy(), extra)
                best[step.name][1].add({GATHERED: -step.counted})
        for name, (_, kept, extra) in best.items():
            yield self._moment("forward", layer.index, name, kept.terms(), extra + shared)

    def _layers_backward(self) -> Iterator[Moment]:
        reached = [layer for layer in self.layers if layer.is_reached]
        if not reached:
            return
        above = self._entries_above()
        first, last = reached[0].index, reached[-1].index
        # What is below each layer, and the most that it takes: of layers that are alike it is found once.
        below, own = self.outer().num_bytes, dict[int, int]()
        most: dict[int, int] = {}
        for layer in self.layers:
            if layer.is_reached:
                if id(layer.steps) not in own:
                    own[id(layer.steps)] = max(each[0] for each in self._tops(layer, Held()).values())
                most[layer.index] = below + own[id(layer.steps)] + above[layer.index] * self.sizes.element
            below += sum(self.kept(layer).values())
        bar = max(most[first], most[last])
        # Where ZeRO first reduces a full bucket, it makes room for all that this rank keeps of the gradients.
        bucket = zero_sizes((), self.trained, self.job)["reduce_bucket_size"]
        full = max((layer.index for layer in reached if above[layer.index] >= bucket), default=first)
        held = self.outer()
        for layer in self.layers:
            if layer.index in (first, last, full, full - 1) and layer.is_reached:
                yield from self._layer_backward(layer, held)
            elif most.get(layer.index, 0) > bar:
                yield max(self._layer_backward(layer, held), key=lambda moment: moment.num_bytes())
            held.add(self.kept(layer))

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

    def _tops(self, layer: Layer, below: Held) -> dict[tuple[str, bool], tuple[int, Held, int, int]]:
        """The most of each module of a layer, in its backward and where that repeats its forward.

        That is: in all, what is kept, what was repeated, and what dies at once.
        """
        held, made = below.copy(), 0
        if self.checkpoints:
            held.add({INPUTS: self.sizes.stream})
            # What a norm keeps of the stream is the kept input itself.
            made = -self.sizes.stream if keeps_stream(self.sizes) and layer.has_graph else 0
        best: dict[tuple[str, bool], tuple[int, Held, int, int]] = {}
        for step in layer.steps:
            if self.checkpoints:
                made += step.kept_bytes
            else:
                held.add(step.kept)
            if step.backward is None:
                continue
            extras = {False: step.backward}
            if self.checkpoints:
                # Repeated, the step takes what it took in forward, beside the gradient that waits.
                unrepeated = step.unrepeated if step is layer.steps[-1] else 0
                extras[True] = step.forward - unrepeated + self.waiting()
            for repeats, extra in extras.items():
                total, key = held.num_bytes + made + extra, (step.name, repeats)
                if key not in best or total > best[key][0]:
                    best[key] = (total, held.copy(), made, extra)
        return best

    def _layer_backward(self, layer: Layer, below: Held) -> Iterator[Moment]:
        """The most of each module of a layer; of checkpointed ones, whose steps are repeated, with what that makes."""
        for (name, repeats), (_, kept, repeated, extra) in self._tops(layer, below).items():
            terms = kept.terms()
            if repeated > 0:
                terms += (Term(name="recomputed activations", kind="temporaries", num_bytes=repeated),)
            yield self._moment("backward", layer.index, name, terms, extra, repeats=repeats)

    def _moment(
        self, phase: Phase, layer: int | None, name: str, terms: tuple[Term, ...], extra: int, *, repeats: bool = False
    ) -> Moment:
        what = "gradients on their way" if phase == "backward" else "outputs on their way"
        where = name if layer is None else f"layer {layer}, {name}"
        return Moment(
            phase=phase,
            name=where,
            terms=(*terms, Term(name=what, kind="temporaries", num_bytes=extra)),
            module="" if layer is None else f"{self.shape.layers_name}.{layer}.{name}",
            repeats=repeats,
        )


def activation_moments(shape: DecoderShape, job: MemoryJob, trained: Trained) -> list[Moment]:
    """The moments of forward and backward at which most may be held, without the states.

    Names are "loss", "head", "norm" and "embedding", and "layer 31, mlp.down_proj" for a module of a layer, whose full
    name is :attr:`~sparse_zero.memory.closed_form.moments.Moment.module`.
    """
    found = _Moments(shape, job, trained)
    return [*found.forward(), *found.backward()]
