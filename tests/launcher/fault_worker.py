"""The worker of a run with a planted fault: rank 1 raises at a place, in a step, while rank 0 goes on.

    fault_worker.py PLACE STEP MARK --config FILE

PLACE is forward, collective or write_back; MARK is a file that is written when the fault happens.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

import launcher.training_loop
import sparse_zero.zero.engine
from launcher import train


def plant(place: str, step: int, mark: Path) -> None:
    """Have rank 1 raise in the given step, counted from one."""
    if os.environ["RANK"] != "1":
        return
    begun = 0
    loop: Any = launcher.training_loop
    engine: Any = sparse_zero.zero.engine
    optimizer_step = loop._optimizer_step

    def raise_here(*arguments: Any, **settings: Any) -> Any:
        mark.touch()
        raise RuntimeError(f"planted fault during {place}")

    def counted(state: Any, *arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == step and place == "forward":
            # Deep inside of the model, where the other rank does not wait yet.
            list(state.engine.module.modules())[-1].register_forward_pre_hook(raise_here)
        elif begun == step and place == "collective":
            # The other rank is in it already, or comes to it.
            dist.all_gather = raise_here
        elif begun == step:
            engine.write_back = raise_here
        return optimizer_step(state, *arguments)

    loop._optimizer_step = counted


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    sys.exit(train.main(sys.argv[4:]))
