"""Does the model of PyTorch's allocator reserve what the rules in its source say?

Expected numbers follow from c10/cuda/CUDACachingAllocator.cpp, by hand; there was no GPU to ask.
"""

import itertools
import random

import pytest

from models.decoder_shapes import decoder_shape
from sparse_zero.errors import InputError
from sparse_zero.memory.caching_allocator import MIB, Block, CachingAllocator, DoesNotFitError
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.device import CONTEXT_BYTES, WORKSPACE_BYTES, device_overhead, needed_bytes, replay
from sparse_zero.memory.simulation.timeline import Span, Storage, Timeline
from tests.models.tiny import tiny_llama


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        # From the large pool: one segment of 20 MiB.
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        # Segments of their own; the rest of 2 MiB - 512 is split off, that of 1 MiB is not.
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB, 22 * MIB),
    ],
)
def test_one_request_takes_a_block_and_a_segment(num_bytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    allocator = CachingAllocator()
    for _ in range(2 * MIB // 512):
        allocator.allocate(100)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(100)
    assert allocator.reserved_bytes == 4 * MIB


def test_a_free_block_is_used_again_the_smallest_that_fits() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(16 * MIB)
    allocator.release(large)
    allocator.release(small)
    found = allocator.allocate(15 * MIB)
    assert found is small
    assert allocator.reserved_bytes == 56 * MIB
    # 40 MiB are free in one piece: what is split off is used, too.
    allocator.allocate(30 * MIB)
    allocator.allocate(10 * MIB)
    assert allocator.reserved_bytes == 56 * MIB


def test_free_neighbours_join_and_others_are_lost() -> None:
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved_bytes == 20 * MIB
    allocator.release(parts[0])
    allocator.release(parts[2])
    # 10 MiB are free, but not side by side.
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.release(parts[1])
    assert allocator.allocate(14 * MIB) is parts[0]
    assert allocator.reserved_bytes == 40 * MIB


def test_growing_requests_fragment_segments_but_not_expandable_ones() -> None:
    def reserved(expandable: bool) -> int:
        allocator = CachingAllocator(expandable_segments=expandable)
        held = None
        for size in (20, 40, 60, 80):
            # Each is a little longer than what the one before has left, as sequences of growing length are.
            allocator.release(held)
            held = allocator.allocate(size * MIB)
        return allocator.reserved_bytes

    assert reserved(False) == (20 + 40 + 60 + 80) * MIB
    assert reserved(True) == 80 * MIB


def test_an_expandable_segment_fills_holes_before_it_grows() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    first, _ = allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.release(first)
    assert allocator.allocate(25 * MIB) is first
    # 5 MiB of the hole are left, and nothing at the end.
    allocator.allocate(6 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.allocate(5 * MIB)
    assert allocator.reserved_bytes == 80 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_blocks_never_overlap_and_all_that_is_free_is_found_again(expandable: bool) -> None:
    chance, allocator = random.Random(0), CachingAllocator(expandable_segments=expandable)
    held: list[tuple[int, Block]] = []
    for _ in range(2000):
        if held and chance.random() < 0.5:
            allocator.release(held.pop(chance.randrange(len(held)))[1])
        else:
            num_bytes = int(2 ** chance.uniform(0, 26))
            block = allocator.allocate(num_bytes)
            assert block is not None
            assert block.size >= num_bytes
            held.append((num_bytes, block))
        for is_small in (True, False):
            spans = sorted((b.address, b.size) for n, b in held if (n <= MIB) == is_small)
            assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))
    assert sum(block.size for _, block in held) == allocator.allocated_bytes <= allocator.reserved_bytes
    reserved = allocator.reserved_bytes
    sizes = [num_bytes for num_bytes, _ in held]
    for _, block in held:
        allocator.release(block)
    assert allocator.allocated_bytes == 0
    # In an order of descending size, everything fits into what was there for it.
    for num_bytes in sorted(sizes, reverse=True)[:3]:
        allocator.allocate(num_bytes)
    assert allocator.reserved_bytes == reserved


def test_a_replayed_run_takes_segments_for_what_lies_on_the_device() -> None:
    storages = [
        Storage(num_bytes=30 * MIB, born=0, module="", kind="weights"),
        Storage(num_bytes=500 * MIB, born=1, module="", kind="optimizer", place="host"),
        Storage(num_bytes=3 * MIB, born=2, died=4, module="a", kind="activations"),
        Storage(num_bytes=100, born=3, died=5, module="a", kind="temporaries"),
    ]
    spans = [
        Span(phase="load", role="load", first=0, end=2),
        Span(phase="forward", role="forward", first=2, end=6),
    ]
    timeline = Timeline(storages, spans, ["", "", "a", "a", "a", "a"])
    found = replay(timeline)
    assert found.tensor_bytes == 33 * MIB + 100
    assert found.allocated_bytes == 33 * MIB + 512
    assert found.reserved_bytes == (30 + 20 + 2) * MIB
    assert found.reserved_after == {"load": 30 * MIB, "forward": 52 * MIB}
    assert found.overhead_bytes == 19 * MIB - 100
    assert timeline.peak(place="host").num_bytes == 500 * MIB
    # One range of 40 MiB holds both large ones.
    assert replay(timeline, expandable_segments=True).reserved_bytes == (40 + 2) * MIB


def test_at_its_limit_the_allocator_gives_back_whole_segments_only() -> None:
    allocator = CachingAllocator(limit_bytes=60 * MIB)
    large, _, part = allocator.allocate(30 * MIB), allocator.allocate(8 * MIB), allocator.allocate(8 * MIB)
    assert allocator.reserved_bytes == 50 * MIB
    allocator.release(large)
    allocator.release(part)
    # 30 MiB are free as a whole, 12 beside others: 40 fit, once the first went back.
    found = allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.release(found)
    with pytest.raises(DoesNotFitError, match="beside"):
        allocator.allocate(41 * MIB)
    with pytest.raises(InputError, match="expandable_segments"):
        CachingAllocator(expandable_segments=True, limit_bytes=MIB)


def test_what_a_run_needs_is_less_than_what_it_would_take() -> None:
    # Each of four tensors comes when the one before has gone.
    storages = [
        Storage(num_bytes=(20 + 20 * number) * MIB, born=2 * number, died=2 * number + 1, module="", kind="temporaries")
        for number in range(4)
    ]
    timeline = Timeline(storages, [Span(phase="forward", role="forward", first=0, end=8)], [""] * 8)
    assert replay(timeline).reserved_bytes == (20 + 40 + 60 + 80) * MIB
    assert needed_bytes(timeline) == 80 * MIB
    assert replay(timeline, limit_bytes=80 * MIB).reserved_bytes == 80 * MIB
    with pytest.raises(DoesNotFitError):
        replay(timeline, limit_bytes=80 * MIB - 1)


def test_the_estimate_follows_the_largest_tensor_that_comes_and_goes() -> None:
    shape = decoder_shape(tiny_llama(vocab=8000))

    def fragments(**job: object) -> int:
        return device_overhead(shape, MemoryJob(**{"micro_batch": 2, "length": 512, **job})).fragment_bytes  # type: ignore[arg-type]

    # Logits in fp32, of all positions but the last, or of fewer.
    assert fragments() == int(1.75 * 4 * 2 * 511 * 8000)
    assert fragments(label_positions=100) == int(1.75 * 4 * 2 * 100 * 8000)
    # One bucket of all gradients.
    assert fragments(method="full", length=1) == int(1.75 * 2 * shape.num_parameters)
    found = device_overhead(shape, MemoryJob(micro_batch=1, length=8))
    assert found.num_bytes == CONTEXT_BYTES + WORKSPACE_BYTES + found.fragment_bytes
