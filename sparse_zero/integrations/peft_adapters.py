"""How do several adapters stay ready on one model, with values that an optimizer may hold, while one of them acts?

:mod:`sparse_zero.checkpoint.adapter_set` makes the values of an adapter anew when it is activated, and keeps it on the
host meanwhile. PEFT's users expect more: a parameter that they hand to an optimizer stays the same one, whichever
adapter acts. Here each adapter keeps the modules that carry its values; to act, they are put into the model, and taken
out again, with the base's entries as they were.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.checkpoint.adapter import VALUES_DTYPES, Adapter, owner_digest, without_owner
from sparse_zero.checkpoint.adapter_set import check_base_of
from sparse_zero.checkpoint.conversion import convert_values, model_fingerprints
from sparse_zero.checkpoint.headers import check_values
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import Carrier, parameter_name, values_name
from sparse_zero.layers.entries import scatter_positions
from sparse_zero.layers.merge import fold, hooked_first, remove_values, restore
from sparse_zero.layers.quantized import dtype_of
from sparse_zero.layers.quantized_linear import adopt
from sparse_zero.layers.retired import Retired
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import ADAPTERS, METADATA, replace_module, sparsify
from sparse_zero.module_map import default_module_map
from sparse_zero.selection.selection import Selection
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement


def new_adapter(selection: Selection) -> Adapter:
    """An adapter that has not been trained: under delta, its values are zero."""
    return Adapter(
        selection=selection,
        placement="delta",
        values={},
        retired=Retired(placement="delta"),
        base_fingerprints={},
        source=Path("the new adapter"),
    )


@dataclass(kw_only=True, eq=False)
class ReadyAdapter:
    """One adapter of a model, with the modules that carry its values."""

    # As it was read; its values are dropped where those of the modules are the same numbers.
    adapter: Adapter
    placement: Placement
    # By module name, swapped linears first: a hooked bias lies inside one.
    carriers: dict[str, Carrier]

    def values(self) -> dict[str, nn.Parameter]:
        """The values, by name."""
        return {
            values_name(name, kind): parameter
            for name, carrier in self.carriers.items()
            for kind, parameter in carrier.values().items()
        }

    def _originals(self) -> dict[str, Tensor]:
        return {
            values_name(name, kind): carrier.originals[kind]
            for name, carrier in self.carriers.items()
            for kind in carrier.values()
        }

    def _retired(self) -> Retired:
        """The retired entries as they act."""
        entries = {
            parameter_name(name, carrier): carrier.retired
            for name, carrier in self.carriers.items()
            if carrier.retired is not None
        }
        return Retired(placement=self.placement, entries=entries)

    def described(self) -> Adapter:
        """What is stored beside the values; under delta without them."""
        if self.placement == "inplace":
            return self.adapter
        return dataclasses.replace(self.adapter, placement="delta", values={}, retired=self._retired())

    def as_adapter(self, state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
        """What is stored: inplace what was read, bit for bit; under delta the values as they are now.

        Args:
            state_dict: where a value of this name is found in it, that is taken.

        Raises:
            InputError: ZeRO-3 holds the values in shards, and they were not given.
        """
        if self.placement == "inplace":
            return self.adapter
        found = {name: (state_dict or {}).get(name, parameter) for name, parameter in self.values().items()}
        for name, tensor in found.items():
            if isinstance(tensor, nn.Parameter) and not compat.is_available(tensor):
                raise InputError(
                    f"{name} is in shards of ZeRO-3, and nobody has gathered it: set "
                    "zero_optimization.stage3_gather_16bit_weights_on_model_save, or use stage 2"
                )
        values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}
        return dataclasses.replace(self.described(), values=values)

    @torch.no_grad()
    def take_values(self, values: Mapping[str, Tensor], stored: Placement) -> None:
        """Copy values of the placement ``stored`` into the modules; they stand nowhere else yet."""
        # Inplace they are kept beside the weights that show them: on the host, wherever they were read to.
        values = {name: tensor.cpu() for name, tensor in values.items()}
        converted = convert_values(values, self._originals(), stored, self.placement)
        for name, parameter in self.values().items():
            parameter.copy_(converted[name])
        kept = values if self.placement == "inplace" else {}
        self.adapter = dataclasses.replace(self.adapter, values=kept)

    def read(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Take the content of a values file, see :func:`sparse_zero.checkpoint.adapter.stored_values`.

        Raises:
            InputError: they belong to another selection, or have other names or lengths.
        """
        owners = {"stored": owner_digest(self.adapter.selection, self.adapter.retired)}
        if self.placement != self.adapter.placement:
            owners["acting"] = owner_digest(self.adapter.selection, self._retired())
        owner, values = without_owner(tensors, owners, source)
        check_values(values, self.adapter.selection, source, dtypes=VALUES_DTYPES)
        if owner == "acting" and self.placement == "inplace":
            raise InputError(f"{source} has values of another placement: load the adapter under a new name")
        self.take_values(values, self.adapter.placement if owner == "stored" else self.placement)


def _share_weight(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` have the very weight and bias of ``source``."""
    for attribute in ("weight", "bias"):
        if attribute in source._parameters:
            target._parameters[attribute] = source._parameters[attribute]


@torch.no_grad()
def _stand(carrier: Carrier) -> None:
    """Write what acts inplace into the parameter: values and retired entries."""
    if carrier.placement == "inplace":
        carrier.write_back()
        if carrier.retired is not None:
            scatter_positions(carrier.parameter, carrier.retired.positions, carrier.retired.numbers)


class ReadyAdapters:
    """The adapters of one model, by name, of which one or none acts.

    Args:
        model: dense or quantized, without values; on the host or one device, not in shards.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, ReadyAdapter] = {}
        # Whose modules are in the model.
        self.acting: str | None = None
        # Whether what acts under delta stands in the weights for now.
        self.is_folded = False
        # By name of a swapped linear: what was there, and comes back.
        self._plain: dict[str, nn.Module] = {}
        # Linears of bitsandbytes that a QuantizedLinear stands for.
        self._adopted: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> ReadyAdapter:
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise InputError(f"no adapter named {name!r} is loaded (loaded: {known}): load it first")
        return self.adapters[name]

    # -- which one acts

    def act(self, name: str | None) -> None:
        """Let the adapter ``name`` act; None: the base alone, bit for bit.

        Raises:
            InputError: there is none of that name.
        """
        if name == self.acting and not self.is_folded:
            return
        entering = None if name is None else self[name]
        if self.acting is not None:
            self._take_out(self.adapters[self.acting])
            self.acting = None
        if entering is not None:
            self._put_in(entering)
            self.acting = name

    def fold(self) -> None:
        """Write what acts into the weights, which then act alone; once more does nothing."""
        if self.acting is None or self.is_folded:
            return
        for carrier in self.adapters[self.acting].carriers.values():
            if carrier.placement == "delta":
                if carrier.has_codes:
                    raise InputError(
                        "the base is quantized: nothing can be merged into its codes; use merge_and_unload, which "
                        "makes it dense"
                    )
                fold(carrier)
                carrier.suspended = True
        self.is_folded = True

    def unfold(self) -> None:
        """Undo :meth:`fold`, bit for bit; the adapter goes on acting."""
        if self.acting is not None and self.is_folded:
            for carrier in self.adapters[self.acting].carriers.values():
                if carrier.placement == "delta":
                    restore(carrier)
                    carrier.suspended = False
        self.is_folded = False

    def _take_out(self, ready: ReadyAdapter) -> None:
        self.unfold()
        for name, carrier in reversed(ready.carriers.items()):
            if carrier.placement == "inplace":
                restore(carrier)
            if isinstance(carrier, SparseLinear):
                plain = self._plain.pop(name)
                _share_weight(carrier, plain)
                replace_module(self.model, name, plain.train(carrier.training))
            else:
                carrier.detach()
                parent, _, last = name.rpartition(".")
                delattr(self.model.get_submodule(parent), last)

    def _put_in(self, ready: ReadyAdapter) -> None:
        for name, carrier in ready.carriers.items():
            if isinstance(carrier, SparseLinear):
                plain = self._plain[name] = self.model.get_submodule(name)
                _share_weight(plain, carrier)
                replace_module(self.model, name, carrier.train(plain.training))
            else:
                carrier.attach()
                replace_module(self.model, name, carrier)
            _stand(carrier)
        # As sparsify does, for whoever asks the model for its selection.
        setattr(self.model, METADATA, dict(ready.adapter.selection.metadata))

    # -- which ones there are

    def add(self, name: str, adapter: Adapter, *, is_trained: bool, placement: Placement | None = None) -> None:
        """Make an adapter ready; it does not act yet.

        Args:
            name: not taken.
            adapter: as it was read, or :func:`new_adapter`.
            is_trained: whether it shall be trained from now on: then it acts by delta, for nobody writes back.
            placement: where its values shall act; None: as stored, delta if it is trained or the base quantized.

        Raises:
            InputError: it does not fit the model, or belongs to another base, or cannot be trained inplace; the model
                is unchanged then.
        """
        if name in self.adapters:
            raise InputError(f"an adapter named {name!r} is loaded already: give another name, or delete it")
        if getattr(self.model, ADAPTERS, None) is not None:
            raise InputError("sz.load_adapter has put adapters on this model: load them all with PEFT, or none")
        if compat.has_shards(self.model):
            raise InputError(
                "ZeRO-3 holds the model in shards: load it whole for PEFT, or use sz.load_adapter, and to train "
                "sz.sparsify with SparseZeroCallback"
            )
        if is_trained and placement == "inplace":
            raise InputError(
                "placement 'inplace' needs values written back after each step, which PEFT does not do: use 'delta'"
            )
        acting, was_folded = self.acting, self.is_folded
        self.act(None)
        try:
            self.adapters[name] = self._make_ready(adapter, is_trained, placement)
        finally:
            self.act(acting)
            if was_folded:
                self.fold()

    def _make_ready(self, adapter: Adapter, is_trained: bool, placement: Placement | None) -> ReadyAdapter:
        model, is_new = self.model, not adapter.base_fingerprints
        if placement is None:
            matrices = default_module_map(model).by_parameter()
            names = {weight.partition("[")[0] for weight in adapter.selection.weights} | set(adapter.retired.entries)
            has_codes = any(name in matrices and matrices[name].is_quantized for name in names)
            placement = "delta" if is_trained or has_codes else adapter.placement
        if not is_new:
            check_base_of(model, adapter, placement)
        # As wide as PEFT has the parameters of its own methods; inplace as in sz.load_adapter.
        is_wide = placement == "delta" and dtype_of(model) != torch.float64
        # Before the swap: the linears of bitsandbytes do not come back when an adapter is taken out, these do.
        adopted = adopt(model)
        modules = dict(model.named_modules())
        try:
            sparsify(
                model,
                adapter.selection,
                placement,
                retired=adapter.retired,
                values_dtype=torch.float32 if is_wide else None,
            )
        except BaseException:
            remove_values(model)
            for name, module in adopted.items():
                model.set_submodule(name, module)
            raise
        self._adopted.update(adopted)
        found = dict(reversed(hooked_first(model)))
        if is_new:
            adapter = dataclasses.replace(adapter, base_fingerprints=model_fingerprints(model))
        ready = ReadyAdapter(adapter=adapter, placement=placement, carriers=found)
        self._plain = {name: modules[name] for name, carrier in found.items() if isinstance(carrier, SparseLinear)}
        if not is_new:
            ready.take_values(adapter.values, adapter.placement)
        for parameter in ready.values().values():
            parameter.requires_grad_(False)
        self._take_out(ready)
        return ready

    def remove(self, name: str) -> None:
        """Forget an adapter; if it acts, the base acts alone afterwards.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.adapters:
            self[name]
        if self.acting == name:
            self.act(None)
        del self.adapters[name]

    def read(self, name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Give an adapter the values of a file, see :meth:`ReadyAdapter.read`."""
        ready = self[name]
        ready.read(tensors, source)
        if self.acting == name:
            was_folded = self.is_folded
            self.unfold()
            for carrier in ready.carriers.values():
                _stand(carrier)
            if was_folded:
                self.fold()

    def unload(self) -> None:
        """Leave the model as it was before the first adapter, linears of bitsandbytes included."""
        self.act(None)
        self.adapters.clear()
        for name, module in self._adopted.items():
            self.model.set_submodule(name, module)
        self._adopted = {}

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Do to the modules outside of the model what ``nn.Module._apply`` does to those inside."""
        for name, ready in self.adapters.items():
            if name != self.acting:
                for carrier in ready.carriers.values():
                    carrier._apply(function)

    def check_finite(self) -> None:
        """Raise ValueError if what acts has a value that is no number."""
        values: dict[str, Any] = {} if self.acting is None else dict(self.adapters[self.acting].values())
        broken = [name for name, parameter in values.items() if not bool(torch.isfinite(parameter).all())]
        if broken:
            raise InputError(f"the adapter {self.acting!r} has values of {broken[0]} that are not finite: do not merge")
