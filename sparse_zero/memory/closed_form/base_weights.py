"""In which tensors does a rank hold the base: dense, as codes with their constants, in shards?

A dense parameter has 2 or 4 bytes an entry. The linears of the layers may be codes instead (bitsandbytes 0.50,
``functional.quantize_4bit`` and ``nn.Linear8bitLt``; :mod:`sparse_zero.layers.quantized`):

    nf4     a code of 4 bits for each entry; for each 64 a constant: fp32, or, with double quantization, one byte, with
            an fp32 constant for each 256 of those and one offset; and the numbers that the codes of either level stand
            for, 16 and 256, fp32
    int8    a byte for each entry, and an fp32 scale for each row
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.trained import base_tensors

# Entries that share a constant of NF4, and constants that share one of the second level.
NF4_GROUP, NF4_OUTER_GROUP = 64, 256
# What codes of 4 and of 8 bits stand for: fp32, of each weight.
NF4_CODE_BOOK_BYTES, BYTE_CODE_BOOK_BYTES = 16 * 4, 256 * 4


@dataclass(frozen=True, kw_only=True)
class BaseTensor:
    """One parameter of the base as it is stored."""

    # Of the module it belongs to, as in :class:`~sparse_zero.memory.closed_form.trained.TrainedTensor`.
    module: str
    # Elements of the stored tensor, and bytes of each.
    numel: int
    itemsize: int
    layer: int
    is_matrix: bool
    # Beside it, on every rank.
    constant_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Without the constants."""
        return self.numel * self.itemsize


def nf4_constant_bytes(entries: int, *, double_quantization: bool) -> int:
    """What is stored beside the codes of one weight of so many entries."""
    groups = math.ceil(entries / NF4_GROUP)
    if not double_quantization:
        return 4 * groups + NF4_CODE_BOOK_BYTES
    constants = groups + 4 * math.ceil(groups / NF4_OUTER_GROUP) + 4
    return constants + NF4_CODE_BOOK_BYTES + BYTE_CODE_BOOK_BYTES


def base_of(shape: DecoderShape, job: MemoryJob) -> list[BaseTensor]:
    """The frozen parameters, in the order of the model; none where all are trained."""
    return [] if job.method == "full" else list(_tensors(shape, job))


def _tensors(shape: DecoderShape, job: MemoryJob) -> Iterator[BaseTensor]:
    rows = {f"{shape.layers_name}.{layer}.{linear.name}": linear.out_features
            for layer in range(shape.num_layers) for linear in shape.linears}  # fmt: skip
    for module, entries, layer, is_matrix in base_tensors(shape):
        numel, itemsize, constants = entries, job.element_bytes, 0
        if is_matrix and module in rows and job.quantization == "nf4":
            numel, itemsize = math.ceil(entries / 2), 1
            constants = nf4_constant_bytes(entries, double_quantization=job.double_quantization)
        elif is_matrix and module in rows and job.quantization == "int8":
            itemsize, constants = 1, 4 * rows[module]
        yield BaseTensor(
            module=module, numel=numel, itemsize=itemsize, layer=layer, is_matrix=is_matrix, constant_bytes=constants
        )


def constant_bytes(base: Sequence[BaseTensor]) -> int:
    """What is stored beside the codes of all weights."""
    return sum(each.constant_bytes for each in base)
