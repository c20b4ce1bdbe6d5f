"""How far down does backward go for a selection, what does a step then cost, and how deep is worth it?

Input gradients are formed down to the lowest trained layer, and not below. A step has three passes of like cost for a
model that is trained as a whole (forward, gradients of inputs, gradients of weights); a sparse one has the first, and
the second down to there.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from sparse_zero.collectives import of_rank_zero
from sparse_zero.errors import InputError
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.budget import Choice
from sparse_zero.selection.candidates import depth_of


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How far down a selection reaches."""

    # Lowest trained layer; -1: the embeddings, the number of layers: only what lies above them.
    lowest_layer: int
    # Modelled operations of a step over those of a step whose backward goes through all layers; at most 1.
    step_operations: float


def step_operations(lowest_layer: int, module_map: ModuleMap) -> float:
    """Operations of a step that trains nothing below ``lowest_layer``, over those of one that trains layer 0 too.

    A token costs two operations for each entry of the matrices it is multiplied with, in forward and again for the
    gradient of their input. Left out: attention's products of positions (a like part of every layer), the values' own
    gradients, recomputation. All experts of a layer count.
    """
    linears = set(module_map.linears)
    inside, above = [0] * module_map.num_layers, 0
    for matrix in module_map.matrices:
        entries = math.prod(matrix.shape) * (matrix.num_slices or 1)
        names = matrix.names()
        if 0 <= (layer := depth_of(names, module_map)) < module_map.num_layers:
            inside[layer] += entries
        elif not linears.isdisjoint(names):
            above += entries
    forward = sum(inside) + above
    backward = sum(inside[max(lowest_layer, 0) :]) + (above if lowest_layer < module_map.num_layers else 0)
    return (forward + backward) / (2 * forward) if forward else 1.0


def depth_of_weights(weights: Iterable[str], module_map: ModuleMap) -> Depth:
    """Of what is trained, at least one weight or vector by its name in a selection."""
    matrices = module_map.by_parameter()

    def names(weight: str) -> Sequence[str]:
        parameter = weight.partition("[")[0]
        return matrices[parameter].names() if parameter in matrices else [weight]

    lowest = min(depth_of(names(weight), module_map) for weight in weights)
    return Depth(lowest_layer=lowest, step_operations=step_operations(lowest, module_map))


def choose_depth(
    depths: Iterable[int],
    choose_from: Callable[[int], Choice],
    captured: Callable[[Choice], float],
    tradeoff: float,
    module_map: ModuleMap,
) -> tuple[int, Choice]:
    """The choice with the most captured score for its operations, and the layer that it was bounded by. Collective.

    Of equals the deeper one. A bound under which nothing can be chosen (a group without candidates, say) is passed
    over, but for the lowest.

    Args:
        depths: of the candidates: what may bound the choice.
        choose_from: the choice among candidates of a layer and above.
        captured: share of the score of all candidates that a choice captures.
        tradeoff: exponent of the operations.
        module_map: of the model.
    """
    found: list[tuple[int, Choice]] = []
    for lowest in sorted(set(depths)):
        try:
            found.append((lowest, choose_from(lowest)))
        except InputError:
            if not found:
                raise
    worth = [
        captured(choice) / depth_of_weights(choice.weights, module_map).step_operations ** tradeoff
        for _, choice in found
    ]
    # The last bits of sums depend on the number of threads, and all ranks must decide alike.
    return found[int(of_rank_zero(torch.tensor(worth.index(max(worth)))))]
