"""How do ranks agree on small facts, so that they fail together instead of hanging?"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# The threads need microseconds; a loaded machine may be slow to run them.
_RELEASE_SECONDS = 0.3


def collective_device() -> torch.device:
    """Where small tensors must live for the default process group: the GPU under NCCL, else the host."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_rank_zero(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's bits on every rank, on the host; without other ranks ``tensor`` itself. Collective."""
    if not dist.is_initialized() or not tensor.numel():
        return tensor
    travelling = tensor.to(collective_device())
    dist.broadcast(travelling, src=0)
    return travelling.cpu()


def digests_of_all_ranks(text: str) -> list[torch.Tensor]:
    """SHA-256 of every rank's ``text``: 32 bytes each. Collective."""
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digest = digest.to(collective_device())
    gathered = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, digest)
    return gathered


def check_equal_on_all_ranks(text: str, what: str) -> None:
    """Raise on every rank when ``text`` differs on any of them. Collective.

    Raises:
        RuntimeError: names ``what`` and the ranks that differ from rank 0.
    """
    gathered = digests_of_all_ranks(text)
    different = [rank for rank, other in enumerate(gathered) if not torch.equal(other, gathered[0])]
    if different:
        raise RuntimeError(f"{what} differs between rank 0 and ranks {different}: every rank must get equal input")


def leave_process_group() -> None:
    """Leave the default process group, if this process is in one.

    A gloo thread may still hold the tensors of the last collective, and gives them back under Python's lock. Where the
    interpreter ends meanwhile, the thread aborts the process (seen with torch 2.13: exit code 134 after everything was
    written). A pause without the lock lets it finish.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_RELEASE_SECONDS)


@contextmanager
def lone_process_group() -> Iterator[None]:
    """A process group for the block: the one there is, or one of this process alone, which is left again.

    DeepSpeed's engines need one, and a local rank in the environment. Both are gone afterwards, with DeepSpeed's caches
    of groups, so that a real one can be joined later.
    """
    if dist.is_initialized():
        yield
        return
    import deepspeed
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    use_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_gpu else "gloo", store=HashStore(), rank=0, world_size=1)
    sets_local_rank = "LOCAL_RANK" not in os.environ
    if sets_local_rank:
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if use_gpu else 0)
    try:
        yield
    finally:
        if sets_local_rank:
            del os.environ["LOCAL_RANK"]
        deepspeed.comm.destroy_process_group()
        time.sleep(_RELEASE_SECONDS)


@contextmanager
def speaking_alone() -> Iterator[None]:
    """What the block computes is for this rank only: nothing in it asks or waits for others, which may be gone.

    For a rank that is about to end, and says why: until the block ends, every collective of this package takes the
    process for one without a group.
    """
    asked = dist.is_initialized
    vars(dist)["is_initialized"] = lambda: False
    try:
        yield
    finally:
        vars(dist)["is_initialized"] = asked


class PeerError(RuntimeError):
    """Another rank met the error; that rank reports it, this one only ends."""


@contextmanager
def failing_together() -> Iterator[None]:
    """Run the block on every rank; when it raises on any, raise on all. Collective at its end.

    The block itself must not communicate. The lowest failing rank raises its own error, the others
    :class:`PeerError`, so that one line is printed for the whole world.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = torch.tensor(world_size if error is None else rank, device=collective_device())
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if int(first) == rank and error is not None:
        # Others end with a PeerError of their own: no rank waits for this one, and none else reports.
        vars(error)["speaks_for_all"] = True
        raise error
    if int(first) < world_size:
        raise PeerError(f"rank {int(first)} failed") from error
