"""Stochastic rounding: to a neighbour, unbiased, the same again for the same seed, step and name."""

import pytest
import torch

import sparse_zero as sz
from sparse_zero.zero.config import Placement
from sparse_zero.zero.rounding import check_rounding, key_of, round_stochastic, uniform_bits
from tests.sparse_zero.helpers import TinyModel, mixed_selection

DTYPES = [torch.bfloat16, torch.float16]


def mixed_numbers(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of all magnitudes that the dtype has, subnormal ones too, and both signs."""
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = (-26.0, 15.9) if dtype == torch.float16 else (-100.0, 100.0)
    exponents = torch.rand(20_000, generator=generator, dtype=torch.float64) * (highest - lowest) + lowest
    signs = torch.randint(0, 2, (20_000,), generator=generator) * 2 - 1
    return (signs * 2.0**exponents).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_number_becomes_one_of_its_neighbours(dtype):
    numbers = mixed_numbers(dtype)
    rounded = round_stochastic(numbers, dtype, 12345)
    assert rounded.dtype == dtype
    nearest = numbers.to(dtype)
    # The other neighbour is the next one on the far side of the number.
    far = torch.nextafter(nearest, torch.where(numbers > nearest.float(), torch.inf, -torch.inf).to(dtype))
    other = torch.where(nearest.float() == numbers, nearest, far)
    assert bool(((rounded == nearest) | (rounded == other)).all())
    assert 0.15 < float((rounded != nearest).float().mean()) < 0.35


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_has_stays(dtype):
    numbers = mixed_numbers(dtype).to(dtype)
    extremes = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min, torch.inf, -torch.inf])
    for exact in (numbers, extremes.to(dtype)):
        rounded = round_stochastic(exact.float(), dtype, 99)
        assert torch.equal(rounded.view(torch.int16), exact.view(torch.int16))
    assert round_stochastic(torch.tensor([torch.nan]), dtype, 1).isnan().all()
    # Beyond the largest number: as to nearest.
    beyond = torch.tensor([1e5, -1e5]) if dtype == torch.float16 else torch.tensor([3.4e38, -3.4e38])
    assert torch.equal(round_stochastic(beyond, dtype, 1), beyond.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1.001, -1.0077, 0.02345, -3.1e-6, 2.0**-15 * 1.2345, 777.7])
def test_the_expectation_is_the_number(dtype, number):
    count = 200_000
    numbers = torch.full((count,), number)
    exact = float(numbers[0])
    rounded = round_stochastic(numbers, dtype, key_of(3, 17, "layers.0.values_block")).double()
    # Two values that lie a unit apart, taken with probabilities p and 1 - p: the mean's deviation is at most
    # unit / 2 / sqrt(count); 4.5 of them come by chance once in 10**5.
    unit = float(rounded.max() - rounded.min())
    assert unit > 0
    assert abs(float(rounded.mean()) - exact) <= 4.5 * unit / 2 / count**0.5


def test_small_changes_of_a_master_are_not_lost_on_average():
    """0.001 of a unit in each of 1,000 steps: nearest shows nothing until half of a unit, stochastic its share."""
    masters = torch.full((4_000,), 1.0)
    unit = 2.0**-7
    shares = []
    for step in range(1, 401):
        masters += 0.001 * unit
        rounded = round_stochastic(masters, torch.bfloat16, key_of(0, step, "w"))
        shares.append(float((rounded.float() - 1.0).mean()) / unit)
        assert bool((masters.bfloat16() == 1.0).all())
    assert shares[-1] == pytest.approx(0.4, abs=0.03)
    assert shares[199] == pytest.approx(0.2, abs=0.03)


def test_noise_depends_on_seed_step_and_name_and_on_the_place_only():
    numbers = mixed_numbers(torch.bfloat16)
    key = key_of(1, 2, "a")
    rounded = round_stochastic(numbers, torch.bfloat16, key)
    assert torch.equal(rounded, round_stochastic(numbers, torch.bfloat16, key_of(1, 2, "a")))
    for other in (key_of(2, 2, "a"), key_of(1, 3, "a"), key_of(1, 2, "b")):
        assert not torch.equal(rounded, round_stochastic(numbers, torch.bfloat16, other))
    # A rank that has a part of it rounds that part alike.
    parts = [round_stochastic(part, torch.bfloat16, key, 7_000 * n) for n, part in enumerate(numbers.split(7_000))]
    assert torch.equal(torch.cat(parts), rounded)


def test_the_hash_is_uniform_in_its_low_and_high_bits():
    bits = uniform_bits(1 << 16, key_of(0, 1, "x"))
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((bits >> shift) & 0xFF, minlength=256).double()
        # Chi-square with 255 degrees of freedom: mean 255, deviation 22.6.
        assert float(((counts - 256) ** 2 / 256).sum()) < 255 + 5 * 22.6
    flips = (uniform_bits(1 << 16, key_of(0, 2, "x")) ^ bits).double()
    assert float(flips.mean()) == pytest.approx(2**31, rel=0.02)


def test_stochastic_rounding_needs_something_to_round():
    cases: tuple[tuple[Placement, bool, str], ...] = (
        ("inplace", False, "inplace values in float32"),
        ("delta", True, "delta values in bfloat16"),
    )
    for placement, low, message in cases:
        model = TinyModel().to(torch.bfloat16 if low else torch.float32)
        sz.sparsify(model, mixed_selection(model), placement)
        check_rounding(model, "nearest")
        with pytest.raises(sz.InputError, match=message):
            check_rounding(model, "stochastic")
    model = TinyModel()
    sz.sparsify(model, mixed_selection(model), "inplace")
    # DeepSpeed casts them before there is anything to round.
    check_rounding(model, "stochastic", is_cast=True)
    with pytest.raises(sz.InputError, match="choose one of nearest, stochastic"):
        check_rounding(model, "up")  # type: ignore[arg-type]
    with pytest.raises(sz.InputError, match=r"to bf16 or fp16, not to torch\.float32"):
        round_stochastic(torch.ones(3), torch.float32, 0)
