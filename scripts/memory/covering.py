"""Which few combinations of settings let every two settings of different factors meet?

A greedy search: each combination takes one pair that has not met yet, and completes it so that as many others as
possible meet, too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Settings = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]
# Random completions of a pair, of which the best is taken.
_TRIES = 120


def _completions(
    factors: Mapping[str, tuple[Any, ...]],
    fixed: Mapping[str, Any],
    is_possible: Callable[[Settings], bool],
    chooser: random.Random,
) -> Iterator[Settings]:
    for _ in range(_TRIES):
        found = {name: fixed.get(name, chooser.choice(values)) for name, values in factors.items()}
        if is_possible(found):
            yield found


def pairs_of(combination: Mapping[str, Any]) -> set[Pair]:
    """All that meet in a combination."""
    return set(itertools.combinations(combination.items(), 2))


def needed_pairs(
    factors: Mapping[str, tuple[Any, ...]],
    is_possible: Callable[[Settings], bool],
    is_needed: Callable[[Pair], bool] = lambda pair: True,
    seed: int = 0,
) -> set[Pair]:
    """Every two settings that can meet, and are to."""
    found = set()
    for one, other in itertools.combinations(factors, 2):
        for first, second in itertools.product(factors[one], factors[other]):
            pair = ((one, first), (other, second))
            if is_needed(pair):
                chooser = random.Random(seed)
                if next(_completions(factors, dict(pair), is_possible, chooser), None) is not None:
                    found.add(pair)
    return found


def covering(
    factors: Mapping[str, tuple[Any, ...]],
    is_possible: Callable[[Settings], bool],
    *,
    is_needed: Callable[[Pair], bool] = lambda pair: True,
    at_least: int = 0,
    seed: int = 0,
) -> list[Settings]:
    """Combinations in which all needed pairs meet, the same each time.

    Args:
        factors: settings by factor.
        is_possible: of a whole combination.
        is_needed: whether a pair is to meet.
        at_least: how many; filled up at random.
        seed: of the search.
    """
    chooser = random.Random(seed)
    needed = needed_pairs(factors, is_possible, is_needed, seed)
    taken: list[Settings] = []
    while needed or len(taken) < at_least:
        fixed = dict(chooser.choice(sorted(needed, key=repr))) if needed else {}
        candidates = list(_completions(factors, fixed, is_possible, chooser))
        if not candidates:  # Rare: it was possible before.
            continue
        best = max(candidates, key=lambda each: len(pairs_of(each) & needed))
        needed -= pairs_of(best)
        if best not in taken:
            taken.append(best)
    return taken
