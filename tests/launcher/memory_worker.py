"""The rank of a run that runs out of memory for real: the kernel refuses it any more from backward of one step on."""

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.rank_main import become_rank


def plant(step: int) -> None:
    """Limit the address space to what is taken already, when backward of the given step begins, counted from one."""
    import launcher.training_loop
    from launcher.memory.room import held_bytes

    begun = 0
    loop: Any = launcher.training_loop
    optimizer_step = loop._optimizer_step

    def counted(state: Any, *arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == step:
            backward = state.engine.backward

            def limited(*inner: Any, **named: Any) -> Any:
                resource.setrlimit(resource.RLIMIT_AS, (held_bytes()["address_space"], resource.RLIM_INFINITY))
                return backward(*inner, **named)

            state.engine.backward = limited
        return optimizer_step(state, *arguments)

    loop._optimizer_step = counted


def be_a_limited_rank(arguments: Sequence[str], environment: dict[str, str], log: str, *, rank: int, step: int) -> None:
    """As :func:`scripts.tiny_run.be_a_rank`, with a limit for one of the ranks."""
    become_rank(environment, Path(log))
    import torch

    from launcher import train

    torch.set_num_threads(1)
    if os.environ["RANK"] == str(rank):
        plant(step)
    sys.exit(train.main(arguments))
