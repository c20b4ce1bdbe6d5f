"""How many floating-point operations does a step of a sparse model take?

Counted are matrix products and the two products of attention, at 2 operations for a multiplication and an addition, as
by PaLM (arXiv 2204.02311, appendix B), whose model FLOPs utilization (MFU) divides them by what a device can do at
most. For a model that is trained as a whole the sums here are its 6 N + 12 L H Q T for each token, but that N has no
embedding (which is looked up) and no norm. As there, attention counts every pair of tokens of a sample, also those that
a causal mask hides, and what gradient checkpointing computes again is no work of the model: it is told apart.

Of the backward pass of a sparse model only that is counted which it cannot do without:

- gradients of the inputs, from the head down to the lowest trained matrix, and none below it;
- gradients of the values: of each trained entry the sum over the tokens of one product.

A parameter on the hook path (:mod:`sparse_zero.layers.sparse_parameter`) forms more, its dense gradient: like padding,
that is no work of the model. Norms, activations, softmax, sums, the optimizer and write-back are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sparse_zero.layers.carriers import carriers, parameter_name, split_weight_name
from sparse_zero.module_map import (
    Matrix,
    ModuleMap,
    default_module_map,
    layer_index,
    parameter_shape,
    role_from_name,
)

if TYPE_CHECKING:
    from torch import nn

# Parameters of two or three dimensions that no token is multiplied with: biases of experts, and what state-space mixers
# have for each channel.
_NO_PRODUCTS = ("bias", "conv1d.weight", "A_log")


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix that tokens are multiplied with, or a stack of them of which each token meets some."""

    # Fully qualified name of the parameter.
    name: str
    in_features: int
    out_features: int
    # The decoder layer that it lies in; None outside of them.
    layer: int | None
    # Where it stands in the order of the model: an even number. Those that read the same tensor share their place.
    place: int
    role: Literal["attention", "head", "other"] = "other"
    # Matrices of the stack, and how many of them a token meets.
    num_slices: int = 1
    slices_per_token: int = 1
    # Trained entries of it.
    num_values: int = 0


@dataclass(frozen=True, kw_only=True)
class FlopShape:
    """What of a model decides how many operations its steps take."""

    # In the order of the model, the head last.
    products: tuple[Product, ...]
    # Place of the earliest trained parameter, whose gradient needs those of the inputs of all later places. One before
    # that of a product stands for what makes its input, a norm or an embedding. None: nothing is trained.
    lowest_trained: int | None
    # Tokens that attention looks back on, by layer; layers that are not in it look back on all.
    windows: Mapping[int, int]
    # Whether values are added to the product, which multiplies them once more in forward, and in backward.
    is_delta: bool = False

    def with_values(self, num_values: Mapping[str, int], *, is_delta: bool = False) -> FlopShape:
        """The same model with other trained entries, and no others than these.

        Args:
            num_values: trained entries by the names of weights, as a selection has them; of a stack, of each slice.
            is_delta: whether they are added to the products.

        Raises:
            ValueError: a name that is no product's.
        """
        by_parameter: dict[str, int] = {}
        for name, number in num_values.items():
            parameter, _ = split_weight_name(name)
            by_parameter[parameter] = by_parameter.get(parameter, 0) + number
        unknown = by_parameter.keys() - {product.name for product in self.products}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is no matrix that tokens are multiplied with")
        products = tuple(replace(each, num_values=by_parameter.get(each.name, 0)) for each in self.products)
        lowest = min((each.place for each in products if each.num_values), default=None)
        return replace(self, products=products, lowest_trained=lowest, is_delta=is_delta)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of a step by what they are for; no operation is in two of them but those of ``recomputed``."""

    # Products and attention of the layers.
    forward: int
    # Gradients of what the layers' products and attention read.
    input_gradients: int
    # Gradients of the trained entries of the layers.
    values_gradients: int
    # The head: its forward, and the gradients of its input and its trained entries.
    head: int
    # What gradient checkpointing does again, at most: torch ends a layer's second forward at the last tensor that
    # backward reads.
    recomputed: int

    @property
    def total(self) -> int:
        """Without what is recomputed: the model FLOPs of an MFU."""
        return self.forward + self.input_gradients + self.values_gradients + self.head


def flop_shape(model: nn.Module, module_map: ModuleMap | None = None) -> FlopShape:
    """The shape of a model as it stands: whatever requires a gradient in it is trained.

    Works on dense models, on those that :func:`sparse_zero.sparsify` has changed, with whole weights, shards of ZeRO-3
    or codes, and on the meta device. Which layers look back on a window only is read from ``model.config``, if there is
    one. Layers whose MLP reads what attention reads count as if it read what comes out of it, which makes a difference
    in the lowest trained layer only; there all of attention's backward is counted, whichever of q, k and v are trained.
    Of a stack of experts in three dimensions each token meets ``config.num_experts_per_tok``.

    Args:
        model: of any family whose layers are called once a step.
        module_map: of the model, if it is known already.
    """
    found = default_module_map(model) if module_map is None else module_map
    trained, is_delta = _trained(model)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    products: list[Product] = []
    # With what follows the layers, such as the pooler of an encoder.
    heads: list[Matrix] = []
    sharing = {name: number for number, group in enumerate(found.shared_inputs) for name in group}
    place, previous = -2, None
    for matrix in found.matrices:
        is_behind = bool(products) and matrix.name not in found.layer_of
        if is_behind or any(found.role_of[name] == "head" for name in matrix.names()):
            heads.append(matrix)
            continue
        if found.role_of[matrix.name] == "embedding" or matrix.parameter.endswith(_NO_PRODUCTS):
            continue
        group = sharing.get(matrix.name)
        place += 2 if group is None or group != previous else 0
        previous = group
        products.append(_product(matrix, found, place, trained, experts_per_token))
    for matrix in heads:
        place += 2
        products.append(replace(_product(matrix, found, place, trained, None), role="head", layer=None))
    return FlopShape(
        products=tuple(products),
        lowest_trained=lowest_place(trained, products, found),
        windows=_windows(config, found.num_layers),
        is_delta=is_delta,
    )


def _product(
    matrix: Matrix, found: ModuleMap, place: int, trained: Mapping[str, int], experts_per_token: int | None
) -> Product:
    num_slices = matrix.num_slices or 1
    return Product(
        name=matrix.parameter,
        in_features=matrix.shape[1],
        out_features=matrix.shape[0],
        layer=found.layer_of.get(matrix.name),
        place=place,
        role="attention" if found.role_of[matrix.name] == "attention" else "other",
        num_slices=num_slices,
        slices_per_token=num_slices if experts_per_token is None else min(experts_per_token, num_slices),
        num_values=trained.get(matrix.parameter, 0),
    )


def _trained(model: nn.Module) -> tuple[dict[str, int], bool]:
    """Trained entries of each parameter that has some; whether they are values under delta."""
    found: dict[str, int] = {}
    is_delta = False
    values: set[int] = set()
    for name, carrier in carriers(model):
        number = 0
        for each in carrier.values().values():
            values.add(id(each))
            number += _numel(each) if each.requires_grad else 0
        if number:
            found[parameter_name(name, carrier)] = number
            is_delta = is_delta or carrier.placement == "delta"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in values:
            found[name] = _numel(parameter)
    return found, is_delta


def _numel(parameter: nn.Parameter) -> int:
    number = 1
    for side in parameter_shape(parameter):
        number *= side
    return number


def lowest_place(parameters: Iterable[str], products: Sequence[Product], module_map: ModuleMap) -> int | None:
    """Place of the earliest of some parameters, as ``lowest_trained`` of a shape has it; None of none.

    Args:
        parameters: by their fully qualified names, of whatever is trained.
        products: of the model, in its order.
        module_map: of the model.
    """
    of_name: dict[str, int] = {}
    of_module: dict[str, int] = {}
    # None: what follows the layers.
    of_layer: dict[int | None, int] = {None: products[-1].place + 2 if products else 0}
    for product in reversed(products):
        of_name[product.name] = of_module[product.name.rpartition(".")[0]] = product.place
        if product.layer is not None or product.role == "head":
            of_layer[product.layer] = product.place
    embeddings = {
        matrix.parameter
        for matrix in module_map.matrices
        for name in matrix.names()
        if module_map.role_of[name] == "embedding"
    }

    def place(name: str) -> int:
        module, layer = name.rpartition(".")[0], layer_index(name)
        if name in embeddings:
            return -1
        if name in of_name:
            return of_name[name]
        if module in of_module:  # A bias, which is added to the product.
            return of_module[module]
        if layer is None and role_from_name(module) == "embedding":  # A norm of it, say.
            return -1
        # A norm: of a layer it counts as before its first product, outside of them as before the head.
        return of_layer.get(layer, of_layer[None]) - 1

    return min(map(place, parameters), default=None)


def _windows(config: Any, num_layers: int) -> dict[int, int]:
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window < 1:
        return {}
    kinds = getattr(config, "layer_types", None)
    return {layer: window for layer in range(num_layers) if kinds is None or kinds[layer] == "sliding_attention"}


def step_flops(
    shape: FlopShape,
    *,
    sample_lengths: Sequence[int],
    num_head_positions: int,
    first_layer: int = 0,
    gradient_checkpointing: bool = False,
) -> StepFlops:
    """Operations of a forward and a backward pass over some samples.

    Args:
        shape: of the model, with what is trained of it; a forward pass alone is that of a model without trained
            entries.
        sample_lengths: tokens of each sample, without padding; with it, what is computed for it is counted too.
        num_head_positions: tokens, over all samples, that logits are formed for.
        first_layer: the layers below are not run, and nothing before them: their output is known.
        gradient_checkpointing: whether every layer that backward goes through runs forward once more.

    Raises:
        ValueError: something is trained in what is not run.
    """
    tokens = sum(sample_lengths)
    lowest = shape.lowest_trained
    begin = _place_of_layer(shape, first_layer) if first_layer else 0
    if first_layer and lowest is not None and lowest < begin - 1:
        raise ValueError(f"first_layer is {first_layer}, but something is trained below it")
    again = _layers_of_backward(shape) if gradient_checkpointing else set()
    forward = inputs = values = head = recomputed = 0
    for product in shape.products:
        if product.place < begin:
            continue
        positions = num_head_positions if product.role == "head" else tokens
        entries = product.in_features * product.out_features * product.slices_per_token
        # Of a stack, a token meets its share of the values.
        of_values = 2 * positions * product.num_values * product.slices_per_token // product.num_slices
        through = 2 * positions * entries + (of_values if shape.is_delta else 0)
        backward = through if lowest is not None and lowest < product.place else 0
        if product.role == "head":
            head += through + backward + of_values
            continue
        forward, inputs, values = forward + through, inputs + backward, values + of_values
        recomputed += through if product.layer in again else 0
    for layer, width, place in _attentions(shape):
        if place < begin:
            continue
        window = shape.windows.get(layer)
        pairs = sum(length * (length if window is None else min(length, window)) for length in sample_lengths)
        # Scores, and the weighted sum of the values: each a product over all heads. Backward has two for each.
        forward += 4 * pairs * width
        inputs += 8 * pairs * width if lowest is not None and lowest < place else 0
        recomputed += 4 * pairs * width if layer in again else 0
    return StepFlops(forward=forward, input_gradients=inputs, values_gradients=values, head=head, recomputed=recomputed)


def _place_of_layer(shape: FlopShape, layer: int) -> int:
    """The first place of a layer, or of what follows the layers."""
    return min(
        each.place for each in shape.products if each.layer == layer or (each.layer is None and each.role == "head")
    )


def _layers_of_backward(shape: FlopShape) -> set[int]:
    lowest = shape.lowest_trained
    return {
        each.layer for each in shape.products if each.layer is not None and lowest is not None and lowest <= each.place
    }


def _attentions(shape: FlopShape) -> list[tuple[int, int, int]]:
    """(layer, width of all heads together, place) of each attention: of its last product, which reads what it gives."""
    last: dict[int, Product] = {}
    for product in shape.products:
        if product.role == "attention" and product.layer is not None:
            last[product.layer] = product
    return [(layer, product.in_features, product.place) for layer, product in last.items()]
