"""Who is this process among the ranks of the run, on which device, and how does it join them?"""

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launcher.process_ranks import Ranks, export_ranks, find_ranks
from launcher.pulse import Pulse
from sparse_zero.errors import InputError
from sparse_zero.memory.allocator import return_freed_blocks


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    # What named the ranks (torchrun, openmpi, …), for the log.
    launcher: str
    # Where it says how far it is.
    pulse: Pulse = field(default_factory=Pulse)
    # Ranks that keep a copy of the run folder: rank 0, and where nodes have disks of their own one on each of them.
    keepers: tuple[int, ...] = (0,)

    @property
    def keeps_folder(self) -> bool:
        """Whether this rank writes what a start needs to the run folder as it sees it."""
        return self.rank in self.keepers

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and speaks."""
        return self.rank == 0


def _share_cores(ranks: Ranks) -> None:
    """Give every rank of a CPU node its part of the cores, unless the user has said how many threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // (ranks.local_world_size or 1)))


def _unname_shared_buffer(rank: int) -> None:
    """Take the name from this rank's buffer in shared memory, through which DeepSpeed reduces within a node.

    DeepSpeed (0.19.8) leaves 66 MiB for each rank there, also when it ends well. Without a name, the kernel frees them
    with the last process that has them open, however that ends. Collective: all must have opened it before.
    """
    torch.distributed.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def join_world(record: str | None = None) -> World:
    """Find this rank, and join the process group through DeepSpeed. Collective.

    Args:
        record: folder of the guard of this node; see :class:`launcher.pulse.Pulse`.

    Raises:
        InputError: the launcher's variables contradict each other or are incomplete.
    """
    ranks = find_ranks(os.environ)
    pulse = Pulse(record, ranks.rank)
    export_ranks(ranks, os.environ)
    use_gpu = torch.cuda.is_available()
    gpu = 0
    if use_gpu:
        # A batch system that binds one GPU to every task shows each of them a single device, number 0.
        gpu = ranks.local_rank if torch.cuda.device_count() > 1 else 0
        if gpu >= torch.cuda.device_count():
            raise InputError(
                f"local rank {ranks.local_rank} has no GPU: {torch.cuda.device_count()} are visible on this node; "
                "start as many ranks as there are GPUs (cluster.ranks_per_node)"
            )
        os.environ["LOCAL_RANK"] = str(gpu)
        torch.cuda.set_device(gpu)
    else:
        _share_cores(ranks)
    return_freed_blocks()
    import deepspeed

    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    if not use_gpu:
        _unname_shared_buffer(ranks.rank)
    device = torch.device("cuda", gpu) if use_gpu else torch.device("cpu")
    return World(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        device=device,
        launcher=ranks.launcher,
        pulse=pulse,
    )


def speak_once(world: World) -> None:
    """Show each warning about the run as one line, on rank 0 only, and leave out those about libraries' own code."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        print(f"sparse-zero: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)

    if world.is_main:
        warnings.showwarning = show
        warnings.simplefilter("ignore", FutureWarning)
    else:
        warnings.simplefilter("ignore")
