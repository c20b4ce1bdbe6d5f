"""What does a rank hold beside activations: the base, values, gradients, masters and moments, indices, buffers?

The sizes follow from DeepSpeed 0.19.8 and from this package, and each rule stands beside its source:

    base_weights      the base, dense or as codes           trained           what is trained
    partitions        what of it each rank has              optimizer_states  what an optimizer keeps
    reduction         gradients and their buffers           gathers           what stage 3 gathers, by module_order
    engine_states     loading, and making an engine         step_states       a step

``tests/sparse_zero/test_forecast_states.py`` holds them against simulations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_zero.memory.closed_form.base_weights import base_of
from sparse_zero.memory.closed_form.decoder_modules import decoder, layer_name, persistent_bytes
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.engine_states import (
    base_terms,
    engine_moments,
    index_terms,
    load_moments,
    value_terms,
)
from sparse_zero.memory.closed_form.gathers import Gathered, Limits, walk
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import Moment, Term
from sparse_zero.memory.closed_form.partitions import partitions_of, zero_sizes
from sparse_zero.memory.closed_form.reduction import Reduction, reduction_of
from sparse_zero.memory.closed_form.step_states import after_backward, optimizer_terms, step_moments
from sparse_zero.memory.closed_form.trained import Trained

# Where a moment lies in the order of forward: (layer, place within it); in backward, gradients of what is behind it are
# there.
_Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class HeldStates:
    """Terms of the states, and the moments of the phases without activations."""

    # Between two steps, gradients and gathered parameters left out.
    held: tuple[Term, ...]
    # load, engine, the end of backward and step.
    moments: tuple[Moment, ...]
    shape: DecoderShape
    reduction: Reduction
    # At stage 3: in any step, beside what stays gathered; in the first one, with all.
    gathered: Gathered
    gathered_first: tuple[Gathered, ...]
    # Bytes of the parameters that stay gathered from step to step, and of the hidden states between two layers.
    persistent: int
    stream: int
    # Where the gradients of what is trained come into being, and their bytes.
    formed: tuple[tuple[_Place, int], ...]

    def during_training(self, moment: Moment) -> tuple[Term, ...]:
        """What is held at a moment of forward or backward, beside its activations.

        Args:
            moment: of the phase "forward" or "backward": its module says where in the model that is, and without one
                its name, "head", "norm" or "embedding"; any other is the loss.
        """
        layer, _, name = moment.module.removeprefix(f"{self.shape.layers_name}.").partition(".")
        place = place_of(self.shape, int(layer), name) if moment.module else self._outside(moment.name)
        if moment.phase == "forward" or place is None:
            gradients = self.reduction.before_backward()
        else:
            gradients = self.reduction.in_backward(sum(num_bytes for at, num_bytes in self.formed if at > place))
        at_work = layer_name(int(layer), name) if moment.module else moment.name
        gathered = Term(name="gathered parameters", kind="gathered", num_bytes=self._gathered(moment, at_work))
        return (*self.held, *gradients, gathered)

    @property
    def between_steps(self) -> tuple[Term, ...]:
        """What is held when a step has ended and the next has not begun."""
        kept = self.reduction.at_step() if self.reduction.stage == 3 else ()
        return (*self.held, *kept, Term(name="gathered parameters", kind="gathered", num_bytes=self.persistent))

    def _outside(self, name: str) -> _Place | None:
        """Of what is in no layer; None: the loss, behind everything."""
        last = self.shape.num_layers
        return {"embedding": (-1, 0), "norm": (last, 0), "head": (last, 1)}.get(name)

    def _gathered(self, moment: Moment, at_work: str) -> int:
        """In any step; or in the first one, if that is more although there are no moments yet."""
        moments = sum(term.num_bytes for term in self.held if term.name == "moments" and term.place == "device")
        first = [self._in(each, moment, at_work) - moments for each in self.gathered_first]
        return max([self.persistent + self._in(self.gathered, moment, at_work), *first])

    def _in(self, found: Gathered, moment: Moment, at_work: str) -> int:
        """While a module computes, or, if that is more, before: then what it computes is not there yet.

        What it is given is: about as much as the hidden states.
        """
        if not found.forward:
            return 0
        held, copying = found.backward, found.copying
        if moment.phase == "forward":
            held, copying = found.forward, found.copying_forward
        elif moment.repeats and at_work in found.repeated:
            held, copying = found.repeated, found.copying_repeated
        if (moment.phase == "forward" or moment.repeats) and f"{at_work}.magnitude" in held:
            # DoRA's module adds up, and not the linear around it.
            at_work = f"{at_work}.magnitude"
        while at_work and at_work not in held:
            # An activation function, say, is a part of its MLP.
            at_work = at_work.rpartition(".")[0]
        if not at_work:
            return found.forward["end"]
        computed = sum(term.num_bytes for term in moment.terms if term.kind == "temporaries") - self.stream
        return max(held[at_work], copying[at_work] - max(computed, 0))


def place_of(shape: DecoderShape, layer: int, name: str) -> _Place:
    """Where a module of a layer lies in the order of forward.

    Args:
        shape: of the model.
        layer: from 0.
        name: of the module within its layer: a linear's; an attention's or MLP's, for what it computes before its last
            linear; or of what follows its first one.
    """
    linears = shape.linears
    for number, linear in enumerate(linears):
        if linear.name == name:
            return layer, 2 * number + 1
    for number, linear in enumerate(linears):
        block = linear.name.rpartition(".")[0]
        if (block == name and linear.reads.endswith("output")) or (
            name.startswith(f"{block}.")
            and linear.reads == "mlp_input"
            and number
            and linears[number - 1].reads == linear.reads
        ):
            return layer, 2 * number
    behind = next((number for number, linear in enumerate(linears) if linear.reads == "mlp_input"), len(linears))
    return layer, 2 * behind if "post" in name else 0


def _formed(shape: DecoderShape, trained: Trained, size: int) -> tuple[tuple[_Place, int], ...]:
    """Where gradients come into being; those of norms when a layer ends."""
    prefix = f"{shape.layers_name}."
    found: dict[_Place, int] = {}
    for each in trained.tensors():
        if each.module.startswith(prefix):
            at = place_of(shape, each.layer, each.module.removeprefix(prefix).partition(".")[2])
        else:
            at = (each.layer, 1 if each.layer == shape.num_layers and each.is_matrix else 0)
        found[at] = found.get(at, 0) + size * each.numel
    return tuple(found.items())


def _lowest_trained(shape: DecoderShape, trained: Trained) -> str | None:
    """The layer below which backward does not go; None: it goes through all."""
    lowest = min((each.layer for each in trained.tensors()), default=0)
    return None if lowest < 0 else layer_name(min(lowest, shape.num_layers - 1))


def held_states(shape: DecoderShape, job: MemoryJob, trained: Trained) -> HeldStates:
    """The states of a job."""
    base, partitions = base_of(shape, job), partitions_of(trained, job)
    sizes = zero_sizes(base, trained, job)
    threshold = sizes["param_persistence_threshold"]
    reduction = reduction_of(trained, job, partitions, sizes["reduce_bucket_size"])
    terms = [
        *base_terms(base, job),
        *value_terms(trained, job, partitions),
        *index_terms(trained, job),
    ]
    gathered, persistent = Gathered(), 0
    gathered_first: list[Gathered] = []
    if job.stage == 3:
        root = decoder(shape, base, trained, job, threshold)
        limits = Limits(
            prefetch=sizes["prefetch_bucket_size"],
            live=sizes["max_live_parameters"],
            reuse=sizes["max_reuse_distance"],
            from_host=job.offload_base != "none",
        )
        layers = (layer_name(number) for number in range(shape.num_layers))
        repeated = frozenset(layers) if job.gradient_checkpointing else frozenset()
        ends_at = _lowest_trained(shape, trained)
        gathered = walk(root, job.world_size, limits, repeated=repeated, ends_at=ends_at)
        persistent = persistent_bytes(root, job.world_size)
        # DeepSpeed learns the order in the first micro-batch, and gathers ahead from the second one on.
        if job.accumulation > 1:
            first = walk(root, job.world_size, limits, repeated=repeated, ends_at=ends_at, is_first_step=True)
            gathered_first.append(first)
        # Until then nothing arrives ahead: what one module reads, such as all experts, is gathered at once.
        if shape.num_experts:
            none = replace(limits, prefetch=0, reuse=0)
            first = walk(root, job.world_size, none, repeated=repeated, ends_at=ends_at, is_first_step=True)
            gathered_first.append(first)
    held = (*terms, *optimizer_terms(job, trained, partitions))
    loading = load_moments(shape, base, trained, job, terms)
    return HeldStates(
        held=held,
        moments=(
            *loading,
            *engine_moments(loading[0], job, trained, partitions, terms, reduction),
            after_backward(held, reduction, persistent + gathered.backward.get("end", 0)),
            *step_moments(job, trained, partitions, held, reduction, persistent, sizes.get("sub_group_size", 10**9)),
        ),
        shape=shape,
        reduction=reduction,
        gathered=gathered,
        gathered_first=tuple(gathered_first),
        persistent=persistent,
        stream=job.tokens * shape.hidden_size * job.element_bytes,
        formed=_formed(shape, trained, job.element_bytes),
    )
