"""How does a dense model become one that trains its selection only, and what is then trainable?"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import Carrier, carriers, parameter_name, split_weight_name, values_name
from sparse_zero.layers.entries import gather_positions, in_placement, scatter_positions
from sparse_zero.layers.quantized_linear import QuantizedLinear, adopt
from sparse_zero.layers.retired import Retired, RetiredEntries, check_entries
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparse_parameter import SparseParameter, stored_positions
from sparse_zero.module_map import Matrix, ModuleMap, default_module_map, parameter_shape, weight_name
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from sparse_zero.zero import compat
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.shards import whole_values

# Attributes of a model: the metadata of its selection, and the adapters loaded on it.
METADATA = "_sparse_zero_selection_metadata"
ADAPTERS = "_sparse_zero_adapters"


def selection_of(model: nn.Module) -> Selection:
    """The selection that the model's values follow, with the metadata that :func:`sparsify` was given.

    Raises:
        InputError: the model has none.
    """
    weights = {
        weight_name(parameter_name(name, carrier), number): chosen
        for name, carrier in carriers(model)
        for number, chosen in carrier.selections().items()
    }
    if not weights:
        raise InputError("the model has no values: call sparsify or load_adapter first")
    return Selection(weights, getattr(model, METADATA, None))


def placement_of(model: nn.Module) -> Placement:
    """The placement of the model's values; they all have the same."""
    for _, carrier in carriers(model):
        return carrier.placement
    raise InputError("the model has no values: call sparsify or load_adapter first")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is in ``model``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def keeps_input(
    selections: Mapping[str, WeightSelection], shared_inputs: Iterable[Iterable[str]] = ()
) -> dict[str, bool]:
    """For each module, whether keeping the whole input is cheaper than keeping slices of it.

    Modules that read one tensor are judged together: a whole input that one of them needs is free for the
    others, and slices that add up to more than the input are not worth taking.

    Args:
        selections: the regions of each module's weight.
        shared_inputs: groups of modules that read one tensor, as :class:`~sparse_zero.module_map.ModuleMap` has them.
    """
    group_of = {name: tuple(group) for group in shared_inputs for name in group}
    decisions: dict[str, bool] = {}
    for module, selection in selections.items():
        group = group_of.get(module, (module,))
        members = [selections[name] for name in group if name in selections]
        width = sum(len(m.blocks[:, 1].unique()) * m.block_shape[1] + len(m.columns) for m in members)
        decisions[module] = any(len(m.rows) for m in members) or width >= selection.shape[1]
    return decisions


def by_parameter(selection: Selection) -> dict[str, dict[int | None, WeightSelection]]:
    """The regions of each parameter: by its name, then by the number of the matrix in a stack."""
    found: dict[str, dict[int | None, WeightSelection]] = defaultdict(dict)
    for weight, chosen in selection.weights.items():
        parameter, number = split_weight_name(weight)
        found[parameter][number] = chosen
    return dict(found)


def live_positions(chosen: Mapping[int | None, WeightSelection], matrix: Matrix | None) -> dict[Kind, Tensor]:
    """int64 positions in a parameter's memory of the entries that a selection of it trains, by kind, in their order.

    Args:
        chosen: the regions of each matrix, by its number in a stack.
        matrix: the parameter's matrices; None for a vector.
    """
    present = {kind for selection in chosen.values() for kind in selection.kinds()}
    layout = "out_in" if matrix is None else matrix.layout
    return {kind: stored_positions(chosen, kind, layout) for kind in KINDS if kind in present}


def _check_entries_can_be_reached(model: nn.Module, name: str, parameter: nn.Parameter, matrix: Matrix) -> None:
    """Raise where entries cannot be written into a parameter, or read from its gradient, by their positions."""
    if not (matrix.is_quantized or compat.is_sharded(parameter) or parameter.is_contiguous()):
        raise InputError(
            f"{name} is not contiguous, so that its entries cannot be written where they lie: make it so first "
            "(parameter.data = parameter.data.contiguous())"
        )
    for owner, _ in matrix.owners:
        module = model.get_submodule(owner)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise InputError(
                f"{owner} is an embedding with sparse=True, whose gradients do not have every entry: set its attribute "
                "sparse to False"
            )


def check_fits(
    model: nn.Module,
    selection: Selection,
    module_map: ModuleMap | None = None,
    retired: Retired | None = None,
    *,
    sharded: bool = False,
    placement: Placement | None = None,
) -> None:
    """Raise if ``selection`` and ``retired`` do not belong to a model like ``model``; nothing is changed.

    Args:
        model: dense.
        selection: what is to be trained.
        module_map: default: read from names and classes.
        retired: what earlier selections trained.
        sharded: whether parameters that ZeRO-3 holds in shards are accepted.
        placement: that the values shall have; None: whichever the weights bear.

    Raises:
        InputError: the model is sparse already, a weight is missing, sharded, not contiguous, or of another shape, or
            quantized so that it cannot be trained, or not under that placement, or has sparse gradients, or an entry is
            both retired and selected.
    """
    if any(True for _ in carriers(model)):
        raise InputError("the model has values already: merge or unload them before another selection")
    module_map = module_map or default_module_map(model)
    matrices = module_map.by_parameter()
    parameters = dict(model.named_parameters())
    grouped, entries = by_parameter(selection), retired.entries if retired else {}
    for parameter in [*grouped, *(name for name in entries if name not in grouped)]:
        chosen = grouped.get(parameter, {})
        if parameter not in parameters:
            raise InputError(f"the model has no weight {parameter}: the selection belongs to another model")
        matrix = matrices.get(parameter)
        swapped = matrix is not None and matrix.is_linear
        if compat.is_sharded(parameters[parameter]) and not sharded:
            raise InputError(
                f"{parameter} is sharded by ZeRO-3: select and sparsify before the weights are partitioned"
            )
        if matrix is not None:
            _check_entries_can_be_reached(model, parameter, parameters[parameter], matrix)
        if matrix is not None and swapped and "forward" in vars(model.get_submodule(matrix.module)):
            raise InputError(
                f"{matrix.module} has a forward that something else has put there (such as accelerate's offloading), "
                "which a sparse linear would drop: sparsify the model first"
            )
        if matrix is not None and matrix.is_quantized and not swapped:
            raise InputError(
                f"{parameter} is quantized, and not in a linear of bitsandbytes: its entries cannot be trained; load "
                "the base in full precision"
            )
        if matrix is not None and matrix.is_quantized and placement == "inplace":
            raise InputError(
                f"{parameter} is quantized, and placement 'inplace' writes into it: use placement 'delta', which adds "
                "the values to the product, or load the base in full precision"
            )
        shape = (*parameter_shape(parameters[parameter]), 1)[:2] if matrix is None else matrix.shape
        last = (0 if matrix is None else matrix.num_slices or 0) - 1
        for number, regions in chosen.items():
            if regions.shape != shape or (number is None) != (last < 0) or (number or 0) > max(last, 0):
                found = shape if last < 0 else (last + 1, *shape)
                raise InputError(
                    f"the selection has {weight_name(parameter, number)} as {regions.shape}, the model has {found}: "
                    "it belongs to another model"
                )
        if parameter in entries:
            live = live_positions(chosen, matrix).values()
            taken = torch.cat([*live, torch.empty(0, dtype=torch.int64)])
            # Codes are fewer than the entries they stand for.
            check_entries(parameter, entries[parameter], math.prod(shape) * max(last + 1, 1), taken)


@torch.no_grad()
def _retire(carrier: Carrier, entries: RetiredEntries, stored: Placement) -> None:
    """Let retired entries, given in the form of the placement ``stored``, act in the parameter of ``carrier``."""
    weight = carrier.dense_weight() if isinstance(carrier, SparseLinear) else carrier.parameter
    originals = gather_positions(weight, entries.positions)
    numbers = in_placement(entries.numbers, originals, stored, carrier.placement)
    carrier.set_retired(RetiredEntries(positions=entries.positions, numbers=numbers), originals)
    if carrier.placement == "inplace":
        scatter_positions(carrier.parameter, entries.positions, numbers)


def _carrier_for(
    model: nn.Module,
    parameter: str,
    chosen: Mapping[int | None, WeightSelection],
    matrix: Matrix | None,
    placement: Placement,
    keep_input: bool,
    values_dtype: torch.dtype | None,
) -> Carrier:
    """Swap the linear, or hook the owners, of one parameter."""
    if matrix is not None and matrix.is_linear:
        linear = model.get_submodule(matrix.module)
        assert isinstance(linear, nn.Linear | QuantizedLinear)
        regions = chosen.get(None) or WeightSelection(shape=matrix.shape)
        swapped = SparseLinear(linear, regions, placement, keep_input=keep_input, values_dtype=values_dtype)
        replace_module(model, matrix.module, swapped)
        return swapped
    module, _, attribute = parameter.rpartition(".")
    places = ((module, attribute),) if matrix is None else matrix.owners
    owners = [(model.get_submodule(name), held) for name, held in places]
    held = owners[0][0]._parameters[attribute]
    assert held is not None
    layout = "out_in" if matrix is None else matrix.layout
    hooked = SparseParameter(held, owners, chosen, layout, placement, values_dtype=values_dtype)
    owners[0][0].add_module(f"sparse_{attribute}", hooked)
    return hooked


def sparsify(
    model: nn.Module,
    selection: Selection,
    placement: Placement = "inplace",
    *,
    retired: Retired | None = None,
    module_map: ModuleMap | None = None,
    values_dtype: torch.dtype | None = None,
) -> None:
    """Freeze ``model`` and make the selected entries trainable, in place.

    Each selected ``nn.Linear`` is replaced by a :class:`SparseLinear`; other parameters (embeddings, tied heads,
    transposed weights, experts, biases, norms) are hooked by a
    :class:`~sparse_zero.layers.sparse_parameter.SparseParameter`. Afterwards only values require grad:
    ``selection.num_parameters`` entries in all. The model may be sharded by ZeRO-3 already; this is collective then,
    and gathers the selected entries, not the parameters.

    Linears that bitsandbytes has quantized are trained under delta. All of them, selected or not, become linears that
    compute ``x @ W.T`` of the dense form of their codes, in training and evaluation: what a merged model computes.

    Args:
        model: dense model that has every weight of ``selection``, with the numbers of the base.
        selection: what is trained.
        placement: inplace or delta, see :class:`SparseLinear`.
        retired: entries that earlier selections trained, which act on, frozen; of either placement.
        module_map: tells which linears share an input, and layouts; default: read from names and classes.
        values_dtype: of the values, fp32 or bf16 say; default: their weight's, and over a quantized one its compute
            dtype (``bnb_4bit_compute_dtype``, the model's own for int8). DeepSpeed's bf16 and fp16 engines cast values
            to theirs, and keep fp32 masters.

    Raises:
        InputError: the selection is empty or does not fit the model; the model is unchanged then.
    """
    if values_dtype is not None and not values_dtype.is_floating_point:
        raise InputError(f"values_dtype is {values_dtype}: give a floating-point dtype, such as torch.float32")
    if placement not in PLACEMENTS:
        raise InputError(f"placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    if not selection.weights:
        raise InputError("the selection is empty: nothing would be trained")
    module_map = module_map or default_module_map(model)
    check_fits(model, selection, module_map, retired, sharded=True, placement=placement)
    adopt(model)
    entries = retired.entries if retired else {}
    matrices, grouped = module_map.by_parameter(), by_parameter(selection)
    linears = {
        matrices[parameter].name: chosen[None]
        for parameter, chosen in grouped.items()
        if parameter in matrices and matrices[parameter].is_linear
    }
    kept_whole = keeps_input(linears, module_map.shared_inputs)
    model.requires_grad_(False)
    # How the selection came about travels with the model into checkpoints and adapters.
    setattr(model, METADATA, dict(selection.metadata))
    # Linears first: a hooked bias belongs to the module that stands there afterwards.
    parameters = dict(model.named_parameters())
    names = sorted({*grouped, *entries})
    names.sort(key=lambda parameter: parameter not in matrices or not matrices[parameter].is_linear)
    for parameter in names:
        matrix = matrices.get(parameter)
        keep = matrix is not None and kept_whole.get(matrix.name, False)
        # Codes in shards have no dense form.
        is_quantized = matrix is not None and matrix.is_quantized
        with compat.whole(parameters[parameter]) if is_quantized else nullcontext():
            chosen = grouped.get(parameter, {})
            carrier = _carrier_for(model, parameter, chosen, matrix, placement, keep, values_dtype)
            if parameter in entries:
                assert retired is not None
                _retire(carrier, entries[parameter], retired.placement)


def retired_of(model: nn.Module) -> Retired:
    """The retired entries of a sparsified model, in the form of its placement; not to be changed."""
    found = {
        parameter_name(name, carrier): carrier.retired
        for name, carrier in carriers(model)
        if carrier.retired is not None
    }
    return Retired(placement=placement_of(model), entries=found)


def num_retired(model: nn.Module) -> int:
    """Entries that re-selections dropped and that act on, frozen; 0 for a model without values."""
    return sum(len(carrier.retired) for _, carrier in carriers(model) if carrier.retired is not None)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The values, by fully qualified name (``….q_proj.values_block``), in the order of the model.

    Each is 1-D: the entries of all regions of one kind in one weight, in the weight's dtype, in ``values_dtype`` of
    :func:`sparsify`, or in fp32 at least where :func:`sparse_zero.load_adapter` brought them. At ZeRO stage 3 a rank
    holds a part of each. A model without values, or whose values do not train, has none: the mapping is empty.
    """
    return {
        values_name(name, kind): parameter
        for name, carrier in carriers(model)
        for kind, parameter in carrier.values().items()
        if parameter.requires_grad
    }


def parameter_groups(
    model: nn.Module, per_kind: Mapping[Kind, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of the values, one per region kind.

    Args:
        model: a sparsified model.
        per_kind: settings of one kind's group, such as ``{"block": {"lr": 1e-4}, "row": {"weight_decay": 0.0}}``.

    Raises:
        InputError: a kind that does not exist or has no values, or a model without values.
    """
    groups: dict[Kind, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for _, carrier in carriers(model):
        for kind, parameter in carrier.values().items():
            if parameter.requires_grad:
                groups[kind].append(parameter)
    for kind in per_kind or {}:
        if not groups.get(kind):
            raise InputError(f"per_kind names {kind!r}, but the model trains no such values: remove it")
    found: list[dict[str, Any]] = [
        {"params": parameters, "kind": kind, **(per_kind or {}).get(kind, {})}
        for kind, parameters in groups.items()
        if parameters
    ]
    if not found:
        raise InputError("the model has no trainable values: call sparsify first")
    return found


@torch.no_grad()
def write_back(model: nn.Module) -> None:
    """Copy inplace values into the weights, after an optimizer step, rounded to the weights' dtype.

    Values under delta act without it: a model that has no others, or none at all, is left as it is, without an error.
    An engine does it after each of its steps by itself.

    At ZeRO stage 3 it is collective: the values are gathered, many at once, and every rank writes those that lie in its
    own shards. The weights are not gathered.
    """
    found = [
        (carrier, kind, values)
        for _, carrier in carriers(model)
        if carrier.placement == "inplace"
        for kind, values in carrier.values().items()
    ]
    sharded = any(compat.is_sharded(carrier.parameter) for carrier, _, _ in found)
    if sharded:
        compat.end_gathers(model)
    whole = whole_values(values for _, _, values in found)
    for (carrier, kind, _), values in zip(found, whole, strict=True):
        carrier.set_entries(kind, values)
    if sharded:
        compat.shards_are_written()
