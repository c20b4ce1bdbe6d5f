"""What does calibration hold: a forward and a backward pass, what is observed of them, and the base?

With frozen weights (:mod:`sparse_zero.selection.observers`), a linear whose region sums are scored keeps sums over
strips of its input; one whose gradient is scored, or whose columns are, keeps the input itself, and forms the gradient
of one weight at a time. Accumulators lie on the host. With ``weights: full``
(:mod:`sparse_zero.selection.full_calibration`) it is full fine-tuning, with gradients in fp32, and the ranks together
keep one copy of the weights on their hosts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sparse_zero.memory.closed_form.activations import activation_moments
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape, LinearShape
from sparse_zero.memory.closed_form.job import CalibrationJob, MemoryJob
from sparse_zero.memory.closed_form.moments import Moment, Term
from sparse_zero.memory.closed_form.states import held_states
from sparse_zero.memory.closed_form.trained import Trained, TrainedLinear, TrainedTensor, base_tensors, trained_of
from sparse_zero.selection.candidates import expand_braces, lowest_candidate
from sparse_zero.selection.config import Kind, RegionConfig
from sparse_zero.selection.scores import resolve_score
from sparse_zero.zero.config import Offload

_ALL = (RegionConfig(kind="block", modules=("*",), block_size=256),)
# Features that are summed where no blocks say how many, and entries that travel at once when accumulators are added up;
# see sparse_zero.selection.observers and .accumulators.
_STRIP, _PIECE_ENTRIES = 64, 2**22
# Of full fine-tuning, beside gradients: what is in their dtype.
_WIDE = ("copy of the bucket", "reduction bucket")


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """One linear of one layer, and what is read of it."""

    linear: LinearShape
    layer: int
    # What the rules of each kind need.
    needs: Mapping[Kind, frozenset[str]]
    # Height and width of its blocks, if it has any.
    block_shape: tuple[int, int] | None

    @property
    def all_needs(self) -> frozenset[str]:
        """Of all kinds."""
        return frozenset().union(*self.needs.values())

    @property
    def keeps_input(self) -> bool:
        """Whether backward reads the whole input."""
        return "gradient" in self.all_needs or "gradient_sums" in self.needs.get("column", ())

    def kept_per_token(self) -> dict[str, int]:
        """Bytes of the sums over the input that backward reads, by what they are; siblings share them."""
        found = {}
        if self.block_shape is not None and "gradient_sums" in self.needs["block"]:
            # fp32 for each strip.
            found[f"strips of {self.block_shape[1]}"] = 4 * math.ceil(self.linear.in_features / self.block_shape[1])
        if "gradient_sums" in self.needs.get("row", ()):
            found["totals"] = 8
        return found

    def backward_bytes(self, tokens: int, element: int, *, per_step: bool) -> int:
        """Bytes that are there for a moment when the gradient of the output has come."""
        height, width = self.block_shape or (_STRIP, _STRIP)
        rows, columns = self.linear.out_features, self.linear.in_features
        most = 0
        if any("gradient_sums" in needs for needs in self.needs.values()):
            # Sums of the output's gradient in fp32 and fp64, and of the input in fp64.
            most = tokens * (12 * math.ceil(rows / height) + 8 * math.ceil(columns / width))
        if "gradient" in self.all_needs:
            # The gradient; scored at once also its magnitudes, and their sums over strips of columns.
            scored = rows * columns * element + 8 * rows * math.ceil(columns / width)
            most = max(most, rows * columns * element + (scored if per_step else 0))
        return most


def _block_shape(region: RegionConfig, linear: LinearShape) -> tuple[int, int] | None:
    if region.kind != "block":
        return None
    if region.blocks_per_side is not None:
        return tuple(  # type: ignore[return-value]
            math.ceil(side / region.blocks_per_side) for side in (linear.out_features, linear.in_features)
        )
    assert region.block_size is not None
    return region.block_size, region.block_size


def _observed(shape: DecoderShape, calibration: CalibrationJob) -> list[_Observed]:
    """All linears of layers that calibration reads something of, in the order of the model."""
    regions = [each for each in calibration.regions or _ALL if each.kind != "whole"]
    found: dict[str, tuple[dict[Kind, frozenset[str]], tuple[int, int] | None]] = {}
    linears = {
        f"{shape.layers_name}.{index}.{linear.name}": (index, linear)
        for index in range(shape.num_layers)
        for linear in shape.linears
    }
    for region in regions:
        rule = resolve_score(region.score or calibration.score)
        low, high = (
            default if bound is None else bound % shape.num_layers
            for bound, default in ((region.min_layer, 0), (region.max_layer, shape.num_layers - 1))
        )
        low = max(low, lowest_candidate(calibration.min_depth, shape.num_layers))
        # Patterns may name heads and experts besides, which are not counted.
        patterns = [alternative for pattern in region.modules for alternative in expand_braces(pattern)]
        for name in linears:
            matches = any(fnmatchcase(name, pattern) for pattern in patterns)
            if not matches or not low <= linears[name][0] <= high or not rule.needs_data:
                continue
            needs, block_shape = found.get(name, ({}, None))
            found[name] = ({**needs, region.kind: rule.needs}, _block_shape(region, linears[name][1]) or block_shape)
    return [
        _Observed(linear=linear, layer=layer, needs=found[name][0], block_shape=found[name][1])
        for name, (layer, linear) in linears.items()
        if name in found
    ]


def _as_trained(shape: DecoderShape, job: MemoryJob, observed: Sequence[_Observed], *, per_step: bool) -> Trained:
    """What backward is computed for, in the terms of :mod:`~sparse_zero.memory.closed_form.activations`; nothing is."""
    linears: dict[str, TrainedLinear] = {}
    shared: set[tuple[int, str, str]] = set()
    for each in observed:
        kept = {
            what: num_bytes
            for what, num_bytes in each.kept_per_token().items()
            if (each.layer, each.linear.reads, what) not in shared
        }
        shared.update((each.layer, each.linear.reads, what) for what in kept)
        linears[f"{shape.layers_name}.{each.layer}.{each.linear.name}"] = TrainedLinear(
            entries={},
            keeps_input=each.keeps_input,
            kept_per_token=sum(kept.values()),
            backward_bytes=each.backward_bytes(job.tokens, job.element_bytes, per_step=per_step),
        )
    tensors = tuple(
        TrainedTensor(module=name, numel=0, layer=each.layer) for name, each in zip(linears, observed, strict=True)
    )
    return Trained(linears=linears, num_parameters=0, others={}, groups=(tensors,), kinds=("block",))


def _host_terms(job: MemoryJob, calibration: CalibrationJob, observed: Sequence[_Observed]) -> tuple[Term, ...]:
    """Accumulators, and what adds one of them up over the ranks; also where they are mapped from a disk."""
    sizes = [each.linear.out_features * each.linear.in_features for each in observed if "gradient" in each.all_needs]
    if calibration.accumulate == "per_step" or not sizes:
        return ()
    itemsize = 8 if calibration.accumulator_dtype == "float64" else 4
    travelling = 8 * min(max(sizes), _PIECE_ENTRIES) if job.world_size > 1 else 8 * max(sizes)
    return (
        Term(name="accumulators of gradients", kind="optimizer", num_bytes=itemsize * sum(sizes), place="host"),
        Term(name="sums of one weight", kind="temporaries", num_bytes=8 * max(sizes) + travelling, place="host"),
    )


def _frozen_moments(shape: DecoderShape, job: MemoryJob, calibration: CalibrationJob) -> Iterator[Moment]:
    observed = _observed(shape, calibration)
    needs_gradient = any({"gradient", "gradient_sums"} & each.all_needs for each in observed)
    own = replace(
        job,
        method="selection",
        micro_batch=calibration.micro_batch,
        label_positions=calibrated_positions(job, calibration),
        loss_chunk=calibration.loss_chunk,
        accumulation=1,
        offload_optimizer="none",
        # Without a gradient, forward keeps nothing.
        gradient_checkpointing=job.gradient_checkpointing and needs_gradient,
        calibration=None,
    )
    trained = _as_trained(
        shape, own, observed if needs_gradient else (), per_step=calibration.accumulate == "per_step"
    )  # fmt: skip
    held, host = held_states(shape, own, trained), _host_terms(job, calibration, observed)
    # What observers know of the tensor that was read last lives until another one is; else others keep it as well.
    is_last_extra = own.gradient_checkpointing and observed[-1].keeps_input
    last = own.tokens * observed[-1].linear.in_features * own.element_bytes if is_last_extra else 0
    cached = Term(name="input that was read last", kind="activations", num_bytes=last)
    wide = max((each.linear.in_features for each in observed if "input_norm" in each.all_needs), default=0)
    for moment in activation_moments(shape, own, trained):
        if moment.phase == "backward" and not needs_gradient:
            continue
        states = [each for each in held.during_training(moment) if each.kind in ("weights", "gathered")]
        name = moment.name if moment.phase in moment.name else f"{moment.phase}, {moment.name}"
        terms = (*states, *moment.terms, cached, *host)
        yield Moment(phase="calibration", name=name, terms=terms, module=moment.module)
        if wide and moment.phase == "forward" and moment.module:
            # A copy in fp32, and its squares.
            squares = Term(name="squares of inputs", kind="temporaries", num_bytes=8 * own.tokens * wide)
            yield Moment(phase="calibration", name=f"{name}, squares", terms=(*terms, squares), module=moment.module)


def calibrated_positions(job: MemoryJob, calibration: CalibrationJob) -> int | None:
    """Positions of a row with logits: as in training, but in rows that may be shorter."""
    if job.label_positions is None or job.batching != "pack":
        return job.label_positions
    return min(job.label_positions, calibration.micro_batch * job.length)


def _full_moments(shape: DecoderShape, job: MemoryJob, calibration: CalibrationJob) -> Iterator[Moment]:
    settings = calibration.full
    place: Offload = "cpu" if settings.offload else "none"
    own = replace(
        job,
        method="full",
        stage=settings.stage,
        micro_batch=calibration.micro_batch,
        label_positions=calibrated_positions(job, calibration),
        loss_chunk=calibration.loss_chunk,
        accumulation=max(1, settings.batches_per_step // job.world_size),
        optimizer="adamw",
        offload_optimizer=place,
        offload_base=place if settings.stage == 3 else "none",
        zero_options={},
        calibration=None,
    )
    trained = trained_of(shape, own, None, ())
    held = held_states(shape, own, trained)
    host = (
        Term(name="weights before calibration", kind="optimizer", num_bytes=_snapshot_bytes(shape, job), place="host"),
        *_host_terms(job, calibration, _observed(shape, calibration)),
    )
    moments = [each for each in held.moments if each.phase != "load"]
    moments += [
        replace(each, terms=(*held.during_training(each), *each.terms))
        for each in activation_moments(shape, own, trained)
    ]
    for moment in moments:
        terms = (*_in_fp32(shape, own, moment), *host)
        yield Moment(
            phase="calibration", name=f"{moment.phase}, {moment.name}", terms=terms, module=moment.module
        )  # fmt: skip


def _snapshot_bytes(shape: DecoderShape, job: MemoryJob) -> int:
    """Of the weights that the first rank keeps: each goes to the rank that has least."""
    loads = [0] * job.world_size
    for _, numel, *_ in base_tensors(shape):
        loads[loads.index(min(loads))] += numel
    return loads[0] * job.element_bytes


def _in_fp32(shape: DecoderShape, job: MemoryJob, moment: Moment) -> Iterator[Term]:
    """The terms of a moment with gradients that are kept, sent and summed in fp32, instead of in the weights' dtype."""
    wider, has_gradients = 4 // job.element_bytes, False
    for term in moment.terms:
        is_wide = term.place == "device" and (
            term.name in _WIDE or (term.kind == "gradients" and "passing" not in term.name)
        )
        has_gradients = has_gradients or (is_wide and term.num_bytes > 0)
        if term.name == "flat gradients":
            # In the weights' dtype and in fp32, without this: twice in fp32.
            yield replace(term, num_bytes=term.num_bytes * 8 // (4 + job.element_bytes))
        else:
            yield replace(term, num_bytes=term.num_bytes * wider) if is_wide else term
    if not has_gradients or job.element_bytes == 4 or moment.phase == "step":
        return
    if job.stage == 2:
        own = 4 * job.share(shape.num_parameters)
        yield Term(name="own share of gradients", kind="gradients", num_bytes=own)
    elif job.offload_optimizer != "none":
        # Added up on the device: what was there, what comes, and their sum.
        largest = max(numel for _, numel, *_ in base_tensors(shape))
        yield Term(name="gradient in passing", kind="gradients", num_bytes=12 * job.share(largest))


def calibration_moments(shape: DecoderShape, job: MemoryJob) -> list[Moment]:
    """The moments of calibration at which a rank may hold most, with the states; none without calibration.

    Args:
        shape: of the model.
        job: of the run; its calibration is read.

    Raises:
        InputError: patterns or scores do not fit the model.
    """
    if job.calibration is None:
        return []
    of = _full_moments if job.calibration.weights == "full" else _frozen_moments
    return list(of(shape, job, job.calibration))
