"""How far down does backward go for a selection, what does a step then cost, and how deep is worth it?

Input gradients are formed down to the lowest trained layer, and not below. A step has three passes of like cost for a
model that is trained as a whole (forward, gradients of inputs, gradients of weights); a sparse one has the first, and
the second down to there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from sparse_zero.collectives import of_rank_zero
from sparse_zero.errors import InputError
from sparse_zero.flops import FlopShape, lowest_place, step_flops
from sparse_zero.layers.carriers import split_weight_name
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.budget import Choice
from sparse_zero.selection.candidates import depth_of


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How far down a selection reaches."""

    # Lowest trained layer; -1: the embeddings, the number of layers: only what lies above them.
    lowest_layer: int
    # Modelled operations of a step (see sparse_zero.flops) without the values' own gradients, over those of a step
    # whose backward goes through all layers; at most 1.
    step_operations: float


def depth_of_weights(weights: Iterable[str], shape: FlopShape, module_map: ModuleMap) -> Depth:
    """How far down a step goes that trains these.

    Args:
        weights: at least one weight or vector, by its name in a selection.
        shape: of the model; what it says of trained entries is not read.
        module_map: of the model.
    """
    matrices = module_map.by_parameter()
    parameters = {split_weight_name(weight)[0] for weight in weights}
    names = {name: matrices[name].names() if name in matrices else [name] for name in parameters}
    lowest_layer = min(depth_of(each, module_map) for each in names.values())
    lowest = lowest_place(parameters, shape.products, module_map)
    assert lowest is not None

    def operations(place: int) -> int:
        # Of one token: attention, whose share grows with the length, is a like part of all layers.
        reaching = replace(shape.with_values({}), lowest_trained=place)
        return step_flops(reaching, sample_lengths=(1,), num_head_positions=1).total

    # Without a product (embeddings alone, say) there is nothing to save.
    share = operations(lowest) / operations(-1) if shape.products else 1.0
    return Depth(lowest_layer=lowest_layer, step_operations=share)


def choose_depth(
    depths: Iterable[int],
    choose_from: Callable[[int], Choice],
    captured: Callable[[Choice], float],
    operations: Callable[[Choice], float],
    tradeoff: float,
) -> tuple[int, Choice]:
    """The choice with the most captured score for its operations, and the layer that it was bounded by. Collective.

    Of equals the deeper one. A bound under which nothing can be chosen (a group without candidates, say) is passed
    over, but for the lowest.

    Args:
        depths: of the candidates: what may bound the choice.
        choose_from: the choice among candidates of a layer and above.
        captured: share of the score of all candidates that a choice captures.
        operations: of a step that trains a choice, over those of one through all layers.
        tradeoff: exponent of the operations.
    """
    found: list[tuple[int, Choice]] = []
    for lowest in sorted(set(depths)):
        try:
            found.append((lowest, choose_from(lowest)))
        except InputError:
            if not found:
                raise
    worth = [captured(choice) / operations(choice) ** tradeoff for _, choice in found]
    # The last bits of sums depend on the number of threads, and all ranks must decide alike.
    return found[int(of_rank_zero(torch.tensor(worth.index(max(worth)))))]
