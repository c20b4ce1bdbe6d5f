"""Is the chosen learning rate the best on the development data, and is an edge seen and left?"""

import math

import pytest

from scripts.accuracy.study_tuning import Tried, choose_rate, is_known, next_candidate


def tried(*values: float | None, losses: tuple[float, ...] | None = None) -> list[Tried]:
    rates = (1e-4, 3e-4, 1e-3)
    chosen = losses or (None,) * len(values)
    return [
        Tried(rate=rate, accuracy=value, loss=loss) for rate, value, loss in zip(rates, values, chosen, strict=False)
    ]


@pytest.mark.parametrize(
    ("values", "losses", "metric", "rate", "at_edge"),
    [
        ((0.5, 0.7, 0.6), (3.0, 2.0, 1.0), "accuracy", 3e-4, False),
        ((0.5, 0.7, 0.6), (3.0, 2.0, 1.0), "loss", 1e-3, True),
        ((0.5, 0.7, 0.7), (3.0, 2.0, 1.0), "accuracy", 1e-3, True),
        ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0), "accuracy", 1e-4, True),
        ((0.5, None, 0.4), None, "accuracy", 1e-4, True),
    ],
)
def test_the_best_rate(values, losses, metric, rate, at_edge) -> None:
    found = choose_rate(list(reversed(tried(*values, losses=losses))), metric)
    assert found is not None
    assert (found.rate, found.at_edge) == (rate, at_edge)
    assert [each.rate for each in found.tried] == [1e-4, 3e-4, 1e-3]


def test_nothing_was_measured() -> None:
    assert choose_rate(tried(None, None), "accuracy") is None
    assert choose_rate([], "loss") is None


def test_a_single_candidate_is_no_edge() -> None:
    found = choose_rate(tried(0.5), "accuracy")
    assert found is not None
    assert not found.at_edge


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.7, 0.6, 0.5), 3.33e-5), ((0.5, 0.6, 0.7), 3.33e-3), ((0.5, 0.7, 0.6), math.sqrt(3e-4 * 1e-3)),
     ((0.6, 0.7, 0.5), math.sqrt(3e-4 * 1e-4))],
)  # fmt: skip
def test_one_more_candidate(values: tuple[float, ...], expected: float) -> None:
    found = choose_rate(tried(*values), "accuracy")
    assert found is not None
    more = next_candidate(found, "accuracy")
    assert more == pytest.approx(expected, rel=0.01)
    assert not is_known(more, [1e-4, 3e-4, 1e-3])
    assert is_known(1e-3 * (1 + 1e-9), [1e-4, 1e-3])
