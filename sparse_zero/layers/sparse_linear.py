"""The module that stands in for a linear: frozen weight, and values that are trained in its place."""

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.entries import Places, add_wide, gather_at, scatter_at, scatter_positions
from sparse_zero.layers.functional import PLAIN, Plan, sparse_linear
from sparse_zero.layers.quantized import Quantization, dense_form
from sparse_zero.layers.quantized_linear import QuantizedLinear
from sparse_zero.layers.region_products import MOST_VIEWS, BlockPlan, Cell, reads_many_cells
from sparse_zero.layers.retired import RetiredEntries, RetiredProduct, retired_product
from sparse_zero.layers.values_module import ValuesModule
from sparse_zero.module_map import VALUES_PREFIX
from sparse_zero.selection.config import MATRIX_KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import read_entries


class SparseLinear(ValuesModule):
    """A linear of which only ``values_block``, ``values_row`` and ``values_column`` are trained.

    ``weight`` [out, in] and ``bias`` [out] are the dense module's own parameters, frozen, under the same
    state-dict keys. The values of each kind are 1-D, in the order that
    :mod:`sparse_zero.selection.regions` fixes. Over a quantized linear ``weight`` holds the codes, which stay as they
    are, and what is said of the weight's entries holds for its dense form.

    Args:
        linear: the dense or quantized module; its parameters are taken over, not copied.
        selection: the regions of its weight.
        placement: inplace (values stand in ``weight``, start as its entries; not if that holds codes) or delta (they
            are added to it, start at zero).
        keep_input: whether backward keeps the input whole instead of the slices it needs.
        values_dtype: of the values; default: the weight's, or the compute dtype of a quantized one.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    values_block: nn.Parameter | None
    values_row: nn.Parameter | None
    values_column: nn.Parameter | None
    block_rows: Tensor | None
    block_columns: Tensor
    strips: Tensor
    strip_of_block: Tensor
    rows: Tensor | None
    columns: Tensor | None
    owned_block: Tensor | None
    owned_row: Tensor | None
    owned_column: Tensor | None

    def __init__(
        self,
        linear: nn.Linear | QuantizedLinear,
        selection: WeightSelection,
        placement: Placement,
        *,
        keep_input: bool = False,
        values_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(placement)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.selection = selection
        self.keep_input = keep_input
        self._retired_product: RetiredProduct | None = None
        assert isinstance(linear.weight, nn.Parameter)
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        # What the codes in ``weight`` stand for; None where it is dense.
        self.quantization: Quantization | None = getattr(linear, "quantization", None)
        assert self.quantization is None or placement == "delta"
        if values_dtype is None:
            values_dtype = self.weight.dtype if self.quantization is None else self.quantization.compute_dtype
        for kind in MATRIX_KINDS:
            self.register_parameter(f"{VALUES_PREFIX}{kind}", None)
        self._register_indices()
        dense = self.dense_weight() if compat.is_available(self.weight) else None
        for kind in selection.kinds():
            if dense is None:
                entries = read_entries(self.weight, self.positions(kind))
            else:
                entries = gather_at(dense, self._places(kind))
            self.add_values(kind, entries, values_dtype)
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
        register("block_columns", selection.blocks[:, 1].contiguous() if has_blocks else None)
        register("strips", strips if has_blocks else None)
        register("strip_of_block", strip_of_block if has_blocks else None)
        register("rows", selection.rows if "row" in present else None)
        register("columns", selection.columns if "column" in present else None)
        # Many only where they are read: each one takes some hundred bytes of the host, and there may be millions.
        self._cells = self._list_cells() if len(selection.blocks) <= MOST_VIEWS else None
        # Of the last strips only, whether anything is chosen there: known here, so that no forward need ask.
        ends = [(selection.blocks[:, side] + 1) * selection.block_shape[side] for side in (0, 1)]
        self._is_cut = (bool((ends[0] > self.out_features).any()), bool((ends[1] > self.in_features).any()))
        for kind in MATRIX_KINDS:
            mask = selection.owned_mask(kind) if kind in present else None
            register(f"owned_{kind}", None if mask is None else mask.reshape(-1).nonzero().squeeze(1))

    def _list_cells(self) -> tuple[Cell, ...]:
        blocks = self.selection.blocks
        strip_of_block = blocks[:, 1].unique(return_inverse=True)[1]
        return tuple(Cell(*place) for place in torch.cat([blocks, strip_of_block.unsqueeze(1)], 1).tolist())

    def _cells_to_read(self) -> tuple[Cell, ...]:
        # What is traced reads none of them, and would be guarded by each.
        if torch.compiler.is_compiling():
            return ()
        if self._cells is None and self.block_rows is not None and reads_many_cells(self.block_rows):
            self._cells = self._list_cells()
        return self._cells or ()

    @property
    def plan(self) -> Plan:
        """Where the values lie, for the autograd function."""
        blocks = None
        if self.block_rows is not None:
            places = (self.block_rows, self.block_columns, self.strips, self.strip_of_block)
            blocks = BlockPlan(*self.selection.block_shape, *places, self._cells_to_read(), self._is_cut)
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
    def has_codes(self) -> bool:
        """Whether the weight is quantized."""
        return self.quantization is not None

    @property
    def parameter(self) -> nn.Parameter:
        """The dense parameter: the weight."""
        found = self._parameters["weight"]
        assert found is not None
        return found

    def dense_weight(self) -> Tensor:
        """[out, in]: the weight; of a quantized one, its dense form, in memory of its own."""
        return dense_form(self.weight, self.quantization)

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

    def _places(self, kind: Kind) -> Places:
        """Where the entries of ``kind`` lie, on the weight's device."""
        shape = (self.out_features, self.in_features)
        if kind == "block":
            return Places(
                kind, shape, self.selection.block_shape, self.block_rows, self.block_columns, self.owned_block
            )
        if kind == "row":
            return Places(kind, shape, (0, 0), self.rows, None, self.owned_row)
        return Places(kind, shape, (0, 0), None, self.columns, self.owned_column)

    def _take(self, kind: Kind) -> Tensor:
        return gather_at(self.dense_weight(), self._places(kind))

    def _put(self, kind: Kind, values: Tensor) -> None:
        assert self.quantization is None
        scatter_at(self.weight, self._places(kind), values)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """[out, in]: the dense form of a quantized weight with everything added that acts, in memory of its own.

        An entry and what is added to it are added in fp32, and rounded once to the dtype of the dense form.

        Raises:
            InputError: ZeRO-3 holds the codes or the values in shards.
        """
        assert self.quantization is not None
        if not all(compat.is_available(each) for each in (self.weight, *self.values().values())):
            raise InputError(
                "the codes or values of a quantized linear are in shards, so that what acts is not at hand: use a "
                "score that does not read the weight, or ZeRO stage 2"
            )
        weight = self.dense_weight()
        for kind, values in self.values().items():
            scatter_at(weight, self._places(kind), add_wide(gather_at(weight, self._places(kind)), values))
        if self.retired is not None:
            entries = add_wide(self.retired_originals, self.retired.numbers)
            scatter_positions(weight, self.retired.positions, entries)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.suspended:
            # Not torch's own linear: under ZeRO-3 that would keep the gathered weight for backward.
            return sparse_linear(x, self.weight, self.bias, None, None, None, PLAIN, self.quantization)
        values = (self.values_block, self.values_row, self.values_column)
        y = sparse_linear(x, self.weight, self.bias, *values, self.plan, self.quantization)
        return y if self._retired_product is None else y + retired_product(x, self._retired_product, y.dtype)

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{self.selection.num_regions(kind)} {kind}" for kind in self.selection.kinds())
        retired = "" if self.retired is None else f", {len(self.retired)} retired"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.placement}: {kinds}{retired}"
