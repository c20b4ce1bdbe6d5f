"""What does one linear keep of its input, and hold in its forward and backward, for each method of training?

The selection's are those of :mod:`sparse_zero.layers.functional`; LoRA's and DoRA's follow PEFT 0.19's layers
(``tuners/lora/layer.py``, ``tuners/lora/dora.py``) with their dropout at 0 and adapters in the dtype of activations,
as an engine for 16 bits has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_zero.layers.region_products import MOST_VIEWS
from sparse_zero.memory.closed_form.decoder_shape import LinearShape
from sparse_zero.memory.closed_form.steps import Sizes
from sparse_zero.memory.closed_form.trained import TrainedLinear

# Entries that share one constant of 4-bit codes.
_GROUP = 64


@dataclass(frozen=True, kw_only=True)
class LinearUse:
    """One linear of one layer, in bytes."""

    is_trained: bool = False
    # Whether backward keeps its whole input, which others may keep as well.
    keeps_input: bool = False
    # Whether that is so wherever the input requires grad, for a weight that needs none of it.
    keeps_graph: bool = False
    # Kept beside the input: slices of it, outputs of adapters.
    kept: int = 0
    # Held in forward beside input, output and what is kept; negative where the output comes after the most is held.
    forward: int = 0
    # Of that, what comes after the last tensor that is kept.
    forward_after: int = 0
    # Held in forward beside input and output where nothing is kept.
    alone: int = 0
    # Held in backward beside the gradient of the output: with a gradient of the input to form, and without.
    backward: int = 0
    backward_first: int = 0

    def given(self, has_graph: bool) -> LinearUse:
        """The same linear, of whose input it is known whether it requires grad."""
        return replace(self, keeps_input=True) if self.keeps_graph and has_graph else self


def linear_use(sizes: Sizes, linear: LinearShape, trained: TrainedLinear | None) -> LinearUse:
    """What a linear holds.

    Args:
        sizes: of the micro-batch.
        linear: its shape.
        trained: what of it is, for the method "selection"; None: nothing.
    """
    method = sizes.job.method
    if method == "full":
        return _full(sizes, linear)
    if method in ("lora", "dora") and linear.name.rpartition(".")[2] in sizes.job.lora_targets:
        return _dora(sizes, linear) if method == "dora" else _lora(sizes, linear)
    if trained is None:
        return _frozen(sizes, linear)
    return _selected(sizes, linear, trained) if trained.entries else _observed(sizes, linear, trained)


def _dense_form(sizes: Sizes, linear: LinearShape) -> int:
    """The weight that codes stand for, made for one product; 0 where the weight is dense."""
    entries, job = linear.out_features * linear.in_features, sizes.job
    if job.quantization == "none":
        return 0
    # Constants that are codes themselves become fp32 first.
    constants = 4 * (entries // _GROUP) if job.quantization == "nf4" and job.double_quantization else 0
    return entries * sizes.element + constants


def _frozen(sizes: Sizes, linear: LinearShape) -> LinearUse:
    dense = _dense_form(sizes, linear)
    return LinearUse(
        keeps_graph=sizes.keeps_inputs, forward=dense, alone=dense, backward=dense + sizes.of(linear.in_features)
    )


def _full(sizes: Sizes, linear: LinearShape) -> LinearUse:
    gradient = linear.num_parameters * sizes.element
    return LinearUse(
        is_trained=True,
        keeps_input=True,
        backward=gradient + sizes.of(linear.in_features),
        backward_first=gradient,
    )


def _observed(sizes: Sizes, linear: LinearShape, trained: TrainedLinear) -> LinearUse:
    """A linear whose gradient calibration reads, before the gradient of its input is formed."""
    dense = _dense_form(sizes, linear)
    return LinearUse(
        is_trained=True,
        keeps_input=trained.keeps_input,
        kept=sizes.tokens * trained.kept_per_token,
        forward=dense,
        backward=max(dense + sizes.of(linear.in_features), trained.backward_bytes),
        backward_first=trained.backward_bytes,
    )


def _selected(sizes: Sizes, linear: LinearShape, trained: TrainedLinear) -> LinearUse:
    element, is_delta = sizes.element, sizes.job.placement == "delta"
    height, width = trained.block_shape
    blocks = trained.num_blocks
    # Strips of the input, once each; strips of input and output for each block, as one batched product reads them.
    strips = sizes.of(trained.num_strips * width)
    are_copied = blocks > MOST_VIEWS
    inputs, outputs = (sizes.of(blocks * side) if are_copied else 0 for side in (width, height))
    columns, rows = sizes.of(trained.num_columns), sizes.of(trained.num_rows)
    dense, dx = _dense_form(sizes, linear), sizes.of(linear.in_features)
    # One kind after the other: what is copied for its product goes with it, its gradient stays.
    gradients = held = 0
    for copied, entries in (
        (inputs + outputs, blocks * height * width),
        (rows, trained.num_rows * linear.in_features),
        (columns if trained.keeps_input else 0, trained.num_columns * linear.out_features),
    ):
        held += entries * element
        gradients = max(gradients, held + copied)
    added = max(inputs + outputs, rows, columns) if is_delta else 0
    keeps = trained.keeps_input or bool(trained.num_rows)
    # Slices are taken when the product is there.
    kept = 0 if keeps else strips + columns
    return LinearUse(
        is_trained=True,
        keeps_input=keeps,
        kept=kept,
        forward=max(dense - kept, added - kept, 0),
        alone=max(dense, added, kept),
        backward=dx + max(dense, added, gradients),
        backward_first=gradients,
    )


@dataclass(frozen=True, kw_only=True)
class _Adapted:
    """Bytes of what PEFT's layers are made of; ``wide_`` is in the dtype of the adapter, which may be fp32."""

    output: int
    wide_output: int
    dx: int
    wide_input: int
    # Output of A.
    inner: int
    # Of A and B.
    gradients: int
    # The adapter computes in more bits than the model: the input is copied for it, each linear's for itself.
    is_wide: bool
    # The gradient of the output, which is the residual stream's, and stays beside its copy.
    doubled: int


def _adapted(sizes: Sizes, linear: LinearShape) -> _Adapted:
    rank, element, wide = sizes.job.lora_rank, sizes.element, sizes.job.trained_bytes
    is_wide, output = wide > element, sizes.of(linear.out_features)
    return _Adapted(
        output=output,
        wide_output=output // element * wide,
        dx=sizes.of(linear.in_features),
        wide_input=sizes.of(linear.in_features) // element * wide if is_wide else 0,
        inner=sizes.tokens * rank * wide,
        gradients=rank * (linear.in_features + linear.out_features) * wide,
        is_wide=is_wide,
        doubled=output if is_wide and linear.reads.endswith("output") else 0,
    )


def _lora(sizes: Sizes, linear: LinearShape) -> LinearUse:
    of, dense = _adapted(sizes, linear), _dense_form(sizes, linear)
    first = (2 if of.is_wide else 1) * of.wide_output + of.inner + of.gradients + of.doubled
    through = of.wide_input or of.dx
    # Its input goes as soon as the adapter's gradients are there, where nobody else keeps it.
    freed = of.dx if linear.reads == "mlp_output" and not of.is_wide else of.wide_input
    return LinearUse(
        is_trained=True,
        keeps_input=not of.is_wide,
        keeps_graph=sizes.keeps_inputs,
        kept=of.inner + of.wide_input,
        # The output without and with the adapter, and the adapter's, scaled.
        forward=max(2 * of.wide_output, dense),
        forward_after=2 * of.wide_output,
        alone=of.inner + of.wide_input + max(2 * of.wide_output, dense),
        # The scaled gradient; then the gradient of the input through the adapter, and beside it the base's.
        backward=max(
            first,
            of.gradients + of.inner + through + of.doubled,
            of.gradients + through + of.dx + dense - freed + of.doubled,
            of.gradients + 3 * of.dx - of.output - freed + of.doubled,
        ),
        backward_first=first,
    )


def _dora(sizes: Sizes, linear: LinearShape) -> LinearUse:
    of, dense, wide = _adapted(sizes, linear), _dense_form(sizes, linear), sizes.job.trained_bytes
    weight = linear.out_features * linear.in_features * wide
    # The norm of the whole weight: the adapter's product through a unit matrix, scaled, and added to the weight, or to
    # a copy of it in more bits.
    unit = linear.in_features * (linear.in_features + sizes.job.lora_rank) * wide
    copies = 1 + of.is_wide
    # The outputs of base and adapter are kept for the gradient of the magnitudes, three rows of which matter.
    outputs = of.output + of.wide_output
    kept = outputs + of.inner + of.wide_input + 3 * linear.out_features * wide
    first = (3 + of.is_wide) * of.wide_output + of.gradients + of.doubled
    # While the norm is computed there is the base's output alone, and then both, scaled in three ways, before they are
    # added up: the product is there until then, and the unit matrix, where a gradient needs it.
    product, norm = unit + weight - outputs, (copies + 2) * weight - outputs
    scaled = copies * weight + 3 * of.wide_output - of.output
    through = of.wide_input or of.dx
    return LinearUse(
        is_trained=True,
        keeps_input=not of.is_wide,
        keeps_graph=sizes.keeps_inputs,
        kept=kept,
        forward=dense + unit + max(norm, scaled),
        # Two of the three scaled outputs.
        forward_after=max(norm, scaled) - max(norm, scaled - 2 * of.wide_output),
        alone=dense + kept + max(product, norm, scaled),
        backward=max(first, of.gradients + through + of.dx + dense - outputs),
        backward_first=first,
    )
