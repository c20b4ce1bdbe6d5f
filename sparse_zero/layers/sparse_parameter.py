"""The hook path: how are selected entries of any parameter trained where no layer can be swapped?

Embedding rows, tied heads, transposed weights, experts held as one 3-D parameter, biases, norms. Whoever reads the
attribute of an owner gets the parameter (inplace) or a copy with the values added (delta), seen through an autograd
function of the values: its backward receives the dense gradient, keeps the selected entries as the gradient of the
values, and lets the rest go at once. The values are part of the graph, so ZeRO's own reduction sees them; a hook on the
parameter could not do that.

The owner gets a class derived from its own for that (as ``torch.nn.utils.parametrize`` does): its property computes
what is read, so that a read by another module counts too. Each read is a node of its own, whose dense gradient is gone
before the next one is formed. Under delta the reads of one forward of the owner share one copy.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.entries import add_wide
from sparse_zero.layers.recall import SharedCopy, saved_as_notes
from sparse_zero.layers.retired import RetiredEntries
from sparse_zero.layers.values_module import ValuesModule
from sparse_zero.module_map import VALUES_PREFIX, Layout
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import read_entries, write_whole


class _EntriesOf(torch.autograd.Function):
    """Dense numbers as they are, whose gradient goes to the values of some of the entries only."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, *positions_and_values: Tensor) -> Tensor:
        number = len(positions_and_values) // 2
        # Not as saved tensors: a recomputation under gradient checkpointing may read the parameter once more often.
        ctx.positions = positions_and_values[:number]
        ctx.dtypes = [values.dtype for values in positions_and_values[number:]]
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), positions = grad_outputs, ctx.positions
        selected = (_take(gradient, at).to(dtype) for at, dtype in zip(positions, ctx.dtypes, strict=True))
        return None, *(None for _ in positions), *selected


def _take(tensor: Tensor, positions: Tensor) -> Tensor:
    """Entries at row-major ``positions``, without a contiguous copy of a tensor that is transposed or expanded."""
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, positions)
    offsets, rest, reach = torch.zeros_like(positions), positions, 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offsets, rest, reach = offsets + rest % size * stride, rest // size, reach + (size - 1) * stride
    return tensor.as_strided((reach,), (1,)).index_select(0, offsets)


def stored_positions(
    selections: Mapping[int | None, WeightSelection], kind: Kind, layout: Layout, device: torch.device | None = None
) -> Tensor:
    """[number of values] int64: where in the parameter's memory the entries of ``kind`` lie, matrix after matrix."""
    found = []
    for number, selection in selections.items():
        if kind not in set(selection.kinds()):
            continue
        out_features, in_features = selection.shape
        positions = selection.flat_indices(kind)
        if layout == "in_out":
            positions = positions % in_features * out_features + positions // in_features
        found.append(positions + (number or 0) * out_features * in_features)
    return torch.cat(found).to(device)


class SparseParameter(ValuesModule):
    """The values of one parameter, on the hook path; a submodule ``sparse_<attribute>`` of the parameter's owner.

    ``values_block``, ``values_row``, ``values_column``, ``values_whole``: 1-D, matrix after matrix, each in the order
    that :mod:`sparse_zero.selection.regions` fixes.

    Args:
        parameter: contiguous, 1-D to 3-D; frozen here.
        owners: every module and attribute that holds it. They read through this until :meth:`detach`.
        selections: the regions of each matrix, by its number in a stack; None is the only one.
        layout: how each matrix is stored.
        placement: inplace (values stand in the parameter, start as its entries) or delta (they are added to a copy
            for the time of a forward, start at zero).
        values_dtype: of the values; default: the parameter's.

    Raises:
        InputError: an owner iterates over its submodules, of which this would be one.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        owners: list[tuple[nn.Module, str]],
        selections: Mapping[int | None, WeightSelection],
        layout: Layout,
        placement: Placement,
        *,
        values_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(placement)
        owner, self.attribute = owners[0]
        if isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise InputError(
                f"parameter {self.attribute} belongs to a {type(owner).__name__}, which iterates over its submodules: "
                "none can be added for values; hold the parameter in a module of its own, or do not select it"
            )
        parameter.requires_grad_(False)
        self.layout: Layout = layout
        # In a list, so that the owners do not become submodules of their own submodule.
        self._owners = owners
        self._selections = dict(sorted(selections.items(), key=lambda item: item[0] or 0))
        # Positions and numbers of the retired entries where the parameter is, under delta.
        self._retired_acting: tuple[Tensor, Tensor] | None = None
        present = {kind for selection in selections.values() for kind in selection.kinds()}
        for kind in KINDS:
            self.register_parameter(f"{VALUES_PREFIX}{kind}", None)
            self.register_buffer(f"positions_{kind}", None, persistent=False)
            if kind in present:
                positions = stored_positions(self._selections, kind, layout, parameter.device)
                self.register_buffer(f"positions_{kind}", positions, persistent=False)
                self.add_values(kind, self.entries(kind), values_dtype or parameter.dtype)
        # One for each forward of an owner that is being computed: the copy that its reads share.
        self._shared: list[SharedCopy] = []
        self.attach()

    @property
    def parameter(self) -> nn.Parameter:
        """The dense parameter."""
        owner, attribute = self._owners[0]
        found = owner._parameters[attribute]
        assert found is not None
        return found

    @property
    def owners(self) -> list[nn.Module]:
        """Every module that reads the parameter through this."""
        return [owner for owner, _ in self._owners]

    def selections(self) -> dict[int | None, WeightSelection]:
        """The regions of each matrix of the parameter, by its number in a stack."""
        return dict(self._selections)

    def _positions(self, kind: Kind) -> Tensor:
        positions: Tensor = getattr(self, f"positions_{kind}")
        return positions

    def positions(self, kind: Kind) -> Tensor:
        """[number of values] int64 on the host: where in the parameter's memory the entries of ``kind`` lie."""
        return self._positions(kind).cpu()

    def set_retired(self, entries: RetiredEntries, originals: Tensor) -> None:
        """Let ``entries`` act under delta; inplace they act by standing in the parameter, where the caller writes them.

        Args:
            entries: numbers in the form of this placement.
            originals: [n] the base's entries under them, on the host.
        """
        self.retired, self.retired_originals = entries, originals
        self._retired_acting = (entries.positions, entries.numbers) if self.placement == "delta" else None

    def _take(self, kind: Kind) -> Tensor:
        return read_entries(self.parameter, self._positions(kind))

    def _put(self, kind: Kind, values: Tensor) -> None:
        write_whole(self.parameter, self._positions(kind), values)

    @torch.no_grad()
    def _with_values(self) -> Tensor:
        """A copy of the parameter with everything added that acts under delta."""
        # In backward, too, what is sharded is gathered by then; or else here.
        combined = compat.fetch(self.parameter).clone(memory_format=torch.contiguous_format)
        added = [(self._positions(kind), compat.fetch(each)) for kind, each in self.values().items()]
        if self._retired_acting is not None:
            at, numbers = self._retired_acting
            self._retired_acting = (at.to(combined.device), numbers.to(combined.device))
            added.append(self._retired_acting)
        for at, numbers in added:
            # Rounded once, as a merge does.
            entries = combined.view(-1).index_select(0, at)
            combined.view(-1).index_copy_(0, at, add_wide(entries, numbers))
        return combined

    def read(self) -> Tensor:
        """What an owner's attribute gives: the parameter as it acts; its gradient reaches the values only."""
        dense: Tensor = self.parameter
        if self.suspended:
            return dense
        if self.placement == "delta":
            dense = self._shared[-1].get() if self._shared else self._with_values()
        trained = {kind: values for kind, values in self.values().items() if values.requires_grad}
        if not (trained and torch.is_grad_enabled()):
            return dense
        seen: Tensor = _EntriesOf.apply(dense, *(self._positions(kind) for kind in trained), *trained.values())
        return seen

    @contextmanager
    def sharing_reads(self) -> Iterator[SharedCopy]:
        """All reads in here share one copy of the parameter (delta)."""
        copy = SharedCopy(self._with_values)
        self._shared.append(copy)
        try:
            yield copy
        finally:
            self._shared.pop()
            # Notes for backward make it again.
            copy.drop()

    def attach(self) -> None:
        """Have the owners read the parameter through this, again after :meth:`detach`."""
        for owner, attribute in self._owners:
            _set_readers(owner, {**_readers(owner), attribute: self})

    def detach(self) -> None:
        """Give the owners their class back; the parameter acts alone again."""
        for owner, attribute in self._owners:
            _set_readers(owner, {name: sparse for name, sparse in _readers(owner).items() if name != attribute})

    def extra_repr(self) -> str:
        counts = ", ".join(f"{values.numel()} in {kind}" for kind, values in self.values().items())
        retired = "" if self.retired is None else f", {len(self.retired)} retired"
        return f"{self.attribute}, {self.placement}: {counts}{retired}"


# Attribute of an owner: by attribute that holds a parameter, the values it is read through.
_READERS = "_sparse_parameters"


def _readers(owner: nn.Module) -> dict[str, SparseParameter]:
    found: dict[str, SparseParameter] = owner.__dict__.get(_READERS, {})
    return found


def reads_values(owner: nn.Module) -> bool:
    """Whether some parameter of a module is read through values, whose gradient is formed for all of the parameter."""
    return bool(_readers(owner))


def _set_readers(owner: nn.Module, readers: dict[str, SparseParameter]) -> None:
    """Have the owner read these attributes, and no others, through values."""
    plain: Any = getattr(type(owner), "_plain_class", type(owner))
    if readers:
        owner.__dict__[_READERS] = readers
        owner.__class__ = _reading_class(plain, tuple(sorted(readers)))
    else:
        owner.__dict__.pop(_READERS, None)
        owner.__class__ = plain


@functools.cache
def _reading_class(plain: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """``plain`` with its name, whose instances read these attributes through values."""

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            readers = list(_readers(self).values())
            copies = [stack.enter_context(sparse.sharing_reads()) for sparse in readers]
            stack.enter_context(saved_as_notes(self, readers, copies))
            return plain.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The class has no importable name of its own: copies and pickles make it again.
        return _new_reading, (plain, attributes), self.__getstate__()

    def reader(attribute: str) -> property:
        return property(lambda self: _readers(self)[attribute].read())

    members: dict[str, Any] = {
        **{attribute: reader(attribute) for attribute in attributes},
        "_plain_class": plain,
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (plain,), members)


def _new_reading(plain: Any, attributes: tuple[str, ...]) -> nn.Module:
    made = _reading_class(plain, attributes)
    return made.__new__(made)
