"""How does DeepSpeed deal what is trained out to the ranks, and with which sizes of its buffers?

Read from DeepSpeed 0.19.8, ``runtime/zero/stage_1_and_2.py`` (``__init__``) and ``partition_parameters.py``
(``_aligned_size``): stages 1 and 2 lay each of the optimizer's groups flat, pad it to a multiple of twice the number
of ranks, and give each rank an equal part; stage 3 pads and cuts each parameter by itself. Told here is what the first
rank has, as in a simulation: in the flat groups others have the same sizes, but other parameters begin there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_zero.memory.closed_form.base_weights import BaseTensor
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.trained import Trained, TrainedTensor
from sparse_zero.zero.defaults import bucket_size, overlaps, stage3_sizes


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One of the optimizer's groups."""

    # Entries of all ranks, with padding, and of one.
    whole: int
    own: int
    # Entries of the parameters that reach into the own part, whole; and of the largest piece of one that lies in it.
    reached: int
    largest_piece: int
    num_pieces: int


def _flat(group: Sequence[TrainedTensor], ranks: int) -> Partition:
    total = sum(each.numel for each in group)
    whole = math.ceil(total / (2 * ranks)) * 2 * ranks if total else 0
    own = whole // ranks
    reached, largest, start, pieces = 0, 0, 0, 0
    for each in group:
        if start >= own:
            break
        reached += each.numel
        largest = max(largest, min(each.numel, own - start))
        start += each.numel
        pieces += 1
    return Partition(whole=whole, own=own, reached=reached, largest_piece=largest, num_pieces=pieces)


def partitions_of(trained: Trained, job: MemoryJob) -> tuple[Partition, ...]:
    """Each of the optimizer's groups on the first rank."""
    if job.stage in (1, 2):
        return tuple(_flat(group, job.world_size) for group in trained.groups)
    found = []
    for group in trained.groups:
        shares = [each.numel if job.stage == 0 else job.share(each.numel) for each in group]
        ranks = 1 if job.stage == 0 else job.world_size
        found.append(
            Partition(
                whole=ranks * sum(shares), own=sum(shares), reached=sum(each.numel for each in group),
                largest_piece=max(shares), num_pieces=len(group),
            )
        )  # fmt: skip
    return tuple(found)


def zero_sizes(base: Sequence[BaseTensor], trained: Trained, job: MemoryJob) -> Mapping[str, int]:
    """DeepSpeed's sizes of buckets and limits, in entries: as a job sets them, or this package does where it does not.

    See :mod:`sparse_zero.zero.defaults`. Without the prefix "stage3_", which DeepSpeed takes and leaves, too.
    """
    weights: Sequence[BaseTensor | TrainedTensor] = base or list(trained.tensors())
    matrices = sorted(each.numel for each in weights if each.is_matrix)
    vectors = [each.numel for each in weights if not each.is_matrix]
    overlapping = overlaps({**job.zero_options, "stage": job.stage})
    found: dict[str, Any] = {
        **bucket_size(trained.num_parameters, overlapping=overlapping),
        **stage3_sizes(matrices, vectors),
    }
    found.update({name: value for name, value in job.zero_options.items() if value != "auto"})
    return {
        name.removeprefix("stage3_"): int(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
