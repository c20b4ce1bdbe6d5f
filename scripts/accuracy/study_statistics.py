"""How sure is a difference between two methods? Means, deviations, and intervals of paired differences.

Two methods that were trained with the same seeds and asked the same problems are compared pair by pair: what makes a
seed lucky or a problem hard is the same for both, and cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[numpy.float64]

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One number over seeds."""

    mean: float
    # Of the sample (divided by n - 1); None of a single one.
    deviation: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Method minus reference, over the seeds and problems that both have."""

    mean: float
    # Ends of its interval; None where a single number tells nothing of others.
    low: float | None
    high: float | None
    num_seeds: int
    # Test problems, or pieces of the data that a loss is taken on; None: what is compared are numbers of whole runs.
    num_problems: int | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no value to take a mean of")
    numbers = numpy.asarray(values, dtype=numpy.float64)
    deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
    return Spread(mean=float(numbers.mean()), deviation=deviation, count=len(numbers))


def paired_difference(
    values: ArrayLike, reference: ArrayLike, *, weights: ArrayLike | None = None, level: float = LEVEL
) -> Difference:
    """The mean of ``values - reference``, and an interval for other seeds and other problems.

    Seeds and problems are crossed random effects: a difference is the sum of what the method is better by, of what the
    seed adds, of what the problem adds, and a rest. Each has its variance from the means over the other (an analysis of
    variance), an effect whose estimate is negative has none, and the interval is Student's with the degrees of freedom
    of Satterthwaite (Biometrics Bulletin 2, 1946). A bootstrap of three seeds is too sure: its percentile interval
    covers 74 % where 95 % is said, for it knows nothing of what three cannot show.

    Args:
        values: [seeds, problems]: 1 where the method answered right, 0 where not; [seeds, pieces], the mean loss on
            each piece of the data; or [seeds], a number of each run.
        reference: the same of the other method, seeds and problems in the same order.
        weights: [problems]: labels of each piece; None: equal.
        level: how often the interval holds what it estimates.

    Raises:
        ValueError: the two are of different shapes, or empty.
    """
    ours, theirs = (numpy.asarray(each, dtype=numpy.float64) for each in (values, reference))
    if ours.shape != theirs.shape or ours.ndim not in (1, 2) or not ours.size:
        raise ValueError(f"values of shape {ours.shape} and {theirs.shape} are not paired by seeds (and problems)")
    has_problems = ours.ndim == 2
    matrix = ours - theirs if has_problems else (ours - theirs)[:, None]
    num_seeds, num_problems = matrix.shape
    weight: Floats = numpy.ones(num_problems) if weights is None else numpy.asarray(weights, dtype=numpy.float64)
    mean, variance, degrees = _mean_and_variance(matrix, weight / weight.sum())
    half = None
    if degrees > 0:
        half = float(stdtrit(degrees, (1 + level) / 2)) * math.sqrt(variance)
    return Difference(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        num_seeds=num_seeds,
        num_problems=num_problems if has_problems else None,
    )


def _mean_and_variance(matrix: Floats, weight: Floats) -> tuple[float, float, float]:
    """The mean of [seeds, problems], its variance, and the degrees of freedom of that; 0: one number tells nothing."""
    num_seeds, num_problems = matrix.shape
    of_seeds, of_problems = matrix @ weight, matrix.mean(axis=0)
    mean = float(of_seeds.mean())
    rest = matrix - of_seeds[:, None] - of_problems + mean
    # Variances of the mean: of its seeds and of its problems, each with the rest's in it, and of the rest alone.
    known = {}
    if num_seeds > 1:
        known["seeds"] = (float(of_seeds.var(ddof=1)) / num_seeds, num_seeds - 1)
    if num_problems > 1:
        enlarged = num_problems / (num_problems - 1)
        known["problems"] = (enlarged * float((weight**2 * (of_problems - mean) ** 2).sum()), num_problems - 1)
    if len(known) < 2:
        variance, degrees = next(iter(known.values()), (0.0, 0))
        return mean, variance, degrees
    degrees_of_rest = (num_seeds - 1) * (num_problems - 1)
    of_rest = enlarged * float((weight**2 * rest**2).sum()) / (num_seeds * (num_seeds - 1))
    variance = of_rest + sum(max(0.0, each - of_rest) for each, _ in known.values())
    spread_of_it = sum(each**2 / degrees for each, degrees in (*known.values(), (of_rest, degrees_of_rest)))
    if spread_of_it == 0.0:
        return mean, 0.0, num_seeds - 1
    return mean, variance, max(variance**2 / spread_of_it, num_seeds - 1)


def is_within_one_deviation(found: Spread, reference: Spread, *, higher_is_better: bool = True) -> bool | None:
    """Whether the mean is not worse than the reference's by more than the reference's deviation over seeds.

    None where the reference has no deviation: a single seed says nothing of it.
    """
    if reference.deviation is None or not math.isfinite(found.mean):
        return None
    lost = reference.mean - found.mean if higher_is_better else found.mean - reference.mean
    return lost <= reference.deviation


def as_json(value: Spread | Difference | None) -> dict[str, Any] | None:
    """Its fields, for a file."""
    return None if value is None else dict(vars(value))
