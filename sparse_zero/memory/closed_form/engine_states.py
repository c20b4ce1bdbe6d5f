"""What is held when a model has been loaded and an engine made of it, and on the way there?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparse_zero.memory.closed_form.base_weights import BaseTensor, constant_bytes
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import Moment, Term
from sparse_zero.memory.closed_form.partitions import Partition
from sparse_zero.memory.closed_form.reduction import Reduction
from sparse_zero.memory.closed_form.step_states import optimizer_terms, written_back
from sparse_zero.memory.closed_form.trained import Trained, base_tensors
from sparse_zero.memory.simulation.timeline import Kind, Place

# Buffers through which DeepSpeed reads and writes parameters on a disk: how many, and entries of each (config
# offload_param: buffer_count, buffer_size).
_SWAP_BUFFERS, _SWAP_ENTRIES = 5, 100_000_000


def base_terms(base: Sequence[BaseTensor], job: MemoryJob) -> list[Term]:
    """The frozen weights between two steps: whole, or in shards."""
    constants = Term(name="constants of codes", kind="weights", num_bytes=constant_bytes(base))
    if job.stage < 3:
        whole = sum(each.num_bytes for each in base)
        return [Term(name="base weights", kind="weights", num_bytes=whole), constants]
    shards = sum(job.share(each.numel) * each.itemsize for each in base)
    place: Place = "device" if job.offload_base == "none" else "host"
    kept = 0 if job.offload_base == "nvme" else shards
    terms = [Term(name="base weights (shards)", kind="weights", num_bytes=kept, place=place)]
    if job.offload_base == "nvme":
        swap = _SWAP_BUFFERS * _SWAP_ENTRIES * job.element_bytes
        terms.append(Term(name="buffers of the disk", kind="weights", num_bytes=swap, place=place))
    return [*terms, constants]


def index_terms(trained: Trained, job: MemoryJob) -> list[Term]:
    """Where the values lie, int64; inplace at stage 3 also which of them lie in this rank's shards, two int32 for each.

    Their count there is the share that shards have of random regions. The host keeps the base's entries under them.
    """
    if job.method != "selection":
        return []
    indices = 8 * sum(each.index_entries for each in trained.tensors())
    in_shards = 0
    if job.stage == 3 and job.placement == "inplace":
        in_shards = 4 * job.share(trained.num_parameters)
    # Which places they are lies beside the shards.
    place: Place = "device" if job.offload_base == "none" else "host"
    originals = trained.num_parameters * job.element_bytes
    return [
        Term(name="selection indices", kind="indices", num_bytes=indices),
        Term(name="which values lie in the shards", kind="indices", num_bytes=in_shards),
        Term(name="where in the shards they lie", kind="indices", num_bytes=in_shards, place=place),
        Term(name="the base's entries under the values", kind="values", num_bytes=originals, place="host"),
    ]


def value_terms(trained: Trained, job: MemoryJob, partitions: Sequence[Partition]) -> list[Term]:
    if job.stage == 0:
        entries = trained.num_parameters
    else:
        entries = sum(each.own if job.stage == 3 else each.whole for each in partitions)
    place: Place = "host" if job.stage == 3 and job.offload_base != "none" else "device"
    return [Term(name="values", kind="values", num_bytes=entries * job.trained_bytes, place=place)]


def load_moments(
    shape: DecoderShape, base: Sequence[BaseTensor], trained: Trained, job: MemoryJob, terms: Sequence[Term]
) -> list[Moment]:
    """The base and what is to be trained, before there is an engine.

    Values are whole until the engine deals them out. At stage 3 the model's own weights are read one at a time, into
    memory for all of it that is freed when this rank's shard is cut out (``compat.new_shards``), but for a quantized
    base, which is loaded whole. PEFT makes adapters in fp32 (``autocast_adapter_dtype``).
    """
    size = 4 if job.method in ("lora", "dora") else job.element_bytes
    entries = trained.num_parameters
    reads_shards = job.stage == 3 and job.quantization == "none"
    if job.method == "full" and reads_shards:
        entries = sum(job.share(each.numel) for each in trained.tensors())
    others = [term for term in terms if term.name == "selection indices" or term.place == "host"]
    values = Term(name="values", kind="values", num_bytes=size * entries)
    if reads_shards or job.stage < 3:
        weights = [term for term in terms if term.kind == "weights" and term.place == "device"]
    else:
        whole = sum(each.num_bytes for each in base)
        weights = [Term(name="base weights", kind="weights", num_bytes=whole)]
        weights += [term for term in terms if term.name == "constants of codes"]
    found = [Moment(phase="load", name="end", terms=(*weights, values, *others))]
    if reads_shards:
        found.append(_reading_shards(shape, trained, job, size, tuple(others)))
    return found


def _reading_shards(
    shape: DecoderShape, trained: Trained, job: MemoryJob, size: int, others: tuple[Term, ...]
) -> Moment:
    """When, in the order of the model, shards and values so far and the weight that is being read are most."""
    beside = [0] * (shape.num_layers + 2)
    if job.method != "full":
        for each in trained.tensors():
            beside[each.layer + 1] += size * each.numel
    shards, most, at_most = 0, -1, (0, 0, 0)
    for _, numel, layer, _ in base_tensors(shape):
        values = sum(beside[: layer + 1])
        # The whole is freed when its shard has been filled.
        shards += job.share(numel) * job.element_bytes
        if shards + values + numel * job.element_bytes > most:
            most = shards + values + numel * job.element_bytes
            at_most = (shards, values, numel * job.element_bytes)
    kind: Kind = "values" if job.method == "full" else "weights"
    terms = (
        Term(name="base weights (shards)", kind=kind, num_bytes=at_most[0] if job.offload_base == "none" else 0),
        Term(name="values", kind="values", num_bytes=at_most[1]),
        Term(name="weight that is read", kind="temporaries", num_bytes=at_most[2]),
    )
    return Moment(phase="load", name="reading a weight", terms=(*terms, *others))


def engine_moments(
    loaded: Moment,
    job: MemoryJob,
    trained: Trained,
    partitions: Sequence[Partition],
    terms: Sequence[Term],
    reduction: Reduction,
) -> list[Moment]:
    """While DeepSpeed makes its engine; the moments are not there before the first step.

    ``stage_1_and_2.py: __init__`` lays each group flat beside the original parameters, and makes gradients of zero for
    a moment (``initialize_optimizer_states``), as ``stage3.py`` does with masters that it makes by way of a copy;
    ``fp16/unfused_optimizer.py`` takes a step with gradients of zero, whose moments this package drops.
    """
    size, own = job.element_bytes, sum(each.own for each in partitions)
    count = trained.num_parameters
    optimizer = optimizer_terms(job, trained, partitions)
    masters = [term for term in optimizer if term.name == "masters"]
    others = [term for term in terms if term.kind != "values" or term.place == "host"]
    place: Place = "device" if job.offload_optimizer == "none" else "host"

    def moment(name: str, *extra: Term) -> Moment:
        return Moment(phase="engine", name=name, terms=(*terms, *extra))

    begin = replace(loaded, phase="engine", name="begin")
    if job.stage == 0:
        if job.precision == "fp32":
            return [begin, moment("end")]
        zeros = Term(name="gradients of zero", kind="temporaries", num_bytes=(4 + size) * count)
        return [begin, moment("first step", *optimizer, zeros)]
    zeros = Term(name="gradients of zero", kind="temporaries", num_bytes=4 * own, place=place)
    found = [begin, moment("gradients of zero", *masters, zeros)]
    if job.stage < 3:
        flat, left, masters_made, most = 0, count, 0, 0
        for group, partition in zip(trained.groups, partitions, strict=True):
            most = max(most, size * (flat + left + partition.whole) + masters_made)
            flat, left = flat + partition.whole, left - sum(each.numel for each in group)
            masters_made += 4 * partition.own if place == "device" else 0
        values = Term(name="values, and laid flat", kind="values", num_bytes=most)
        found.append(Moment(phase="engine", name="laying values flat", terms=(*others, values)))
        return found
    if size < 4:
        copied = Term(name="copy of the masters", kind="temporaries", num_bytes=4 * own, place=place)
        found.append(moment("masters", *masters, copied))
    end = (*masters, *reduction.before_backward())
    # One after the other is gathered, to be given what rank 0 has.
    largest = 0 if job.world_size == 1 else size * max((each.numel for each in trained.tensors()), default=0)
    gathered = Term(name="gathered values", kind="gathered", num_bytes=largest)
    return [
        *found,
        moment("sending values", *end, gathered),
        moment("end", *end, *written_back(job, trained, partitions)),
    ]
