"""Are means, deviations and intervals those of brute force and of the closed forms?"""

import itertools
import math
import statistics

import numpy
import pytest

from scripts.accuracy.study_statistics import (
    Spread,
    bootstrap_variance,
    is_within_one_deviation,
    paired_difference,
    resampled_means,
    spread,
)


def test_spread_is_mean_and_sample_deviation() -> None:
    values = [0.5, 0.75, 0.625, 1.0]
    found = spread(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert found.count == 4
    assert spread([0.5]).deviation is None
    with pytest.raises(ValueError, match="no value"):
        spread([])


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 4)])
def test_resampled_means_have_the_distribution_of_all_resamples(shape: tuple[int, int]) -> None:
    matrix = numpy.random.default_rng(5).integers(-1, 2, size=shape).astype(float)
    num_seeds, num_problems = shape
    every = [
        matrix[numpy.ix_(seeds, problems)].mean()
        for seeds in itertools.product(range(num_seeds), repeat=num_seeds)
        for problems in itertools.product(range(num_problems), repeat=num_problems)
    ]
    found = resampled_means(matrix, resamples=40_000, seed=1)
    # The distribution function at every value that can come.
    for value in sorted({round(each, 9) for each in every}):
        expected = numpy.mean(numpy.asarray(every) <= value + 1e-9)
        assert numpy.mean(found <= value + 1e-9) == pytest.approx(expected, abs=0.01)
    assert numpy.var(every) == pytest.approx(bootstrap_variance(matrix))


def test_variance_of_resampled_means_is_the_closed_form() -> None:
    matrix = numpy.random.default_rng(2).normal(size=(4, 60)) + numpy.asarray([[-0.4], [0.1], [0.2], [0.5]])
    found = resampled_means(matrix, resamples=20_000, seed=3)
    assert found.var() == pytest.approx(bootstrap_variance(matrix), rel=0.05)
    assert found.mean() == pytest.approx(matrix.mean(), abs=0.01)


def test_one_seed_has_the_interval_of_the_normal_distribution() -> None:
    # Of many problems and one seed, the bootstrap of a mean tends to mean ± 1.96 deviation / sqrt(n).
    generator = numpy.random.default_rng(0)
    ours, theirs = (generator.random((1, 900)) < share for share in (0.8, 0.7))
    differences = ours.astype(float) - theirs
    half = 1.96 * differences.std() / math.sqrt(900)
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - half, abs=0.003)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.003)
    assert (found.num_seeds, found.num_problems) == (1, 900)


def test_pairing_takes_out_what_both_share() -> None:
    hard = numpy.random.default_rng(0).random((1, 400)) < 0.5
    reference = numpy.repeat(hard, 3, axis=0)
    ours = reference.copy()
    ours[:, :8] = True
    reference[:, :8] = False
    found = paired_difference(ours, reference)
    assert found.mean == pytest.approx(0.02)
    assert 0 < found.low < 0.02 < found.high < 0.04
    # Unpaired, the same means would be told apart by no one: their deviation is 0.5 / sqrt(400) = 0.025 each.
    assert numpy.sqrt(bootstrap_variance(ours.astype(float))) > 0.02


def test_numbers_of_whole_runs_are_resampled_over_seeds() -> None:
    found = paired_difference([2.0, 2.1, 2.2], [2.1, 2.3, 2.5])
    assert found.mean == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.3)
    assert found.high == pytest.approx(-0.1)
    assert found.num_problems is None


def test_the_same_draws_every_time() -> None:
    matrix = numpy.random.default_rng(2).normal(size=(3, 20))
    assert numpy.array_equal(resampled_means(matrix, resamples=700), resampled_means(matrix, resamples=700))


@pytest.mark.parametrize(("ours", "theirs"), [([[1.0]], [1.0]), ([[1.0, 0.0]], [[1.0]]), ([], [])])
def test_what_is_not_paired_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(ours, theirs)


@pytest.mark.parametrize(
    ("mean", "higher", "expected"),
    [(0.89, True, True), (0.88, True, True), (0.87, True, False), (0.95, True, True), (0.91, False, True),
     (0.93, False, False), (0.1, False, True)],
)  # fmt: skip
def test_within_one_deviation(mean: float, higher: bool, expected: bool) -> None:
    full = Spread(mean=0.9, deviation=0.0200001, count=3)
    ours = Spread(mean=mean, deviation=0.5, count=3)
    assert is_within_one_deviation(ours, full, higher_is_better=higher) is expected
    assert is_within_one_deviation(ours, Spread(mean=0.9, deviation=None, count=1), higher_is_better=higher) is None
