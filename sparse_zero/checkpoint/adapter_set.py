"""Which of several adapters acts on a base, and how are they exchanged bit for bit?

The base's entries under the active adapter are kept on the host by its layers; going to another adapter puts them
back, so that no sequence of exchanges changes the base.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_zero.checkpoint.adapter import PEFT_LAYER, Adapter, check_not_wrapped, read_adapter
from sparse_zero.checkpoint.conversion import RETIRED, check_base, convert_values, fingerprints, originals_by_name
from sparse_zero.checkpoint.headers import check_names, names_on
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers, values_name
from sparse_zero.layers.entries import gather_positions
from sparse_zero.layers.merge import remove_values
from sparse_zero.layers.quantized import dense_parameter
from sparse_zero.layers.sparsify import ADAPTERS, by_parameter, check_fits, live_positions, sparsify
from sparse_zero.module_map import default_module_map
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.compat import has_shards, whole
from sparse_zero.zero.config import PLACEMENTS, Placement


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    adapter: Adapter
    placement: Placement
    trainable: bool


@dataclass(kw_only=True)
class _AdapterSet:
    """The adapters of one model, by name, and the name of the active one."""

    loaded: dict[str, _Loaded] = field(default_factory=dict)
    active: str | None = None


def check_base_of(model: nn.Module, adapter: Adapter, placement: Placement) -> None:
    """Raise unless the ``model``, without values, is the base that the adapter was trained on, and bears it."""
    module_map = default_module_map(model)
    check_fits(model, adapter.selection, module_map, adapter.retired, sharded=has_shards(model), placement=placement)
    matrices = module_map.by_parameter()
    check_names(adapter.values, names_on(matrices, adapter.selection), adapter.source)
    grouped, retired = by_parameter(adapter.selection), adapter.retired.entries
    found: dict[str, dict[str, str]] = {}
    for name in {**grouped, **retired}:
        live = live_positions(grouped.get(name, {}), matrices.get(name))
        positions: dict[str, Tensor] = {str(kind): at for kind, at in live.items()}
        if name in retired:
            positions[RETIRED] = retired[name].positions
        with whole(model.get_parameter(name)):
            base = dense_parameter(model, name)
            found[name] = fingerprints({what: gather_positions(base, at) for what, at in positions.items()})
    check_base(adapter.base_fingerprints, found, adapter.source)


@torch.no_grad()
def _activate(model: nn.Module, loaded: _Loaded) -> None:
    """Put an adapter's values on the dense base."""
    adapter = loaded.adapter
    # As wide as they are stored, whatever the weights are: a bf16 weight cannot show all that was learned.
    dtype = reduce(torch.promote_types, (values.dtype for values in adapter.values.values()), torch.float32)
    sparsify(model, adapter.selection, loaded.placement, retired=adapter.retired, values_dtype=dtype)
    values = convert_values(adapter.values, originals_by_name(model), adapter.placement, loaded.placement)
    for name, carrier in carriers(model):
        for kind, parameter in carrier.values().items():
            numbers = values[values_name(name, kind)]
            parameter.copy_(numbers)
            parameter.requires_grad_(loaded.trainable)
            if loaded.trainable:
                carrier.loaded[kind] = numbers.float()
        carrier.write_back()


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    placement: Placement = "inplace",
    trainable: bool = False,
) -> Selection:
    """Put an adapter on its base, in place; it becomes the active one.

    Args:
        model: the base, dense or quantized, or one with other adapters loaded. On a quantized base the placement is
            delta, and the base's entries are those of its dense form. Where ZeRO-3 holds it in shards, this is
            collective.
        folder: what :func:`save_adapter` wrote.
        name: under which :func:`set_adapter` finds it again.
        placement: where the values shall act; the stored form is converted when it is the other one.
        trainable: whether the values require grad while it is active. They are fp32, and an engine in bf16 or fp16,
            which casts them, begins with their fp32 numbers as masters.

    Returns:
        The adapter's selection.

    Raises:
        InputError: not an adapter, damaged, of a newer version or of another base, the name is taken, inplace on a
            quantized base, or a model with adapters of PEFT; the model is unchanged then.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    check_not_wrapped(model)
    if hasattr(model, PEFT_LAYER):
        raise InputError("PEFT has put adapters on this model: load them all with PEFT, or unload its own first")
    adapters: _AdapterSet = getattr(model, ADAPTERS, None) or _AdapterSet()
    if name in adapters.loaded:
        raise InputError(f"an adapter named {name!r} is loaded already: give another name, or set_adapter to use it")
    # In shards, what follows is collective: a rank that cannot read must not leave the others waiting.
    with failing_together() if has_shards(model) else nullcontext():
        adapter = read_adapter(folder)
    before = adapters.active
    if before is not None:
        set_adapter(model, None)
    try:
        check_base_of(model, adapter, placement)
    except InputError:
        if before is not None:
            set_adapter(model, before)
        raise
    adapters.loaded[name] = _Loaded(adapter=adapter, placement=placement, trainable=trainable)
    setattr(model, ADAPTERS, adapters)
    try:
        set_adapter(model, name)
    except BaseException:
        del adapters.loaded[name]
        remove_values(model)  # What of it was on the model already.
        if before is not None:
            set_adapter(model, before)
        raise
    return adapter.selection


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make a loaded adapter the active one; None: none, the plain base bit for bit.

    Values that were trained since they were loaded belong to the model: save them first, for a change of the active
    adapter goes back to what was loaded.

    Raises:
        InputError: no adapter of that name is loaded; the model is unchanged then.
    """
    adapters: _AdapterSet = getattr(model, ADAPTERS, None) or _AdapterSet()
    if name is not None and name not in adapters.loaded:
        known = ", ".join(map(repr, adapters.loaded)) or "none"
        raise InputError(f"no adapter named {name!r} is loaded (loaded: {known}): call load_adapter first")
    if name == adapters.active:
        return
    if adapters.active is not None:
        remove_values(model)
        adapters.active = None
    if name is not None:
        _activate(model, adapters.loaded[name])
        adapters.active = name
