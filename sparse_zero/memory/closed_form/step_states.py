"""What is held while gradients become a step: masters, moments, gradients in fp32, values on their way back?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import Moment, Term
from sparse_zero.memory.closed_form.optimizer_states import moments_bytes, step_bytes
from sparse_zero.memory.closed_form.partitions import Partition
from sparse_zero.memory.closed_form.reduction import Reduction
from sparse_zero.memory.closed_form.trained import Trained
from sparse_zero.memory.simulation.timeline import Place
from sparse_zero.zero.shards import BUCKET_ENTRIES


def optimizer_terms(job: MemoryJob, trained: Trained, partitions: Sequence[Partition]) -> list[Term]:
    """Masters and moments, of which offloading keeps the host's copies of gradients, too.

    fp32 at stage 0 steps the values themselves; every other engine has masters of its own, in fp32 as well
    (``stage_1_and_2.py``: ``single_partition_of_fp32_groups`` is a clone; ``stage3.py``: ``_create_fp32_partitions``).
    """
    place: Place = "device" if job.offload_optimizer == "none" else "host"
    own = sum(each.own for each in partitions)
    has_masters = job.stage > 0 or job.precision != "fp32"
    moments = 0
    for kind, group, partition in zip(trained.kinds, trained.groups, partitions, strict=True):
        sizes = [each.numel for each in group] if job.stage == 0 else [partition.own]
        moments += moments_bytes(job.optimizer, kind, sizes, on_host=place == "host")
    if job.offload_optimizer == "nvme":
        # On the disk; what passes through the host is read and written by sub-groups.
        return [Term(name="masters and moments in passing", kind="optimizer", num_bytes=4 * 4 * own, place="host")]
    found = [
        Term(name="masters", kind="optimizer", num_bytes=4 * own if has_masters else 0, place=place),
        Term(name="moments", kind="optimizer", num_bytes=moments, place=place),
    ]
    if place == "device":
        return found
    found.append(Term(name="gradients in fp32", kind="gradients", num_bytes=4 * own, place="host"))
    size = job.element_bytes
    if job.stage == 3:
        return [*found, Term(name="gradients", kind="gradients", num_bytes=size * own, place="host")]
    # Values on their way, and one parameter's gradient on either side (``temp_grad_buffer_for_cpu_offload``).
    largest = size * max((each.numel for each in trained.tensors()), default=0)
    return [
        *found,
        Term(name="values in passing", kind="values", num_bytes=size * own + largest, place="host"),
        Term(name="gradient in passing", kind="gradients", num_bytes=largest),
    ]


def written_back(job: MemoryJob, trained: Trained, partitions: Sequence[Partition]) -> tuple[Term, ...]:
    """At stage 3, what writing inplace values into the shards gathers (:mod:`sparse_zero.zero.shards`).

    This rank's parts as one, all ranks', one weight's values put together, and of those the own ones with their places.
    """
    if job.method != "selection" or job.placement != "inplace" or job.stage < 3:
        return ()
    size, ranks = job.element_bytes, job.world_size
    whole = min(sum(each.whole for each in partitions), BUCKET_ENTRIES)
    sizes = [job.share(each.numel) * ranks for each in trained.tensors()]
    # The next one is put together while the last one is still held.
    two = max(map(sum, itertools.pairwise(sizes)), default=sizes[0])
    copied = 0 if ranks == 1 else size * two
    places = 8 if job.offload_base == "none" else 0
    written = (0 if ranks == 1 else size * max(sizes)) + (places + size) * max(sizes) // ranks
    return (
        Term(name="gathered values", kind="gathered", num_bytes=size * (whole // ranks + whole)),
        Term(name="values of one weight", kind="temporaries", num_bytes=max(copied, written)),
    )


def after_backward(held: Sequence[Term], reduction: Reduction, persistent: int) -> Moment:
    """The end of backward, when what has not been reduced is."""
    kept = Term(name="gathered parameters", kind="gathered", num_bytes=persistent)
    return Moment(phase="backward", name="reducing gradients", terms=(*held, *reduction.at_end(), kept))


def step_moments(
    job: MemoryJob,
    trained: Trained,
    partitions: Sequence[Partition],
    held: Sequence[Term],
    reduction: Reduction,
    persistent: int,
    sub_group_size: int,
) -> list[Moment]:
    """The norm of the gradients, their flat copy in fp32, the optimizer, and the values' way back.

    Sources: ``stage_1_and_2.py: step``, ``stage3.py: step`` (one sub-group after the other),
    ``fp16/unfused_optimizer.py: step``, ``get_grad_norm_direct`` (in fp64), and
    :func:`sparse_zero.zero.engine.attach`, which at stage 0 looks for what is not finite.

    Args:
        job: the job.
        trained: what is stepped.
        partitions: of the optimizer's groups.
        held: between two steps.
        reduction: of the gradients.
        persistent: bytes of what stage 3 keeps gathered between two steps.
        sub_group_size: DeepSpeed's, in entries.
    """
    size, gradients = job.element_bytes, reduction.at_step()

    def moment(name: str, *extra: Term) -> Moment:
        return Moment(phase="step", name=name, terms=(*held, *extra))

    def temporary(name: str, num_bytes: int) -> Term:
        return Term(name=name, kind="temporaries", num_bytes=num_bytes)

    kept = Term(name="gathered parameters", kind="gathered", num_bytes=persistent)
    found = [moment("end", *(gradients if job.stage == 3 else ()), kept)]
    if reduction.accumulates and job.stage < 3:
        # A step that only counts micro-batches.
        found.append(moment("between micro-batches", *reduction.before_backward()))
    if job.offload_optimizer != "none":
        return [*found, moment("write-back", *gradients, *written_back(job, trained, partitions))]
    if job.stage == 0:
        if size < 4:
            copies = temporary("gradients in fp32", 4 * trained.num_parameters)
            return [*found, moment("gradients in fp32", *gradients, copies)]
        largest = max(each.numel for each in trained.tensors())
        # Magnitudes in fp32, and four masks of a byte; plain DeepSpeed has none of that.
        masks = temporary("what is finite", 9 * largest if job.method == "selection" else 0)
        return [*found, moment("what is finite", *gradients, masks)]
    norm = temporary("gradient in fp64", 8 * max(each.largest_piece for each in partitions))
    found.append(moment("norm", *gradients, norm))
    for number, (kind, each) in enumerate(zip(trained.kinds, partitions, strict=True)):
        own = min(each.own, sub_group_size + each.largest_piece) if job.stage == 3 else each.own
        flat = 0 if each.num_pieces == 1 and job.world_size == 1 else size * own
        wide = 4 * own if size < 4 else 0
        found.append(moment("gradients in fp32", *gradients, temporary("flat gradients", flat + wide)))
        # With the last group the gradients themselves are gone.
        rest = gradients if job.stage == 3 or number + 1 < len(partitions) else ()
        working = 4 * own + step_bytes(job.optimizer, kind, each)
        found.append(moment("optimizer", *rest, temporary("gradients in fp32, and of the optimizer", working)))
    if job.stage == 3:
        found.append(moment("write-back", *gradients, kept, *written_back(job, trained, partitions)))
    return found
