"""What does a rank hold between forward passes: the base, values, gradients, masters and moments, indices, buffers?"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_zero.memory.decoder_shape import DecoderShape
from sparse_zero.memory.job import MemoryJob
from sparse_zero.memory.moments import Moment, Term
from sparse_zero.memory.trained import Trained


@dataclass(frozen=True, kw_only=True)
class HeldStates:
    """Terms of the states, and the moments of the phases without activations."""

    base: tuple[Term, ...]
    # load, engine, step and save.
    moments: tuple[Moment, ...]

    def during_training(self, moment: Moment) -> tuple[Term, ...]:
        """What is held at a moment of forward or backward, beside its activations."""
        return self.base


def held_states(shape: DecoderShape, job: MemoryJob, trained: Trained) -> HeldStates:
    """The states of a job."""
    size, count = job.element_bytes, trained.num_parameters
    total = shape.num_parameters
    base = Term(name="base weights", kind="weights", num_bytes=size * (job.share(total) if job.stage == 3 else total))
    split = job.share(count) if job.stage else count
    terms = (
        base,
        Term(name="values", kind="values", num_bytes=size * (split if job.stage == 3 else count)),
        Term(name="masters and moments", kind="optimizer", num_bytes=12 * split),
    )
    gradients = Term(name="gradients of values", kind="gradients", num_bytes=size * split)
    return HeldStates(
        base=terms,
        moments=(
            Moment(phase="load", name="end", terms=terms[:2]),
            Moment(phase="engine", name="end", terms=terms),
            Moment(phase="step", name="optimizer", terms=(*terms, gradients)),
        ),
    )
