"""How is a trained selection folded into a plain model, and taken out again bit for bit?"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import Carrier, carriers, parameter_name
from sparse_zero.layers.entries import add_wide, scatter_positions
from sparse_zero.layers.quantized_linear import QuantizedLinear, dense_module, plain_module
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparse_parameter import stored_positions
from sparse_zero.layers.sparsify import ADAPTERS, by_parameter, replace_module, selection_of
from sparse_zero.module_map import Layout
from sparse_zero.selection.config import Kind
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.compat import end_gathers, forget_quantization, has_shards, recall_quantization
from sparse_zero.zero.shards import whole_values


@dataclass(frozen=True, kw_only=True)
class MergeUndo:
    """What :func:`unmerge` needs: the entries that :func:`merge` overwrote, on the host, and quantized linears."""

    selection: Selection
    # Parameter name to how it is stored.
    layouts: dict[str, Layout]
    # Parameter name to kind to the base's entries, 1-D in the weight's dtype.
    originals: dict[str, dict[Kind, Tensor]]
    # Parameter name to the int64 positions of its retired entries, and the base's entries there.
    retired: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Module name to the quantized linear that a dense one stands for; its codes stay in memory as long as this.
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    # What transformers knew of the quantization.
    quantization: dict[str, Any] = field(default_factory=dict)


def dense_linear(layer: SparseLinear) -> nn.Linear | QuantizedLinear:
    """An ``nn.Linear`` over the same weight and bias tensors, or the quantized one."""
    if layer.quantization is not None:
        return QuantizedLinear(layer.parameter, layer._parameters.get("bias"), layer.quantization).train(layer.training)
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
    """Write what acts, values and retired entries, into the carrier's parameter; call it once under delta.

    Collective where ZeRO-3 holds it in shards.
    """
    if carrier.placement == "inplace":
        carrier.write_back()
        return
    found = carrier.values()
    for kind, values in zip(found, whole_values(found.values()), strict=True):
        carrier.set_entries(kind, add_wide(carrier.entries(kind), values))
    if carrier.retired is not None:
        entries = add_wide(carrier.retired_originals, carrier.retired.numbers)
        scatter_positions(carrier.parameter, carrier.retired.positions, entries)


@torch.no_grad()
def restore(carrier: Carrier) -> None:
    """Put the base's entries back into the carrier's parameter, bit for bit."""
    for kind, entries in carrier.originals.items():
        carrier.set_entries(kind, entries)
    if carrier.retired is not None:
        scatter_positions(carrier.parameter, carrier.retired.positions, carrier.retired_originals)


def _dequantize(model: nn.Module) -> tuple[dict[str, QuantizedLinear], dict[str, Any]]:
    """Make every quantized linear a plain one, those with values with what acts; what was there before."""
    found: dict[str, QuantizedLinear] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear) and module.quantization is not None:
            replaced = dense_linear(module)
            assert isinstance(replaced, QuantizedLinear)
            found[name] = replaced
            plain = plain_module(module.effective_weight(), replaced.bias, module.quantization.plain_class)
            replace_module(model, name, plain.train(module.training))
        elif isinstance(module, QuantizedLinear):
            found[name] = module
            replace_module(model, name, dense_module(module))
    return found, forget_quantization(model) if found else {}


@torch.no_grad()
def merge(model: nn.Module) -> MergeUndo:
    """Make ``model`` plain again, in place: the values stand in the weights, the layers are ``nn.Linear``.

    Inplace weights are bit-equal to what training used; delta weights are ``W + values``, rounded once to the
    dtype of ``W``. Retired entries are folded in like values.

    A quantized model becomes a plain one, too: every linear has the dense form of its codes, in the dtype that they
    were made from (that of the model, as transformers loads it), and where there are values ``W + values``, W being
    that dense form: added in fp32, and rounded once to that dtype. What quantization has rounded away stays away.

    What ZeRO-3 holds in shards stays in shards, each rank writing into its own; this is collective then. DeepSpeed's
    hooks, which gather the weights for forward, are on the sparse linears that go: the engine computes no more. What
    remains is to gather and save the parameters one by one, to :func:`unmerge`, or to make another engine.

    Returns:
        What :func:`unmerge` needs: values x itemsize of the weights, on the host; and the codes, where they are.

    Raises:
        InputError: no values, or codes that ZeRO-3 holds in shards.
    """
    selection = selection_of(model)
    frozen_codes = any(isinstance(each, QuantizedLinear) for each in model.modules())
    if has_shards(model) and (frozen_codes or any(carrier.has_codes for _, carrier in carriers(model))):
        raise InputError(
            "merge makes quantized weights dense, and these are sharded by ZeRO-3: save the adapter, load it into "
            "an unsharded model, and merge there"
        )
    end_gathers(model)
    originals: dict[str, dict[Kind, Tensor]] = {}
    layouts: dict[str, Layout] = {}
    retired: dict[str, tuple[Tensor, Tensor]] = {}
    for name, carrier in hooked_first(model):
        if carrier.has_codes:
            continue  # Its codes are not written into.
        parameter = parameter_name(name, carrier)
        originals[parameter] = dict(carrier.originals)
        layouts[parameter] = "out_in" if isinstance(carrier, SparseLinear) else carrier.layout
        if carrier.retired is not None:
            retired[parameter] = (carrier.retired.positions, carrier.retired_originals)
        fold(carrier)
        remove(model, name, carrier)
    quantized, quantization = _dequantize(model)
    # The merged weights are a base of their own: adapters loaded before do not belong to it.
    vars(model).pop(ADAPTERS, None)
    return MergeUndo(
        selection=selection,
        layouts=layouts,
        originals=originals,
        retired=retired,
        quantized=quantized,
        quantization=quantization,
    )


@torch.no_grad()
def remove_values(model: nn.Module) -> None:
    """Take the values out of a sparsified model, in place: a plain model with the base's entries, bit for bit."""
    for name, carrier in hooked_first(model):
        if carrier.placement == "inplace":
            restore(carrier)
        remove(model, name, carrier)


@torch.no_grad()
def unmerge(model: nn.Module, undo: MergeUndo) -> None:
    """Put back, bit for bit, the entries that :func:`merge` overwrote, and quantized linears; no values return.

    Raises:
        InputError: a weight of ``undo`` is not in the model.
    """
    parameters = dict(model.named_parameters())
    quantized = {f"{name}.weight" for name in undo.quantized}
    missing = sorted({*undo.originals, *undo.retired, *quantized} - set(parameters))
    if missing:
        raise InputError(f"the model has no weight {missing[0]}: the undo belongs to another model")
    for name, module in undo.quantized.items():
        replace_module(model, name, module.to(parameters[f"{name}.weight"].device))
    recall_quantization(model, undo.quantization)
    chosen = by_parameter(undo.selection)
    for name, kinds in undo.originals.items():
        parameter = parameters[name]
        for kind, entries in kinds.items():
            positions = stored_positions(chosen[name], kind, undo.layouts[name], parameter.device)
            scatter_positions(parameter, positions, entries)
    for name, (positions, entries) in undo.retired.items():
        scatter_positions(parameters[name], positions, entries)
