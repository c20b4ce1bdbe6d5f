"""How does a dense model become one that trains its selection only, and what is then trainable?"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sparse_zero.errors import InputError
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.module_map import ModuleMap, default_module_map
from sparse_zero.selection.candidates import check_trainable_linear, tied_names
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import PLACEMENTS, Placement

# Attributes of a model: the metadata of its selection, and the adapters loaded on it.
_METADATA = "_sparse_zero_selection_metadata"
ADAPTERS = "_sparse_zero_adapters"


def sparse_linears(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Every sparse linear of the model, by module name, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module


def selection_of(model: nn.Module) -> Selection:
    """The selection that the model's sparse linears carry, with the metadata that :func:`sparsify` was given.

    Raises:
        InputError: the model has none.
    """
    weights = {f"{name}.weight": layer.selection for name, layer in sparse_linears(model)}
    if not weights:
        raise InputError("the model has no sparse linears: call sparsify or load_adapter first")
    return Selection(weights, getattr(model, _METADATA, None))


def placement_of(model: nn.Module) -> Placement:
    """The placement of the model's sparse linears; they all have the same."""
    for _, layer in sparse_linears(model):
        return layer.placement
    raise InputError("the model has no sparse linears: call sparsify or load_adapter first")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is in ``model``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _keeps_input(selections: Mapping[str, WeightSelection], module_map: ModuleMap) -> dict[str, bool]:
    """For each module, whether keeping the whole input is cheaper than keeping slices of it.

    Modules that read one tensor are judged together: a whole input that one of them needs is free for the
    others, and slices that add up to more than the input are not worth taking.
    """
    group_of = {name: group for group in module_map.shared_inputs for name in group}
    decisions: dict[str, bool] = {}
    for module, selection in selections.items():
        group = group_of.get(module, (module,))
        members = [selections[name] for name in group if name in selections]
        width = sum(len(m.blocks[:, 1].unique()) * m.block_size + len(m.columns) for m in members)
        decisions[module] = any(len(m.rows) for m in members) or width >= selection.shape[1]
    return decisions


def check_fits(model: nn.Module, selection: Selection) -> None:
    """Raise if ``selection`` does not belong to a model like ``model``; nothing is changed.

    Raises:
        InputError: the model is sparse already, or a weight is missing, tied, or of another shape.
    """
    if any(True for _ in sparse_linears(model)):
        raise InputError("the model has sparse linears already: merge or unload them before another selection")
    tied = tied_names(model)
    for weight, chosen in selection.weights.items():
        linear = check_trainable_linear(model, weight.removesuffix(".weight"), tied)
        if tuple(linear.weight.shape) != chosen.shape:
            raise InputError(
                f"the selection has {weight} as {chosen.shape}, the model as {tuple(linear.weight.shape)}: "
                "it belongs to another model"
            )


def sparsify(
    model: nn.Module,
    selection: Selection,
    placement: Placement = "inplace",
    *,
    module_map: ModuleMap | None = None,
) -> None:
    """Freeze ``model`` and replace each selected ``nn.Linear`` by a :class:`SparseLinear`, in place.

    Afterwards only values require grad: ``selection.num_parameters`` entries in all.

    Args:
        model: dense model; every weight of ``selection`` must be the weight of an ``nn.Linear`` in it.
        selection: what is trained.
        placement: inplace or delta, see :class:`SparseLinear`.
        module_map: tells which linears share an input; default: read from module names.

    Raises:
        InputError: the selection is empty or does not fit the model; the model is unchanged then.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    if not selection.weights:
        raise InputError("the selection is empty: nothing would be trained")
    check_fits(model, selection)
    selections = {weight.removesuffix(".weight"): chosen for weight, chosen in selection.weights.items()}
    keeps_input = _keeps_input(selections, module_map or default_module_map(model))
    model.requires_grad_(False)
    # How the selection came about travels with the model into checkpoints and adapters.
    setattr(model, _METADATA, dict(selection.metadata))
    for name, chosen in selections.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(model, name, SparseLinear(linear, chosen, placement, keep_input=keeps_input[name]))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The values, by fully qualified name (``….q_proj.values_block``), in the order of the model."""
    return {
        f"{name}.values_{kind}": parameter
        for name, layer in sparse_linears(model)
        for kind, parameter in layer.values().items()
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
    for _, layer in sparse_linears(model):
        for kind, parameter in layer.values().items():
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


def write_back(model: nn.Module) -> None:
    """Copy the values of every inplace linear into its weight, after an optimizer step."""
    for _, layer in sparse_linears(model):
        layer.write_back()
