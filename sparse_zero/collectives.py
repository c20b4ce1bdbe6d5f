"""How do ranks agree on small facts, so that they fail together instead of hanging?"""

import hashlib

import torch
import torch.distributed as dist


def collective_device() -> torch.device:
    """Where small tensors must live for the default process group: the GPU under NCCL, else the host."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_equal_on_all_ranks(text: str, what: str) -> None:
    """Raise on every rank when ``text`` differs on any of them. Collective.

    Raises:
        RuntimeError: names ``what`` and the ranks that differ from rank 0.
    """
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digest = digest.to(collective_device())
    gathered = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, digest)
    different = [rank for rank, other in enumerate(gathered) if not torch.equal(other, gathered[0])]
    if different:
        raise RuntimeError(f"{what} differs between rank 0 and ranks {different}: every rank must get equal input")
