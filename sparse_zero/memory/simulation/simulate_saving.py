"""How much memory will a checkpoint take before it is written, found by running its real code without data?"""

from __future__ import annotations

from sparse_zero.checkpoint.checkpoint import take_snapshot
from sparse_zero.memory.simulation.simulate_training import Simulated

PHASE = "save"


def saving(simulated: Simulated) -> None:
    """The part that copies the training state to the host, after training; on rank 0, which writes it.

    The snapshot lives until a thread has written it, while training goes on.
    """
    recorder = simulated.recorder
    with recorder.phase(PHASE):
        snapshot = take_snapshot(simulated.engine, random_states=False, keep=True)
        assert snapshot is not None
        for tensors in (snapshot.state.masters, *snapshot.state.moments.values()):
            for tensor in tensors.values():
                recorder.add(tensor, "optimizer")
