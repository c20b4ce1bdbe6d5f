"""Are ratios paired by round, and does their interval say how sure they are?"""

from __future__ import annotations

import random

import pytest

from scripts.benchmarks.ratios import NOISY, noise, noise_line, paired
from scripts.benchmarks.tables import Table


def test_ratios_are_of_one_round() -> None:
    """A machine that is four times as slow in some rounds changes no ratio."""
    reference = [4.0, 1.0, 1.0, 4.0, 1.0]
    ratio = paired([1.5 * seconds for seconds in reference], reference)
    assert (ratio.median, ratio.lower_quartile, ratio.upper_quartile) == (1.5, 1.5, 1.5)
    assert (ratio.low, ratio.high) == (1.5, 1.5)
    assert ratio.of_minima == 1.5


def test_quartiles_and_minima() -> None:
    ratio = paired([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 0.5])
    assert (ratio.lower_quartile, ratio.median, ratio.upper_quartile) == (2.0, 3.0, 4.0)
    assert ratio.of_minima == 2.0


@pytest.mark.slow
def test_the_interval_narrows_with_more_rounds_and_holds_the_truth() -> None:
    shuffler = random.Random(0)
    widths = {}
    for rounds in (10, 40, 160):
        held = 0
        width = 0.0
        for _ in range(100):
            own = [1.1 * shuffler.lognormvariate(0, 0.05) for _ in range(rounds)]
            ratio = paired(own, [1.0] * rounds)
            held += ratio.low <= 1.1 <= ratio.high
            width += (ratio.high - ratio.low) / 100
        widths[rounds] = width
        assert held >= 88, f"95% in the long run; of {rounds} rounds"
    assert widths[160] < 0.6 * widths[40] < 0.36 * widths[10]


def test_noise_is_how_far_equal_methods_may_differ() -> None:
    calm = paired([1.0, 1.001, 0.999] * 5, [1.0] * 15)
    assert noise(calm) <= 0.001 + 1e-9
    assert noise_line(calm).startswith("noise:")
    wild = paired([1.1] * 9, [1.0] * 9)
    assert noise(wild) == pytest.approx(0.1)
    assert noise(wild) > NOISY
    assert noise_line(wild).startswith("NOISY")
    assert noise_line(paired([1.0] * 4, [1.0] * 4)).startswith("only 4 rounds")


def test_markdown() -> None:
    assert Table("Title", ("a", "b"), [("x", "1")]).markdown() == "## Title\n\n| a | b |\n|---|---:|\n| x | 1 |\n"
