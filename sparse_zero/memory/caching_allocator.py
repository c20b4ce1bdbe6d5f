"""What does PyTorch's caching allocator take from a GPU for a sequence of allocations and releases?

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` (PyTorch 2.x) with its default settings, for one stream:

- a request is rounded up to a multiple of 512 bytes, and an empty one takes nothing;
- requests of up to 1 MiB are served from one pool, larger ones from another;
- of the free blocks of the pool that are large enough, the smallest is taken, the one at the lowest address of several;
- if there is none, a segment is taken from the GPU: 2 MiB for requests of up to 1 MiB, 20 MiB for those below 10 MiB,
  and for the others as much as they ask for, rounded up to 2 MiB;
- what a block has too much is split off as a free block: in the small pool from 512 bytes on, in the large one if it
  is more than 1 MiB;
- a block that becomes free joins its free neighbours in the same segment. Segments are kept until the GPU has no more
  to give: then those that are free as a whole go back to it.

With ``expandable_segments:True`` each pool is one range of addresses that grows at its end, by 2 MiB or 20 MiB at a
time; every rest from 512 bytes on is split off.

This is a model: there was no GPU to hold it against. Several streams, each with pools of its own (ZeRO-3 gathers
on one, reductions may run on another), and memory that other streams still use are not in it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from sparse_zero.errors import InputError

MIB = 2**20
# Names as in the source.
MIN_BLOCK_SIZE = 512
SMALL_SIZE = MIB
SMALL_BUFFER = 2 * MIB
LARGE_BUFFER = 20 * MIB
MIN_LARGE_ALLOC = 10 * MIB
ROUND_LARGE = 2 * MIB


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def rounded(num_bytes: int) -> int:
    """The size of the block that a request gets, at least."""
    return _round_up(num_bytes, MIN_BLOCK_SIZE)


class DoesNotFitError(MemoryError):
    """The GPU has no segment left for a request."""


@dataclass(eq=False, kw_only=True)
class Block:
    """A part of a segment."""

    address: int
    size: int
    is_free: bool
    # Neighbours within the segment.
    before: Block | None = None
    after: Block | None = None


class _Pool:
    """Segments for small or for large requests, and what is free in them."""

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self._is_small, self._expandable = is_small, expandable
        # By size, then address.
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}
        self._end = 0
        # Of the one segment that grows.
        self._last: Block | None = None
        self.reserved_bytes = 0

    def allocate(self, size: int) -> Block:
        """A block for a rounded request."""
        block = self._best_fit(size)
        if block is not None:
            self._forget(block)
        elif self._expandable:
            block = self._grow(self.segment_bytes(size))
        else:
            taken = self.segment_bytes(size)
            block = Block(address=self._end, size=taken, is_free=False)
            self._end += taken
            self.reserved_bytes += taken
        block.is_free = False
        rest = block.size - size
        if rest >= MIN_BLOCK_SIZE if self._is_small or self._expandable else rest > SMALL_SIZE:
            after = Block(address=block.address + size, size=rest, is_free=True, before=block, after=block.after)
            if block.after is not None:
                block.after.before = after
            block.after, block.size = after, size
            if self._last is block:
                self._last = after
            self._remember(after)
        return block

    def release(self, block: Block) -> None:
        """Give a block back."""
        block.is_free = True
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._forget(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.size, first.after = first.size + second.size, second.after
                if second.after is not None:
                    second.after.before = first
                if self._last is second:
                    self._last = first
                block = first
        self._remember(block)

    def segment_bytes(self, size: int) -> int:
        """What a rounded request takes from the GPU; 0: it is served from what is there."""
        if self._best_fit(size) is not None:
            return 0
        if self._expandable:
            last = self._last
            held = last.size if last is not None and last.is_free else 0
            return _round_up(size - held, SMALL_BUFFER if self._is_small else LARGE_BUFFER)
        if self._is_small:
            return SMALL_BUFFER
        return LARGE_BUFFER if size < MIN_LARGE_ALLOC else _round_up(size, ROUND_LARGE)

    def give_back(self) -> None:
        """Return the segments that are free as a whole."""
        for size, address in list(self._free):
            block = self._blocks[address]
            if block.before is None and block.after is None:
                self._forget(block)
                self.reserved_bytes -= size

    def _best_fit(self, size: int) -> Block | None:
        for found in range(bisect.bisect_left(self._free, (size, -1)), len(self._free)):
            block = self._blocks[self._free[found][1]]
            # What may still grow counts as the largest of all.
            if block is not self._last:
                return block
        last = self._last
        return last if last is not None and last.is_free and last.size >= size else None

    def _grow(self, num_bytes: int) -> Block:
        last = self._last
        if last is not None and last.is_free:
            self._forget(last)
            block = last
            block.size += num_bytes
        else:
            block = Block(address=self._end, size=num_bytes, is_free=False, before=last)
            if last is not None:
                last.after = block
        self._end += num_bytes
        self.reserved_bytes += num_bytes
        self._last = block
        return block

    def _remember(self, block: Block) -> None:
        bisect.insort(self._free, (block.size, block.address))
        self._blocks[block.address] = block

    def _forget(self, block: Block) -> None:
        self._free.pop(bisect.bisect_left(self._free, (block.size, block.address)))
        del self._blocks[block.address]


class CachingAllocator:
    """See the module. ``reserved_bytes`` is what the GPU has given, ``allocated_bytes`` the blocks that are in use.

    Args:
        expandable_segments: of ``PYTORCH_CUDA_ALLOC_CONF``.
        limit_bytes: that the GPU can give; None: no limit. Not with expandable segments, whose free pages go back one
            by one.

    Raises:
        InputError: a limit for expandable segments.
    """

    def __init__(self, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> None:
        if expandable_segments and limit_bytes is not None:
            raise InputError("limit_bytes with expandable_segments is not modelled: leave one of them out")
        self._limit_bytes = limit_bytes
        self._pools = {is_small: _Pool(is_small=is_small, expandable=expandable_segments) for is_small in (True, False)}
        self._pool_of: dict[Block, _Pool] = {}
        self.allocated_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Of all segments."""
        return sum(pool.reserved_bytes for pool in self._pools.values())

    def allocate(self, num_bytes: int) -> Block | None:
        """A block; None for an empty request.

        Raises:
            DoesNotFitError: the limit is reached.
        """
        if not num_bytes:
            return None
        size = rounded(num_bytes)
        pool = self._pools[size <= SMALL_SIZE]
        if self._limit_bytes is not None and self.reserved_bytes + pool.segment_bytes(size) > self._limit_bytes:
            for each in self._pools.values():
                each.give_back()
            if self.reserved_bytes + pool.segment_bytes(size) > self._limit_bytes:
                raise DoesNotFitError(f"{size} bytes beside {self.reserved_bytes} of {self._limit_bytes}")
        block = pool.allocate(size)
        self._pool_of[block] = pool
        self.allocated_bytes += block.size
        return block

    def release(self, block: Block | None) -> None:
        """Give back what :meth:`allocate` gave."""
        if block is not None:
            self.allocated_bytes -= block.size
            self._pool_of.pop(block).release(block)
