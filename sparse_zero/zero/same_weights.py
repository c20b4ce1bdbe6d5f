"""Do all ranks hold the same weights, so that no rank needs to send them?"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import collective_device, digests_of_all_ranks
from sparse_zero.errors import InputError
from sparse_zero.zero import compat

# Same-sized integers, whose sums are exact and see every bit: of a float, NaN and signed zeros, too.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries of a parameter that are weighted by their place: the plain sum does not see entries that changed places.
_NUM_PLACED = 4096


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """[2] int64 on the host: the sum of all entries' bits, and of some entries' bits times their place.

    Sums are modulo 2**64 and exact, so they depend neither on an order of summation nor on a device.

    Args:
        tensor: of any shape, dtype and device. It is read once; nothing of its size is allocated.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.detach().view(_INTEGERS[real.element_size()])
    flat = bits.reshape(-1)
    placed = flat[:: max(1, flat.numel() // _NUM_PLACED)].to(torch.int64)
    places = torch.arange(1, len(placed) + 1, device=placed.device)
    return torch.stack([flat.sum(dtype=torch.int64), (placed * places).sum()]).cpu()


def check_same_weights(model: nn.Module) -> None:
    """Raise on every rank when a parameter differs between ranks. Collective: a few bytes per parameter.

    Parameters that ZeRO-3 holds in shards already are passed over: no rank has them whole.

    Raises:
        InputError: names the first parameter that differs, or says that the models do.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    whole = [(name, each) for name, each in model.named_parameters() if not compat.is_sharded(each)]
    text = hashlib.sha256(repr([(name, each.shape, each.dtype) for name, each in whole]).encode()).hexdigest()
    digests = digests_of_all_ranks(text)
    if any(not torch.equal(digest, digests[0]) for digest in digests):
        raise InputError(
            "the model has other parameters on some ranks than on rank 0, so their weights cannot be compared: "
            "build the same model on every rank"
        )
    if not whole:
        return
    mine = torch.stack([fingerprint(each) for _, each in whole])
    # The largest of x, and the largest of -x - 1, are equal to x and -x - 1 where no rank has another.
    both = torch.stack([mine, ~mine]).to(collective_device())
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, smallest = both[0].cpu(), ~both[1].cpu()
    differing = (largest != smallest).any(dim=1).nonzero()
    if len(differing):
        raise InputError(
            f"{whole[int(differing[0])][0]} differs between ranks, and broadcast_weights is False: load the same files "
            "on every rank, or pass broadcast_weights=True"
        )
