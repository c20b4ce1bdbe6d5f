"""How much slower is one method than another, and how sure is that? From times taken in turns, round by round.

A machine has slow seconds. Two times of one round were taken side by side, so their ratio is steadier than either;
the median over the rounds leaves out the rounds in which something came between. How sure the median is, says the
bootstrap: the same rounds, drawn again and again with repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_NUM_DRAWS = 2000
_SURE = (0.025, 0.975)  # a 95% interval
# Above it, a median may differ by more than the differences that the tables are read for.
NOISY = 0.02
# Fewer rounds cannot tell how sure their median is: their interval is too narrow.
MIN_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The times of one method over those of another, in the same rounds."""

    median: float  # of the ratios of the rounds
    lower_quartile: float
    upper_quartile: float
    low: float  # of the 95% interval of the median
    high: float
    of_minima: float  # smallest time over smallest time, whatever the rounds
    num_rounds: int

    def __str__(self) -> str:
        spread = (self.upper_quartile - self.lower_quartile) / 2
        return f"{self.median:.3f} ±{spread:.3f} ({self.of_minima:.3f})"


def paired(own: Sequence[float], reference: Sequence[float]) -> Ratio:
    """The ratio of two lists of seconds, one entry per round; the draws are the same in every call."""
    ratios = torch.tensor([a / b for a, b in zip(own, reference, strict=True)], dtype=torch.float64)
    lower, median, upper = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ratios), (_NUM_DRAWS, len(ratios)), generator=generator)
    low, high = ratios[draws].quantile(0.5, dim=1).quantile(torch.tensor(_SURE, dtype=torch.float64)).tolist()
    return Ratio(
        median=median,
        lower_quartile=lower,
        upper_quartile=upper,
        low=low,
        high=high,
        of_minima=min(own) / min(reference),
        num_rounds=len(ratios),
    )


def noise(control: Ratio) -> float:
    """By what share the ratio of two equal methods may be off: how far from 1 its interval reaches."""
    return max(abs(control.low - 1.0), abs(control.high - 1.0))


def noise_line(control: Ratio) -> str:
    """What the control says of the machine, in one line."""
    found = noise(control)
    if control.num_rounds < MIN_ROUNDS:
        return f"only {control.num_rounds} rounds: too few to tell the noise, and for any conclusion"
    if found > NOISY:
        return f"NOISY machine: the floor differs from itself by up to {found:.1%}; smaller differences mean nothing"
    return f"noise: the floor differs from itself by up to {found:.1%}"
