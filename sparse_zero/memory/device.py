"""What does a GPU give beside the bytes of the tensors: its context, and what the allocator loses?

A simulated run can be replayed through a model of PyTorch's allocator: :func:`replay`, :func:`needed_bytes`. Where
there is only a closed form, :func:`device_overhead` estimates the same. Neither was held against a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_zero.memory.caching_allocator import MIB, CachingAllocator, DoesNotFitError
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.simulation.timeline import Timeline

# What a process takes on a GPU before its first tensor, with the kernels loaded: about, for CUDA 12. Not measured here.
CONTEXT_BYTES = 500 * MIB
# Of cuBLAS, on the newest GPUs; PyTorch's notes on CUDA_WORKSPACE_CONFIG. 8 MiB on others.
WORKSPACE_BYTES = 32 * MIB
# Memory that fragments take, by the largest tensor that comes and goes: of 12 replayed simulations (Llama-2-7B and 13B,
# Llama-3-8B, Mistral-7B and a model of 67M parameters; the selection, LoRA and full fine-tuning; stages 2 and 3; with
# and without gradient checkpointing) needed_bytes was larger than the tensors' peak by 0.5 to 2.4 times that tensor,
# most often by 1.6 to 1.8 times.
FRAGMENTS_PER_LARGEST = 1.75


@dataclass(frozen=True, kw_only=True)
class DeviceOverhead:
    """Bytes of a GPU that are no tensors; estimates."""

    context_bytes: int
    workspace_bytes: int
    fragment_bytes: int

    @property
    def num_bytes(self) -> int:
        """All of them."""
        return self.context_bytes + self.workspace_bytes + self.fragment_bytes


def device_overhead(shape: DecoderShape, job: MemoryJob) -> DeviceOverhead:
    """What a rank of a job takes of its GPU beyond the tensors that a forecast counts.

    Fragments follow from the largest tensor that comes and goes: the logits in fp32, the bucket of gradients where all
    parameters are trained, or a layer's widest activation. See :data:`FRAGMENTS_PER_LARGEST`.

    Args:
        shape: of the model.
        job: what trains it.
    """
    widest = max([linear.out_features for linear in shape.linears], default=shape.hidden_size)
    chunk = None if job.method == "full" else job.loss_chunk
    logits = min(job.logit_rows, chunk or job.logit_rows)
    largest = [4 * logits * shape.vocab_size, job.tokens * widest * job.element_bytes]
    if job.method == "full" and job.stage:
        largest.append(job.element_bytes * min(shape.num_parameters, int(5e8)))
    return DeviceOverhead(
        context_bytes=CONTEXT_BYTES,
        workspace_bytes=WORKSPACE_BYTES,
        fragment_bytes=int(FRAGMENTS_PER_LARGEST * max(largest)),
    )


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What PyTorch's allocator would have taken for a recorded run; bytes."""

    # The most at once: of tensors, of the blocks they lie in, and of the segments taken from the GPU.
    tensor_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    # Reserved after each part of the run, by its name; the last of several.
    reserved_after: dict[str, int]

    @property
    def overhead_bytes(self) -> int:
        """What is reserved beyond the peak of the tensors."""
        return self.reserved_bytes - self.tensor_bytes


def replay(timeline: Timeline, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> Replayed:
    """Put a run's allocations and releases on the device, in their order, through the model of the allocator.

    See :mod:`sparse_zero.memory.caching_allocator` for what that model leaves out.

    Raises:
        DoesNotFitError: the run does not fit into ``limit_bytes``.
    """
    allocator = CachingAllocator(expandable_segments=expandable_segments, limit_bytes=limit_bytes)
    born, died = {}, {}
    for each in timeline.storages:
        if each.place == "device":
            born[each.born] = each
            if each.died is not None:
                died[each.died] = each
    ends = {span.end: span.phase for span in timeline.spans}
    blocks = {}
    most, reserved, after = 0, 0, {}
    for event in range(len(timeline.modules) + 1):
        if event in ends:
            after[ends[event]] = allocator.reserved_bytes
        if event in born:
            blocks[event] = allocator.allocate(born[event].num_bytes)
            most, reserved = max(most, allocator.allocated_bytes), max(reserved, allocator.reserved_bytes)
        elif event in died:
            allocator.release(blocks.pop(died[event].born))
    return Replayed(
        tensor_bytes=int(timeline.total["device"].max()),
        allocated_bytes=most,
        reserved_bytes=reserved,
        reserved_after=after,
    )


def needed_bytes(timeline: Timeline, *, tolerance: float = 0.005) -> int:
    """The smallest GPU memory that a recorded run fits into, without the context: cached segments go back when need be.

    Args:
        timeline: of the run.
        tolerance: relative; the result is at most this much too large.
    """
    found = replay(timeline)
    low, high = found.allocated_bytes, found.reserved_bytes
    while high - low > tolerance * high:
        middle = (low + high) // 2
        try:
            # What it took of the limit may be less.
            high = min(middle, replay(timeline, limit_bytes=middle).reserved_bytes)
        except DoesNotFitError:
            low = middle
    return high
