"""What do a swapped linear and a hooked parameter have in common: values of one frozen parameter, and where they go?"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from sparse_zero.layers.retired import RetiredEntries
from sparse_zero.module_map import VALUES_PREFIX
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import ShardIndex, read_entries, whole_values, write_entries


class ValuesModule(nn.Module):
    """A module that carries the values of one dense parameter, which is frozen, as parameters ``values_<kind>``.

    The parameter is whole, or held in shards by ZeRO-3. A derived class says which one it is, and where in it the
    entries of each kind lie.

    Args:
        placement: inplace (values stand in the parameter, start as its entries) or delta (they are added, start at
            zero).
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement: Placement = placement
        # While True, the parameter acts alone, whatever the values and the retired entries say.
        self.suspended = False
        # Host copies of the base's entries: what unmerge puts back, what identifies the base, and what converts
        # values between the placements also where the parameter itself is sharded.
        self.originals: dict[Kind, Tensor] = {}
        # Host copies, fp32, of values that an adapter brought to be trained on: DeepSpeed casts values before it makes
        # masters of them, and these are what the masters begin with. The first engine takes them.
        self.loaded: dict[Kind, Tensor] = {}
        self.retired: RetiredEntries | None = None
        self.retired_originals = torch.empty(0)
        # Under ZeRO-3: what of the values this rank writes into its shards.
        self._shard_indices: dict[Kind, ShardIndex] = {}

    # -- what a derived class says

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """The dense parameter."""

    @abstractmethod
    def selections(self) -> dict[int | None, WeightSelection]:
        """The regions of each matrix of the parameter, by its number in a stack; None is the only one."""

    @abstractmethod
    def positions(self, kind: Kind) -> Tensor:
        """[number of values] int64 on the host: where in the parameter's memory the entries of ``kind`` lie."""

    @abstractmethod
    def set_retired(self, entries: RetiredEntries, originals: Tensor) -> None:
        """Let ``entries`` act under delta; inplace they act by standing in the parameter, where the caller writes them.

        Args:
            entries: numbers in the form of this placement.
            originals: [n] the base's entries under them, on the host.
        """

    @abstractmethod
    def _take(self, kind: Kind) -> Tensor:
        """The entries of ``kind`` in the whole parameter."""

    @abstractmethod
    def _put(self, kind: Kind, values: Tensor) -> None:
        """Overwrite the entries of ``kind`` in the whole parameter."""

    @property
    def has_codes(self) -> bool:
        """Whether nothing can be written into the parameter, for it holds codes of a quantized weight."""
        return False

    # -- what follows

    def values(self) -> dict[Kind, nn.Parameter]:
        """The values that exist, by kind."""
        found = {kind: getattr(self, f"{VALUES_PREFIX}{kind}", None) for kind in KINDS}
        return {kind: parameter for kind, parameter in found.items() if parameter is not None}

    def add_values(self, kind: Kind, entries: Tensor, dtype: torch.dtype) -> None:
        """Make the values of ``kind`` from the base's ``entries``, which are kept."""
        self.originals[kind] = entries if entries.is_meta else entries.to("cpu", copy=True)
        entries = torch.zeros_like(entries) if self.placement == "delta" else entries
        self.register_parameter(f"{VALUES_PREFIX}{kind}", nn.Parameter(entries.to(dtype)))

    @torch.no_grad()
    def entries(self, kind: Kind) -> Tensor:
        """What stands in the parameter where the values of ``kind`` belong: 1-D, in their order.

        Collective where the parameter is sharded, and then every rank gets all of them.
        """
        if compat.is_available(self.parameter):
            return self._take(kind)
        return read_entries(self.parameter, self.positions(kind))

    @torch.no_grad()
    def set_entries(self, kind: Kind, values: Tensor) -> None:
        """Overwrite, in the parameter, what the values of ``kind`` stand for.

        Where the parameter is sharded, every rank gives the same, and writes what lies in its own shards.

        Args:
            kind: of the values.
            values: 1-D, whole, in their order.
        """
        parameter = self.parameter
        if compat.is_sharded(parameter):
            if compat.is_out_of_reach(parameter):
                write_entries(parameter, self.positions(kind), values)
                return
            index = self._shard_indices.setdefault(kind, ShardIndex())
            index.write(parameter, lambda: self.positions(kind), values)
        # Also of a sharded one that is gathered at the moment, as small ones are between steps.
        if compat.is_available(parameter):
            self._put(kind, values)

    def write_back(self) -> None:
        """Copy the values into the parameter (inplace); nothing to do under delta. Collective if they are sharded."""
        if self.placement == "inplace":
            found = self.values()
            for kind, values in zip(found, whole_values(found.values()), strict=True):
                self.set_entries(kind, values)
