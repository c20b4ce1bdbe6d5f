"""What does a checkpoint take before it is written?

See :func:`sparse_zero.checkpoint.checkpoint.take_snapshot`: rank 0 gets masters and states whole, in fp32, on its host.
On the way, the shares of one parameter after the other come together on every rank's device (DeepSpeed's
``utils/tensor_fragment.py``); at stage 0 every rank has them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import Moment, Term
from sparse_zero.memory.closed_form.trained import Trained

# Numbers that a checkpoint holds for each entry beside the master; states of 8 bits become fp32. Others hold one.
_STATES = {"adamw": 2, "deepspeed_adamw": 2, "adamw_8bit": 2}


def save_moments(job: MemoryJob, trained: Trained, held: Sequence[Term]) -> list[Moment]:
    """While the state is copied; on the rank that writes it.

    Args:
        job: of any method; for others than "selection" there is none.
        trained: what it trains.
        held: between two steps.
    """
    if job.method != "selection":
        return []
    largest = 0 if job.stage == 0 else max((each.numel for each in trained.tensors()), default=0)
    # At stage 3 beside this rank's share of it; once more, as simulations show, where the values lie on the host.
    share = job.share(largest) if job.stage == 3 else 0
    share += largest if job.stage == 3 and job.offload_base != "none" else 0
    copied = 4 * (1 + _STATES.get(job.optimizer, 1)) * trained.num_parameters
    terms = (
        *held,
        Term(name="master of one parameter", kind="temporaries", num_bytes=4 * (largest + share)),
        Term(name="masters and states to be written", kind="optimizer", num_bytes=copied, place="host"),
    )
    return [Moment(phase="save", name="copying the state", terms=terms)]
