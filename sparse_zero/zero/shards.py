"""How are entries of parameters that ZeRO-3 holds in shards read and written, without gathering the parameters?

A shard is one contiguous range of the flat, row-major parameter: rank r of n has the entries from ``r * length`` on,
where ``length`` is the size of the parameter divided by n, rounded up. Entries are told by their positions in it.

    write   every rank has all numbers and writes those that lie in its shard; nothing travels
    read    every rank fills in those that lie in its shard, and they are added up, as bits
    values  are small, and gathered whole, many in one collective
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_zero.zero import compat

# Entries that are gathered at once: 0.1 GB in bf16, and as much again while they are put together.
BUCKET_ENTRIES = 50_000_000


class _Inside(NamedTuple):
    """Which of some numbers lie in one shard, and where."""

    # [n] positions within the shard, on its device; int32 where that is enough.
    at: Tensor
    # [n] which of the numbers, on the parameter's device.
    number: Tensor


def _inside(positions: Tensor, shard: compat.Shard) -> tuple[Tensor, Tensor]:
    """(positions within the shard, which of ``positions``) of those that lie in it."""
    number = ((positions >= shard.start) & (positions < shard.start + shard.length)).nonzero().squeeze(1)
    return positions[number] - shard.start, number


def _compact(index: Tensor, limit: int) -> Tensor:
    """``index`` in the smallest dtype that reaches ``limit``."""
    return index.to(torch.int32) if limit <= torch.iinfo(torch.int32).max else index


class ShardIndex:
    """Where the values of one weight and kind lie in this rank's shards of the weight; found once, when first written.

    It takes 8 bytes for each of the values, divided by the number of ranks (ranks of a group, for the second shards of
    hpZ): two int32, for a shard of up to 2**31 entries. It is no buffer: no cast and no broadcast may touch it.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, torch.device], _Inside] = {}

    def write(self, parameter: Tensor, positions: Callable[[], Tensor], numbers: Tensor) -> None:
        """Overwrite, in this rank's shards of ``parameter``, its entries at ``positions``. Not collective.

        Args:
            parameter: sharded, and not on a disk.
            positions: gives the int64 positions of all ``numbers``; called when they are not known yet.
            numbers: 1-D, on any device; equal on all ranks.
        """
        shards = compat.own_shards(parameter)
        keys = {(shard.start, shard.length, shard.tensor.device) for shard in shards}
        if keys != self._found.keys():
            # Another engine may have dealt the parameter otherwise.
            self._found.clear()
            every = positions().cpu()
            for shard in shards:
                at, number = _inside(every, shard)
                self._found[shard.start, shard.length, shard.tensor.device] = _Inside(
                    _compact(at, shard.length).to(shard.tensor.device),
                    _compact(number, len(every)).to(parameter.device),
                )
        for shard in shards:
            found = self._found[shard.start, shard.length, shard.tensor.device]
            mine = numbers.detach().index_select(0, found.number.to(numbers.device))
            _put(shard, found.at, mine)

    @property
    def num_bytes(self) -> int:
        """What the index takes on this rank."""
        return sum(index.nbytes for found in self._found.values() for index in found)


def _put(shard: compat.Shard, at: Tensor, numbers: Tensor) -> None:
    target = shard.tensor
    target.index_copy_(0, at.to(target.device, torch.int64), numbers.to(target.device, target.dtype))


@torch.no_grad()
def write_entries(parameter: Tensor, positions: Tensor, numbers: Tensor) -> None:
    """Overwrite what stands at ``positions`` of a contiguous parameter, whole or sharded, with 1-D ``numbers``.

    Every rank gives the same. Collective only where a shard is on a disk.

    Args:
        parameter: of any shape.
        positions: int64, row-major, on any device.
        numbers: as many, on any device; rounded to the parameter's dtype.
    """
    if compat.is_sharded(parameter):
        if compat.is_out_of_reach(parameter):
            with compat.whole(parameter, writes=True):
                write_whole(parameter, positions, numbers)
            return
        for shard in compat.own_shards(parameter):
            at, number = _inside(positions.cpu(), shard)
            _put(shard, at, numbers.detach().index_select(0, number.to(numbers.device)))
        if not compat.is_available(parameter):
            return
    write_whole(parameter, positions, numbers)


@torch.no_grad()
def write_whole(parameter: Tensor, positions: Tensor, numbers: Tensor) -> None:
    """:func:`write_entries` into a parameter that is whole at the moment."""
    numbers = numbers.to(device=parameter.device, dtype=parameter.dtype)
    parameter.data.view(-1).index_copy_(0, positions.to(parameter.device), numbers)


@torch.no_grad()
def read_entries(parameter: Tensor, positions: Tensor) -> Tensor:
    """What stands at ``positions`` of a contiguous parameter, whole or sharded: 1-D, on its device, bit for bit.

    Collective where it is sharded: every rank gives the same positions.

    Args:
        parameter: of any shape and dtype.
        positions: int64, row-major, on any device.
    """
    if compat.is_available(parameter):
        return parameter.detach().reshape(-1).index_select(0, positions.to(parameter.device))
    if compat.is_out_of_reach(parameter):
        with compat.whole(parameter):
            return read_entries(parameter, positions).clone()
    # The first is the one that is spread over all ranks of the group.
    shard = compat.own_shards(parameter)[0]
    at, number = _inside(positions.cpu(), shard)
    found = torch.zeros(len(positions), dtype=parameter.dtype, device=parameter.device)
    mine = shard.tensor.index_select(0, at.to(shard.tensor.device))
    found.index_copy_(0, number.to(found.device), mine.to(found.device))
    # As bytes, of which all but one rank have zeros: a sum of numbers would lose the sign of a zero.
    dist.all_reduce(found.view(torch.uint8), group=compat.shard_group(parameter))
    return found


def _buckets(parameters: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Runs of parameters that are gathered together: equally typed and dealt, of at most ``limit`` entries (or one)."""
    bucket: list[Tensor] = []
    taken = 0
    for parameter in parameters:
        same = not bucket or (
            parameter.dtype == bucket[0].dtype and compat.shard_group(parameter) is compat.shard_group(bucket[0])
        )
        if bucket and (not same or taken + compat.full_numel(parameter) > limit):
            yield bucket
            bucket, taken = [], 0
        bucket.append(parameter)
        taken += compat.full_numel(parameter)
    if bucket:
        yield bucket


def _gather(bucket: Sequence[Tensor]) -> Iterator[Tensor]:
    """All parameters of a bucket, whole, by one collective."""
    group = compat.shard_group(bucket[0])
    parts = [compat.padded_shard(parameter) for parameter in bucket]
    mine = torch.cat([part.to(parameter.device) for part, parameter in zip(parts, bucket, strict=True)])
    everyone = mine.new_empty(dist.get_world_size(group) * len(mine))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    columns = everyone.view(-1, len(mine)).split([len(part) for part in parts], dim=1)
    for parameter, column in zip(bucket, columns, strict=True):
        yield column.reshape(-1)[: compat.full_numel(parameter)]


@torch.no_grad()
def whole_values(parameters: Iterable[Tensor], limit: int = BUCKET_ENTRIES) -> Iterator[Tensor]:
    """Every 1-D parameter whole, in turn, on its device, and not to be changed. Collective where one is sharded.

    Those that are whole on every rank are given as they are. The others are gathered together, up to ``limit`` entries
    at once, and what DeepSpeed holds of them stays as it is.

    Args:
        parameters: values, in the same order on all ranks.
        limit: entries of one collective; a longer one travels alone.
    """
    wanted = list(parameters)
    missing = [parameter for parameter in wanted if not compat.is_available(parameter)]
    gathered = (values for bucket in _buckets(missing, limit) for values in _gather(bucket))
    for parameter in wanted:
        # Whether it is at hand cannot change meanwhile: nothing here gathers or releases a parameter.
        yield parameter.detach() if compat.is_available(parameter) else next(gathered)
