"""Which learning rate is best on the development data, and where does the grid go on?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two rates are the same candidate when they differ by less than this share.
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate, and what its tuning run reached; None where that failed or was not measured."""

    rate: float
    accuracy: float | None = None
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found for one task, method and budget."""

    rate: float
    # Whether the best is the lowest or highest candidate: a better one may lie beyond.
    at_edge: bool
    tried: tuple[Tried, ...]


def choose_rate(tried: Sequence[Tried], metric: str) -> Tuned | None:
    """The best candidate; None where none was measured.

    Args:
        tried: in any order.
        metric: ``accuracy``, whose ties go to the lower loss, or ``loss``; further ties go to the lower rate.
    """
    ordered = tuple(sorted(tried, key=lambda each: each.rate))

    def badness(each: Tried) -> tuple[float, float, float]:
        loss = math.inf if each.loss is None else each.loss
        first = loss if metric == "loss" else -(each.accuracy if each.accuracy is not None else -math.inf)
        return first, loss, each.rate

    known = [each for each in ordered if (each.loss if metric == "loss" else each.accuracy) is not None]
    if not known:
        return None
    best = min(known, key=badness)
    at_edge = len(ordered) > 1 and best.rate in (ordered[0].rate, ordered[-1].rate)
    return Tuned(rate=best.rate, at_edge=at_edge, tried=ordered)


def next_candidate(found: Tuned, metric: str) -> float:
    """One more candidate: a step beyond the edge that the best lies at, or between it and its better neighbour.

    Steps are factors: the one between the best and its neighbour at the edge, and the root of it inside.
    """
    rates = [each.rate for each in found.tried]
    at = rates.index(found.rate)
    if len(rates) == 1:
        return _rounded(found.rate * 2)
    if at in (0, len(rates) - 1):
        neighbour = rates[1] if at == 0 else rates[-2]
        return _rounded(found.rate * found.rate / neighbour)
    sides = choose_rate([found.tried[at - 1], found.tried[at + 1]], metric)
    return _rounded(math.sqrt(found.rate * (rates[at + 1] if sides is None else sides.rate)))


def is_known(rate: float, rates: Sequence[float]) -> bool:
    """Whether a rate is a candidate already."""
    return any(abs(rate - each) <= _SAME * each for each in rates)


def _rounded(rate: float) -> float:
    """With three digits, as people write them."""
    return float(f"{rate:.3g}")
