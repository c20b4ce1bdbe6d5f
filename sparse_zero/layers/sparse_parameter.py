"""The hook path: how are selected entries of any parameter trained where no layer can be swapped?

Embedding rows, tied heads, transposed weights, experts held as one 3-D parameter, biases, norms. While an owner of the
parameter computes its forward, the attribute holds the parameter seen through an autograd function of the values: its
forward returns the parameter itself (inplace) or a copy with the values added (delta), and its backward receives the
dense gradient, keeps the selected entries as the gradient of the values, and lets the rest go at once. The values are
part of the graph, so ZeRO's own reduction sees them; a hook on the parameter could not do that.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.module_map import VALUES_PREFIX, Layout
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.config import Placement


class _EntriesOf(torch.autograd.Function):
    """A dense parameter whose gradient goes to the values of some of its entries only."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, is_delta: bool, *positions_and_values: Tensor) -> Tensor:
        number = len(positions_and_values) // 2
        positions, values = positions_and_values[:number], positions_and_values[number:]
        ctx.save_for_backward(*positions)
        ctx.dtypes = [each.dtype for each in values]
        if not is_delta:
            return dense.view_as(dense)
        combined = dense.clone()
        for at, each in zip(positions, values, strict=True):
            combined.view(-1).index_add_(0, at, each.to(dense.dtype))
        return combined

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grad_outputs[0].reshape(-1)
        positions = ctx.saved_tensors
        selected = (gradient.index_select(0, at).to(dtype) for at, dtype in zip(positions, ctx.dtypes, strict=True))
        return None, None, *(None for _ in positions), *selected


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


class SparseParameter(nn.Module):
    """The values of one parameter, on the hook path; a submodule ``sparse_<attribute>`` of the parameter's owner.

    ``values_block``, ``values_row``, ``values_column``, ``values_whole``: 1-D in the parameter's dtype, matrix after
    matrix, each in the order that :mod:`sparse_zero.selection.regions` fixes.

    Args:
        parameter: contiguous, 1-D to 3-D; frozen here.
        owners: every module and attribute that holds it. Their forward is hooked until :meth:`detach`.
        selections: the regions of each matrix, by its number in a stack; None is the only one.
        layout: how each matrix is stored.
        placement: inplace (values stand in the parameter, start as its entries) or delta (they are added to a copy
            for the time of a forward, start at zero).
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        owners: list[tuple[nn.Module, str]],
        selections: Mapping[int | None, WeightSelection],
        layout: Layout,
        placement: Placement,
    ) -> None:
        super().__init__()
        parameter.requires_grad_(False)
        self.attribute = owners[0][1]
        self.layout: Layout = layout
        self.placement: Placement = placement
        # In a list, so that the owners do not become submodules of their own submodule.
        self._owners = owners
        self._selections = dict(sorted(selections.items(), key=lambda item: item[0] or 0))
        self.originals: dict[Kind, Tensor] = {}
        present = {kind for selection in selections.values() for kind in selection.kinds()}
        for kind in KINDS:
            self.register_parameter(f"{VALUES_PREFIX}{kind}", None)
            self.register_buffer(f"positions_{kind}", None, persistent=False)
            if kind in present:
                positions = stored_positions(self._selections, kind, layout, parameter.device)
                self.register_buffer(f"positions_{kind}", positions, persistent=False)
                entries = self.entries(kind)
                self.originals[kind] = entries.to("cpu", copy=True)
                if placement == "delta":
                    entries = torch.zeros_like(entries)
                self.register_parameter(f"{VALUES_PREFIX}{kind}", nn.Parameter(entries))
        self._hooks: list[Any] = []
        for owner, attribute in owners:
            self._hooks.append(owner.register_forward_pre_hook(_Show(self, attribute)))
            self._hooks.append(owner.register_forward_hook(_Hide(attribute), always_call=True))

    @property
    def parameter(self) -> nn.Parameter:
        """The dense parameter."""
        owner, attribute = self._owners[0]
        found = owner._parameters[attribute]
        assert found is not None
        return found

    def selections(self) -> dict[int | None, WeightSelection]:
        """The regions of each matrix of the parameter, by its number in a stack."""
        return dict(self._selections)

    def values(self) -> dict[Kind, nn.Parameter]:
        """The values that exist, by kind."""
        found = {kind: getattr(self, f"{VALUES_PREFIX}{kind}") for kind in KINDS}
        return {kind: parameter for kind, parameter in found.items() if parameter is not None}

    def _positions(self, kind: Kind) -> Tensor:
        positions: Tensor = getattr(self, f"positions_{kind}")
        return positions

    @torch.no_grad()
    def entries(self, kind: Kind) -> Tensor:
        """What stands in the parameter where the values of ``kind`` belong: 1-D, in their order."""
        return self.parameter.reshape(-1).index_select(0, self._positions(kind))

    @torch.no_grad()
    def set_entries(self, kind: Kind, values: Tensor) -> None:
        """Overwrite, in the parameter, what the values of ``kind`` stand for."""
        parameter = self.parameter
        values = values.detach().to(device=parameter.device, dtype=parameter.dtype)
        parameter.data.view(-1).index_copy_(0, self._positions(kind), values)

    def effective(self) -> Tensor:
        """The parameter as forward sees it; its gradient reaches the values only."""
        values = self.values()
        positions = [self._positions(kind) for kind in values]
        combined: Tensor = _EntriesOf.apply(self.parameter, self.placement == "delta", *positions, *values.values())
        return combined

    def write_back(self) -> None:
        """Copy the values into the parameter (inplace); nothing to do under delta."""
        if self.placement == "inplace":
            for kind, values in self.values().items():
                self.set_entries(kind, values)

    def detach(self) -> None:
        """Take the hooks off the owners; the parameter acts alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def extra_repr(self) -> str:
        counts = ", ".join(f"{values.numel()} in {kind}" for kind, values in self.values().items())
        return f"{self.attribute}, {self.placement}: {counts}"


class _Show:
    """Forward pre-hook: put the effective parameter where the owner's forward looks for it."""

    def __init__(self, sparse: SparseParameter, attribute: str) -> None:
        self.sparse, self.attribute = sparse, attribute

    def __call__(self, owner: nn.Module, args: Any) -> None:
        # An attribute of the instance is found before the registered parameter of the same name, which stays.
        owner.__dict__[self.attribute] = self.sparse.effective()


class _Hide:
    """Forward hook, also called after an error: take the effective parameter away again."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, owner: nn.Module, args: Any, output: Any) -> None:
        owner.__dict__.pop(self.attribute, None)
