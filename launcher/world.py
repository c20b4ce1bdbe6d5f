"""Who is this process among the ranks of the run, on which device, and how does it join them?"""

import os
from dataclasses import dataclass

import torch

from launcher.process_ranks import Ranks, export_ranks, find_ranks


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    # What named the ranks (torchrun, openmpi, …), for the log.
    launcher: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and speaks."""
        return self.rank == 0


def _share_cores(ranks: Ranks) -> None:
    """Give every rank of a CPU node its part of the cores, unless the user has said how many threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // (ranks.local_world_size or 1)))


def join_world() -> World:
    """Find this rank, and join the process group through DeepSpeed. Collective.

    Raises:
        InputError: the launcher's variables contradict each other or are incomplete.
    """
    ranks = find_ranks(os.environ)
    export_ranks(ranks, os.environ)
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(ranks.local_rank)
    else:
        _share_cores(ranks)
    import deepspeed

    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", ranks.local_rank) if use_gpu else torch.device("cpu")
    return World(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        device=device,
        launcher=ranks.launcher,
    )


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
