"""The module that stands in for a linear: frozen weight, and values that are trained in its place."""

import torch
from torch import Tensor, nn

from sparse_zero.layers.entries import gather_entries, scatter_entries
from sparse_zero.layers.functional import BlockPlan, Plan, sparse_linear
from sparse_zero.layers.retired import RetiredEntries, RetiredProduct, retired_product
from sparse_zero.module_map import VALUES_PREFIX
from sparse_zero.selection.config import MATRIX_KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.config import Placement

_PLAIN = Plan(blocks=None, rows=None, columns=None, owned=(None, None, None), keep_input=False, is_delta=False)


class SparseLinear(nn.Module):
    """A linear of which only ``values_block``, ``values_row`` and ``values_column`` are trained.

    ``weight`` [out, in] and ``bias`` [out] are the dense module's own parameters, frozen, under the same
    state-dict keys. The values of each kind are 1-D, in the order that
    :mod:`sparse_zero.selection.regions` fixes, in the weight's dtype.

    Args:
        linear: the dense module; its parameters are taken over, not copied.
        selection: the regions of its weight.
        placement: inplace (values stand in ``weight``, start as its entries) or delta (they are added to it,
            start at zero).
        keep_input: whether backward keeps the input whole instead of the slices it needs.
    """

    values_block: nn.Parameter | None
    values_row: nn.Parameter | None
    values_column: nn.Parameter | None
    block_rows: Tensor | None
    strips: Tensor
    strip_of_block: Tensor
    rows: Tensor | None
    columns: Tensor | None
    owned_block: Tensor | None
    owned_row: Tensor | None
    owned_column: Tensor | None

    def __init__(
        self, linear: nn.Linear, selection: WeightSelection, placement: Placement, *, keep_input: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.selection = selection
        self.placement: Placement = placement
        self.keep_input = keep_input
        # While True, forward is the plain linear of ``weight``, whatever the values and the retired entries say.
        self.suspended = False
        self.retired: RetiredEntries | None = None
        self.retired_originals = torch.empty(0)
        self._retired_product: RetiredProduct | None = None
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        # Host copies of the base's entries: what unmerge puts back, what identifies the base, and what converts
        # values between the placements also where the weight itself is sharded.
        self.originals: dict[Kind, Tensor] = {}
        for kind in MATRIX_KINDS:
            self.register_parameter(f"{VALUES_PREFIX}{kind}", None)
        for kind in selection.kinds():
            entries = gather_entries(self.weight, selection, kind)
            self.originals[kind] = entries if entries.is_meta else entries.to("cpu", copy=True)
            if placement == "delta":
                entries = torch.zeros_like(entries)
            self.register_parameter(f"{VALUES_PREFIX}{kind}", nn.Parameter(entries))
        self._register_indices()
        self.train(linear.training)

    def _register_indices(self) -> None:
        """Buffers of indices: they follow the module's device, and stay out of the state dict."""
        selection, device = self.selection, self.weight.device
        present = set(selection.kinds())

        def register(name: str, tensor: Tensor | None) -> None:
            self.register_buffer(name, None if tensor is None else tensor.to(device), persistent=False)

        has_blocks = "block" in present
        strips, strip_of_block = selection.blocks[:, 1].unique(return_inverse=True)
        register("block_rows", selection.blocks[:, 0].contiguous() if has_blocks else None)
        register("strips", strips if has_blocks else None)
        register("strip_of_block", strip_of_block if has_blocks else None)
        register("rows", selection.rows if "row" in present else None)
        register("columns", selection.columns if "column" in present else None)
        for kind in MATRIX_KINDS:
            mask = selection.owned_mask(kind) if kind in present else None
            register(f"owned_{kind}", None if mask is None else mask.reshape(-1).nonzero().squeeze(1))

    @property
    def plan(self) -> Plan:
        """Where the values lie, for the autograd function."""
        blocks = None
        if self.block_rows is not None:
            blocks = BlockPlan(*self.selection.block_shape, self.block_rows, self.strips, self.strip_of_block)
        return Plan(
            blocks=blocks,
            rows=self.rows,
            columns=self.columns,
            owned=(self.owned_block, self.owned_row, self.owned_column),
            keep_input=self.keep_input,
            is_delta=self.placement == "delta",
        )

    @property
    def attribute(self) -> str:
        """Name of the parameter that the values belong to, within this module."""
        return "weight"

    def selections(self) -> dict[int | None, WeightSelection]:
        """The regions of each matrix of the parameter; one matrix, without a number."""
        return {None: self.selection}

    @property
    def parameter(self) -> nn.Parameter:
        """The dense parameter: the weight."""
        found = self._parameters["weight"]
        assert found is not None
        return found

    def positions(self, kind: Kind) -> Tensor:
        """[number of values] int64 on the host: where in the weight's memory the entries of ``kind`` lie."""
        return self.selection.flat_indices(kind)

    def set_retired(self, entries: RetiredEntries, originals: Tensor) -> None:
        """Let ``entries`` act under delta; inplace they act by standing in the weight, where the caller writes them.

        Args:
            entries: numbers in the form of this placement.
            originals: [n] the base's entries under them, on the host.
        """
        self.retired, self.retired_originals = entries, originals
        is_delta = self.placement == "delta"
        self._retired_product = RetiredProduct(entries, (self.out_features, self.in_features)) if is_delta else None

    def entries(self, kind: Kind) -> Tensor:
        """What stands in the weight where the values of ``kind`` belong: 1-D, in their order."""
        return gather_entries(self.weight, self.selection, kind)

    def set_entries(self, kind: Kind, values: Tensor) -> None:
        """Overwrite, in the weight, what the values of ``kind`` stand for."""
        scatter_entries(self.weight, self.selection, kind, values)

    def values(self) -> dict[Kind, nn.Parameter]:
        """The values that exist, by kind."""
        found = {kind: getattr(self, f"{VALUES_PREFIX}{kind}") for kind in MATRIX_KINDS}
        return {kind: parameter for kind, parameter in found.items() if parameter is not None}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.suspended:
            # Not torch's own linear: under ZeRO-3 that would keep the gathered weight for backward.
            return sparse_linear(x, self.weight, self.bias, None, None, None, _PLAIN)
        y = sparse_linear(x, self.weight, self.bias, self.values_block, self.values_row, self.values_column, self.plan)
        return y if self._retired_product is None else y + retired_product(x, self._retired_product, y.dtype)

    def write_back(self) -> None:
        """Copy the values into the weight (inplace); nothing to do under delta."""
        if self.placement == "inplace":
            for kind, parameter in self.values().items():
                self.set_entries(kind, parameter)

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{self.selection.num_regions(kind)} {kind}" for kind in self.selection.kinds())
        retired = "" if self.retired is None else f", {len(self.retired)} retired"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.placement}: {kinds}{retired}"
