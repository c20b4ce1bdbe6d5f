"""What does each spawned rank do: join the process group, call the function, write rank 0's result?"""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Run the job described by the first argument."""
    import torch

    torch.set_num_threads(1)
    import deepspeed
    import torch.distributed as dist

    from sparse_zero.collectives import leave_process_group

    job = json.loads(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{job['rendezvous']}",
        rank=rank,
        world_size=world_size,
        verbose=False,
    )
    module, _, name = job["function"].partition(":")
    warnings.simplefilter("default")
    result = getattr(importlib.import_module(module), name)(**job["arguments"])
    if rank == 0:
        Path(job["result"]).write_text(json.dumps(result))
    dist.barrier()
    leave_process_group()


if __name__ == "__main__":
    main()
