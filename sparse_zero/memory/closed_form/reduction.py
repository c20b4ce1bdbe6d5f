"""What do gradients and the buffers they are reduced in take, from the first backward to the step?

Read from DeepSpeed 0.19.8 (``runtime/engine.py``: ``allreduce_gradients``; ``runtime/zero/stage_1_and_2.py``:
``setup_buckets``, ``reduce_ipg_grads``, ``copy_grads_in_partition``; ``stage3.py``: ``_setup_for_real_optimizer``,
``__avg_scatter_grads``):

    stage 0   gradients whole, until the step; reduced as one flat copy, up to 5e8 entries at once
    stage 1   gradients whole, and from the first gradient on the bucket, until the last micro-batch has reduced them
    stage 2   each goes into the bucket when it is there; a full one, and what is left at the end of backward, is
              reduced by a flat copy, and what reaches into the own part is kept (parameters whole) until the step
    stage 3   the bucket and the own part of all gradients are there from the start; reduced as at stage 2

Gradients and buckets have the dtype of what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import Term
from sparse_zero.memory.closed_form.partitions import Partition
from sparse_zero.memory.closed_form.trained import Trained
from sparse_zero.zero.defaults import overlaps

# Entries that stage 0 reduces at once.
_STAGE0_BUCKET = 500_000_000


def _gradients(num_bytes: int, name: str = "gradients") -> Term:
    return Term(name=name, kind="gradients", num_bytes=num_bytes)


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Gradients of one rank, in bytes."""

    # Of all that is trained, whole.
    whole: int
    # DeepSpeed's bucket.
    bucket: int
    # What is kept from one micro-batch to the next, and until the step, beside the bucket.
    kept: int
    # The flat copy in which a bucket is reduced.
    copied: int
    # Whether buckets are reduced while backward goes on.
    is_early: bool
    stage: int
    accumulates: bool

    def before_backward(self) -> tuple[Term, ...]:
        """In forward, and until the first gradient is there: what earlier micro-batches have left."""
        if self.stage == 3:
            return (_gradients(self.bucket, "reduction bucket"), _gradients(self.kept))
        if not self.accumulates:
            return ()
        if self.stage == 1:
            return (_gradients(self.bucket, "reduction bucket"), _gradients(self.whole))
        return (_gradients(self.kept),)

    def in_backward(self, formed: int) -> tuple[Term, ...]:
        """While backward goes on.

        Args:
            formed: bytes of the gradients that are there by then.
        """
        if self.stage == 3 or (self.stage == 2 and formed):
            # A bucket is reduced when it is full, and gradients of one that is not wait in it.
            flat = self.copied if self.is_early and formed >= self.copied else 0
            # Room for all of this rank's part is made when the first of it is reduced: rank 0's is the last to come.
            has_begun = bool(flat) and formed > self.whole - self.kept
            held = self.kept if self.stage == 3 or self.accumulates or has_begun else 0
            return (
                _gradients(self.bucket, "reduction bucket"),
                _gradients(held),
                Term(name="copy of the bucket", kind="temporaries", num_bytes=flat),
            )
        if self.accumulates or not formed:
            return self.before_backward()
        bucket = self.bucket if self.stage == 1 else 0
        return (_gradients(bucket, "reduction bucket"), _gradients(formed))

    def at_end(self) -> tuple[Term, ...]:
        """When backward has ended, and what is left is reduced."""
        if self.stage in (0, 3):
            kept = self.kept if self.stage == 3 else self.whole
            return (
                _gradients(self.bucket if self.stage == 3 else 0, "reduction bucket"),
                _gradients(kept),
                Term(name="copy of the bucket", kind="temporaries", num_bytes=self.copied),
            )
        if self.stage == 1:
            # The gradients move into the bucket, and from there into a flat copy; or they do not fit into it at once.
            moving = self.whole + (self.copied if self.is_early else 0)
            return (_gradients(self.bucket, "reduction bucket"), _gradients(moving))
        before = self.kept if self.accumulates else 0
        own = self.kept + self.copied if self.is_early else max(self.kept, self.copied)
        return (_gradients(self.bucket, "reduction bucket"), _gradients(before + own))

    def at_step(self) -> tuple[Term, ...]:
        """When the step begins."""
        if self.stage == 3:
            return self.before_backward()
        return (_gradients(self.whole if self.stage == 0 else self.kept),)


def reduction_of(trained: Trained, job: MemoryJob, partitions: Sequence[Partition], bucket_size: int) -> Reduction:
    """Gradients under a job.

    Args:
        trained: what has gradients.
        job: the job.
        partitions: of the optimizer's groups.
        bucket_size: DeepSpeed's ``reduce_bucket_size``, in entries.
    """
    size, count, limit = job.element_bytes, trained.num_parameters, bucket_size if job.stage else _STAGE0_BUCKET
    if job.offload_optimizer != "none" and job.stage in (1, 2):
        # What reaches into the own part goes to the host at once.
        kept = 0
    elif job.stage == 3:
        kept = 0 if job.offload_optimizer != "none" else size * sum(each.own for each in partitions)
    else:
        kept = size * (count if job.stage == 0 else sum(each.reached for each in partitions))
    pieces = sum(1 for _ in trained.tensors())
    # A single slice needs no copy to be flat.
    copied = 0 if pieces == 1 and job.world_size == 1 else size * min(count, limit)
    return Reduction(
        whole=size * count,
        # Two in turn, where their reduction overlaps with backward.
        bucket=size * bucket_size * (1 + overlaps({**job.zero_options, "stage": job.stage})) if job.stage else 0,
        kept=kept,
        copied=copied,
        is_early=count > limit,
        stage=job.stage,
        accumulates=job.accumulation > 1,
    )
