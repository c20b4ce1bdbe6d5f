"""How is a trained selection folded into a plain model, and taken out again bit for bit?"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.entries import gather_entries, scatter_entries
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import ADAPTERS, replace_module, selection_of, sparse_linears
from sparse_zero.selection.config import Kind
from sparse_zero.selection.selection import Selection


@dataclass(frozen=True, kw_only=True)
class MergeUndo:
    """What :func:`unmerge` needs: the entries that :func:`merge` overwrote, on the host."""

    selection: Selection
    # Weight name to kind to the base's entries, 1-D in the weight's dtype.
    originals: dict[str, dict[Kind, Tensor]]


def dense_linear(layer: SparseLinear) -> nn.Linear:
    """An ``nn.Linear`` over the same weight and bias tensors."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = layer.weight
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)


@torch.no_grad()
def merge(model: nn.Module) -> MergeUndo:
    """Make ``model`` plain again, in place: the values stand in the weights, the layers are ``nn.Linear``.

    Inplace weights are bit-equal to what training used; delta weights are ``W + values``, rounded once to the
    dtype of ``W``.

    Returns:
        What :func:`unmerge` needs: values x itemsize of the weights, on the host.

    Raises:
        InputError: no sparse linears, or weights that ZeRO-3 holds in shards.
    """
    selection = selection_of(model)
    layers = list(sparse_linears(model))
    if any(hasattr(layer.weight, "ds_id") for _, layer in layers):
        raise InputError(
            "merge needs whole weights, and these are sharded by ZeRO-3: save the adapter, load it into "
            "an unsharded model, and merge there"
        )
    originals: dict[str, dict[Kind, Tensor]] = {}
    for name, layer in layers:
        originals[f"{name}.weight"] = dict(layer.originals)
        if layer.placement == "inplace":
            layer.write_back()
        else:
            for kind, values in layer.values().items():
                entries = gather_entries(layer.weight, layer.selection, kind)
                wide = torch.promote_types(torch.float32, entries.dtype)
                merged = (entries.to(wide) + values.to(wide)).to(entries.dtype)
                scatter_entries(layer.weight, layer.selection, kind, merged)
        replace_module(model, name, dense_linear(layer))
    # The merged weights are a base of their own: adapters loaded before do not belong to it.
    vars(model).pop(ADAPTERS, None)
    return MergeUndo(selection=selection, originals=originals)


@torch.no_grad()
def remove_values(model: nn.Module) -> None:
    """Take the values out of a sparsified model, in place: a plain model with the base's entries, bit for bit."""
    for name, layer in list(sparse_linears(model)):
        if layer.placement == "inplace":
            for kind, entries in layer.originals.items():
                scatter_entries(layer.weight, layer.selection, kind, entries)
        replace_module(model, name, dense_linear(layer))


@torch.no_grad()
def unmerge(model: nn.Module, undo: MergeUndo) -> None:
    """Put back, bit for bit, the entries that :func:`merge` overwrote; the model stays plain.

    Raises:
        InputError: a weight of ``undo`` is not in the model.
    """
    parameters = dict(model.named_parameters())
    missing = sorted(set(undo.originals) - set(parameters))
    if missing:
        raise InputError(f"the model has no weight {missing[0]}: the undo belongs to another model")
    for name, kinds in undo.originals.items():
        for kind, entries in kinds.items():
            scatter_entries(parameters[name], undo.selection.weights[name], kind, entries)
