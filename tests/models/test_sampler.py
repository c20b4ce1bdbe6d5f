"""Does every sample come once an epoch, in steps that no world size, restart or machine can change?"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.sampler import BatchSampler
from sparse_zero.errors import InputError

WORLD_SIZES = (1, 2, 3, 5)


def make(num_samples=23, *, rank=0, world_size=1, **arguments):
    defaults = {"global_batch_size": 6, "micro_batch_size": 2, "seed": 0, "shuffle": True}
    return BatchSampler(num_samples, rank=rank, world_size=world_size, **{**defaults, **arguments})


@st.composite
def arguments(draw):
    num_samples = draw(st.integers(1, 40))
    return {
        "num_samples": num_samples,
        "global_batch_size": draw(st.integers(1, 12)),
        "micro_batch_size": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 2**40)),
        "shuffle": draw(st.booleans()),
        "lengths": draw(st.none() | st.lists(st.integers(1, 9), min_size=num_samples, max_size=num_samples)),
    }


@settings(deadline=None, max_examples=80)
@given(given_arguments=arguments())
def test_every_index_exactly_once_an_epoch(given_arguments):
    sampler = make(**given_arguments)
    steps = sampler.steps_per_epoch
    for epoch in range(2):
        plans = [sampler.step(epoch * steps + step) for step in range(steps)]
        assert {plan.epoch for plan in plans} == {epoch}
        seen = [index for plan in plans for index in plan.global_indices]
        assert sorted(seen) == list(range(given_arguments["num_samples"]))
        sizes = [len(plan.global_indices) for plan in plans]
        assert set(sizes[:-1]) <= {given_arguments["global_batch_size"]}
        assert 1 <= sizes[-1] <= given_arguments["global_batch_size"]


@settings(deadline=None, max_examples=80)
@given(given_arguments=arguments(), step=st.integers(0, 30))
def test_union_over_ranks_is_the_global_batch_at_any_world_size(given_arguments, step):
    reference = make(**given_arguments).step(step)
    for world_size in WORLD_SIZES:
        samplers = [make(**given_arguments, world_size=world_size, rank=rank) for rank in range(world_size)]
        plans = [sampler.step(step) for sampler in samplers]
        assert {plan.global_indices for plan in plans} == {reference.global_indices}
        dealt = [index for plan in plans for batch in plan.micro_batches for index in batch]
        assert sorted(dealt) == sorted(reference.global_indices)
        assert {len(plan.micro_batches) for plan in plans} == {samplers[0].micro_batches_per_step}
        assert all(len(b) <= given_arguments["micro_batch_size"] for plan in plans for b in plan.micro_batches)
        # The micro-batches are the same too; only who computes them, and the empty ones, differ.
        in_order = [plan.micro_batches[m] for m in range(len(plans[0].micro_batches)) for plan in plans]
        assert [batch for batch in in_order if batch] == [batch for batch in reference.micro_batches if batch]


@settings(deadline=None, max_examples=40)
@given(given_arguments=arguments(), steps=st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_a_step_depends_on_its_number_alone(given_arguments, steps):
    used = make(**given_arguments, world_size=2, rank=1)
    plans = [used.step(step) for step in steps]
    assert plans == [make(**given_arguments, world_size=2, rank=1).step(step) for step in steps]


def test_order_changes_with_epoch_and_seed_but_not_with_the_batch_sizes():
    def order(epoch, **given):
        sampler = make(**given)
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        return [index for step in steps for index in sampler.step(step).global_indices]

    assert order(0) != order(1)
    assert order(0, seed=1) != order(0, seed=2)
    assert order(1, global_batch_size=4, micro_batch_size=1) == order(1)
    assert order(3, shuffle=False) == list(range(23))


def test_shuffled_order_is_the_same_everywhere():
    """Written down: a resumed run must find the order that it left, on any version and machine."""
    assert make(10, global_batch_size=10, seed=7).step(0).global_indices == (6, 3, 4, 9, 0, 2, 8, 7, 5, 1)


def test_micro_batches_hold_like_lengths_longest_first():
    lengths = [3, 9, 1, 9, 5, 2]
    sampler = make(6, micro_batch_size=2, lengths=lengths, shuffle=False)
    assert sampler.step(0).micro_batches == ((1, 3), (4, 0), (5, 2))
    assert sampler.step(0).global_indices == (0, 1, 2, 3, 4, 5)


def test_ranks_take_turns_and_get_empty_micro_batches():
    plans = [make(7, world_size=3, rank=rank, global_batch_size=7, shuffle=False).step(0) for rank in range(3)]
    assert [plan.micro_batches for plan in plans] == [((0, 1), (6,)), ((2, 3), ()), ((4, 5), ())]


def test_last_batch_is_kept_smaller_or_dropped():
    kept, dropped = make(20, shuffle=False), make(20, shuffle=False, drop_last=True)
    assert (kept.steps_per_epoch, dropped.steps_per_epoch) == (4, 3)
    assert kept.step(3).global_indices == (18, 19)
    assert kept.step(3).micro_batches == ((18, 19), (), ())
    assert dropped.step(3).global_indices == (0, 1, 2, 3, 4, 5)
    assert dropped.step(3).epoch == 1
    assert make(18, drop_last=True).steps_per_epoch == make(18).steps_per_epoch == 3


@pytest.mark.parametrize(
    ("given_arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1"),
        ({"world_size": 0}, "world_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2: it must lie in 0 to 1"),
        ({"rank": -1}, "rank is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"lengths": [1, 2]}, "lengths has 2 entries for 23 samples"),
        ({"global_batch_size": 24, "drop_last": True}, "no batch would remain"),
    ],
)
def test_bad_arguments_are_named_errors(given_arguments, message):
    with pytest.raises(InputError, match=message):
        make(**given_arguments)


def test_steps_count_from_zero():
    with pytest.raises(ValueError, match="step is -1"):
        make().step(-1)


@pytest.mark.parametrize("lengths", [None, [index % 7 + 1 for index in range(23)]])
@pytest.mark.parametrize("world_size", [1, 2])
def test_cached_samples_stand_apart_from_the_others(lengths, world_size):
    plain, cached = (
        [make(lengths=lengths, rank=rank, world_size=world_size, num_cached=number) for rank in range(world_size)]
        for number in (None, 11)
    )
    for step in range(2 * plain[0].steps_per_epoch):
        before, after = ([each.step(step) for each in samplers] for samplers in (plain, cached))
        assert [each.global_indices for each in after] == [each.global_indices for each in before]
        dealt = [batch for plan in after for batch in plan.micro_batches if batch]
        assert sorted(index for batch in dealt for index in batch) == sorted(after[0].global_indices)
        assert sum(len({index < 11 for index in batch}) > 1 for batch in dealt) <= 1
        # In the order of the micro-batches over all ranks: first what is cached.
        in_order = [
            index >= 11
            for batches in zip(*(p.micro_batches for p in after), strict=True)
            for batch in batches
            for index in batch
        ]
        assert in_order == sorted(in_order)
    # All or nothing of it changes nothing.
    for number in (0, 23):
        assert make(lengths=lengths, num_cached=number).step(3) == make(lengths=lengths).step(3)
