"""Where do the values lie that the runs of a method train: in how many matrices, and in which layers?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_zero.module_map import layer_index
from sparse_zero.selection.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Places:
    """Of one run. What belongs to no layer, such as a head, is left out."""

    # Matrices and vectors that have values.
    num_weights: int
    # Number of values by the index of the layer.
    by_layer: Mapping[int, int]


def places_of(selection: Path) -> Places | None:
    """Those of a run's selection file; None where it has none (peers), or nothing lies in a layer.

    Raises:
        InputError: the file is damaged.
    """
    if not selection.is_file():
        return None
    by_layer: Counter[int] = Counter()
    num_weights = 0
    for name, chosen in Selection.load(selection).weights.items():
        layer = layer_index(name)
        if layer is not None and chosen.num_parameters:
            by_layer[layer] += chosen.num_parameters
            num_weights += 1
    return Places(num_weights=num_weights, by_layer=by_layer) if by_layer else None


def places_as_json(runs: Sequence[Places | None]) -> dict[str, Any] | None:
    """Of a method: ``weights``, how many have values in each run, and ``layers``, mean shares of the values.

    Args:
        runs: one for each seed; None of those whose places are not known.
    """
    known = [places for places in runs if places is not None]
    if not known:
        return None
    shares = [
        {layer: number / sum(places.by_layer.values()) for layer, number in places.by_layer.items()} for places in known
    ]
    highest = max(max(share) for share in shares)
    return {
        "weights": [places.num_weights for places in known],
        "layers": [sum(share.get(layer, 0.0) for share in shares) / len(shares) for layer in range(highest + 1)],
    }
