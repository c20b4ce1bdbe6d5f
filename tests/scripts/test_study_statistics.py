"""Are means, deviations and intervals those of simulations and of the closed forms?"""

import math
import statistics

import numpy
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_ind, ttest_rel

from scripts.accuracy.study_statistics import (
    Spread,
    is_within_one_deviation,
    paired_difference,
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


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize(
    ("num_problems", "of_seeds", "of_problems", "of_rest"),
    [
        (16, 0.012, 0.0, 0.02),  # pieces of a text
        (16, 0.0, 0.03, 0.02),
        (200, 0.0, 0.2, 0.4),  # right and wrong answers
        (200, 0.03, 0.1, 0.3),
        (1, 1.0, 0.0, 0.0),  # numbers of whole runs
    ],
)
def test_an_interval_holds_what_it_estimates_as_often_as_it_says(
    num_seeds: int, num_problems: int, of_seeds: float, of_problems: float, of_rest: float
) -> None:
    generator = numpy.random.default_rng(7)
    held, number = 0, 600
    for _ in range(number):
        found = paired_difference(
            of_seeds * generator.normal(size=(num_seeds, 1))
            + of_problems * generator.normal(size=(1, num_problems))
            + of_rest * generator.normal(size=(num_seeds, num_problems)),
            numpy.zeros((num_seeds, num_problems)),
        )
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.0 <= found.high
    # Three deviations of the share below 95 %; above it, where an effect is none.
    assert 0.923 <= held / number <= 0.995


def test_numbers_of_whole_runs_have_the_interval_of_students_paired_test() -> None:
    ours, theirs = [2.0, 2.1, 2.2], [2.1, 2.3, 2.5]
    found = paired_difference(ours, theirs)
    known = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.mean == pytest.approx(-0.2)
    assert found.num_problems is None


def test_without_an_effect_of_seeds_it_is_that_of_the_problems() -> None:
    # Both methods were trained once, in truth: their seeds answer alike.
    generator = numpy.random.default_rng(0)
    ours, theirs = (numpy.repeat(generator.random((1, 900)) < share, 3, axis=0).astype(float) for share in (0.8, 0.7))
    found = paired_difference(ours, theirs)
    known = ttest_rel(ours[0], theirs[0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    # Of one seed, the same is all that is known.
    alone = paired_difference(ours[:1], theirs[:1])
    assert (alone.low, alone.high) == pytest.approx((known.low, known.high))
    assert (alone.num_seeds, alone.num_problems) == (1, 900)


def test_variances_are_those_of_the_analysis_of_variance() -> None:
    # Effects in closed form: a seed adds 0, 3 or 6; a problem 0 or 1; there is no rest.
    seeds, problems = numpy.asarray([0.0, 3.0, 6.0]), numpy.asarray([0.0, 1.0])
    found = paired_difference(seeds[:, None] + problems[None, :], numpy.zeros((3, 2)))
    # 9 / 3 of the seeds, 0.5 / 2 of the problems; Satterthwaite: (3 + 0.25)^2 / (9 / 2 + 0.0625 / 1).
    degrees = 3.25**2 / (9 / 2 + 0.25**2)
    half = student.ppf(0.975, degrees) * math.sqrt(3.25)
    assert (found.low, found.high) == pytest.approx((3.5 - half, 3.5 + half))


def test_weights_count_a_piece_as_often_as_it_says() -> None:
    matrix = numpy.random.default_rng(2).normal(size=(3, 8))
    zero = numpy.zeros((3, 8))
    even = paired_difference(matrix, zero)
    assert paired_difference(matrix, zero, weights=[2.0] * 8) == even
    found = paired_difference(matrix, zero, weights=[1, 1, 1, 1, 0, 0, 0, 0])
    assert found.mean == pytest.approx(matrix[:, :4].mean())


def test_pairing_takes_out_what_both_share() -> None:
    hard = numpy.random.default_rng(0).random((1, 400)) < 0.5
    reference = numpy.repeat(hard, 3, axis=0)
    ours = reference.copy()
    ours[:, :8] = True
    reference[:, :8] = False
    found = paired_difference(ours, reference)
    assert found.mean == pytest.approx(0.02)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < 0.02 < found.high < 0.04
    # Unpaired, the same means would be told apart by no one: their deviation is 0.5 / sqrt(400) = 0.025 each.
    unpaired = ttest_ind(ours[0].astype(float), reference[0].astype(float)).confidence_interval(0.95)
    assert unpaired.low < 0 < unpaired.high


def test_a_single_number_has_no_interval() -> None:
    found = paired_difference([2.0], [1.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)


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
