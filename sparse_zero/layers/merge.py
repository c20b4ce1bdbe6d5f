"""How is a trained selection folded into a plain model, and taken out again bit for bit?"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import Carrier, carriers, parameter_name
from sparse_zero.layers.entries import add_wide, scatter_positions
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparse_parameter import stored_positions
from sparse_zero.layers.sparsify import ADAPTERS, by_parameter, replace_module, selection_of
from sparse_zero.module_map import Layout
from sparse_zero.selection.config import Kind
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.compat import has_shards


@dataclass(frozen=True, kw_only=True)
class MergeUndo:
    """What :func:`unmerge` needs: the entries that :func:`merge` overwrote, on the host."""

    selection: Selection
    # Parameter name to how it is stored.
    layouts: dict[str, Layout]
    # Parameter name to kind to the base's entries, 1-D in the weight's dtype.
    originals: dict[str, dict[Kind, Tensor]]
    # Parameter name to the int64 positions of its retired entries, and the base's entries there.
    retired: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def dense_linear(layer: SparseLinear) -> nn.Linear:
    """An ``nn.Linear`` over the same weight and bias tensors."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = layer.weight
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)


def remove(model: nn.Module, name: str, carrier: Carrier) -> None:
    """Take a carrier of values out of the model; what stands in its parameter stays."""
    if isinstance(carrier, SparseLinear):
        replace_module(model, name, dense_linear(carrier))
        return
    carrier.detach()
    parent, _, last = name.rpartition(".")
    delattr(model.get_submodule(parent), last)


def hooked_first(model: nn.Module) -> list[tuple[str, Carrier]]:
    """The carriers, those on the hook path first: a hooked bias lies inside a swapped linear."""
    return sorted(carriers(model), key=lambda item: isinstance(item[1], SparseLinear))


@torch.no_grad()
def fold(carrier: Carrier) -> None:
    """Write what acts, values and retired entries, into the carrier's whole parameter; call it once under delta."""
    if carrier.placement == "inplace":
        carrier.write_back()
        return
    for kind, values in carrier.values().items():
        carrier.set_entries(kind, add_wide(carrier.entries(kind), values))
    if carrier.retired is not None:
        entries = add_wide(carrier.retired_originals, carrier.retired.numbers)
        scatter_positions(carrier.parameter, carrier.retired.positions, entries)


@torch.no_grad()
def restore(carrier: Carrier) -> None:
    """Put the base's entries back into the carrier's whole parameter, bit for bit."""
    for kind, entries in carrier.originals.items():
        carrier.set_entries(kind, entries)
    if carrier.retired is not None:
        scatter_positions(carrier.parameter, carrier.retired.positions, carrier.retired_originals)


@torch.no_grad()
def merge(model: nn.Module) -> MergeUndo:
    """Make ``model`` plain again, in place: the values stand in the weights, the layers are ``nn.Linear``.

    Inplace weights are bit-equal to what training used; delta weights are ``W + values``, rounded once to the
    dtype of ``W``. Retired entries are folded in like values.

    Returns:
        What :func:`unmerge` needs: values x itemsize of the weights, on the host.

    Raises:
        InputError: no sparse linears, or weights that ZeRO-3 holds in shards.
    """
    selection = selection_of(model)
    found = hooked_first(model)
    if has_shards(model):
        raise InputError(
            "merge needs whole weights, and these are sharded by ZeRO-3: save the adapter, load it into "
            "an unsharded model, and merge there"
        )
    originals: dict[str, dict[Kind, Tensor]] = {}
    layouts: dict[str, Layout] = {}
    retired: dict[str, tuple[Tensor, Tensor]] = {}
    for name, carrier in found:
        parameter = parameter_name(name, carrier)
        originals[parameter] = dict(carrier.originals)
        layouts[parameter] = "out_in" if isinstance(carrier, SparseLinear) else carrier.layout
        if carrier.retired is not None:
            retired[parameter] = (carrier.retired.positions, carrier.retired_originals)
        fold(carrier)
        remove(model, name, carrier)
    # The merged weights are a base of their own: adapters loaded before do not belong to it.
    vars(model).pop(ADAPTERS, None)
    return MergeUndo(selection=selection, layouts=layouts, originals=originals, retired=retired)


@torch.no_grad()
def remove_values(model: nn.Module) -> None:
    """Take the values out of a sparsified model, in place: a plain model with the base's entries, bit for bit."""
    for name, carrier in hooked_first(model):
        if carrier.placement == "inplace":
            restore(carrier)
        remove(model, name, carrier)


@torch.no_grad()
def unmerge(model: nn.Module, undo: MergeUndo) -> None:
    """Put back, bit for bit, the entries that :func:`merge` overwrote; the model stays plain.

    Raises:
        InputError: a weight of ``undo`` is not in the model.
    """
    parameters = dict(model.named_parameters())
    missing = sorted({*undo.originals, *undo.retired} - set(parameters))
    if missing:
        raise InputError(f"the model has no weight {missing[0]}: the undo belongs to another model")
    chosen = by_parameter(undo.selection)
    for name, kinds in undo.originals.items():
        parameter = parameters[name]
        for kind, entries in kinds.items():
            positions = stored_positions(chosen[name], kind, undo.layouts[name], parameter.device)
            scatter_positions(parameter, positions, entries)
    for name, (positions, entries) in undo.retired.items():
        scatter_positions(parameters[name], positions, entries)
