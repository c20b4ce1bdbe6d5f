"""What of a training job decides how much memory each rank takes?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sparse_zero.errors import InputError
from sparse_zero.selection.config import (
    Accumulate,
    AccumulatorDtype,
    CalibrationWeights,
    FullCalibrationConfig,
    RegionConfig,
)
from sparse_zero.zero.config import Offload, Placement
from sparse_zero.zero.optimizers import OptimizerName

# selection: sub-matrices, rows, columns and what else this package trains. full: every parameter. lora, dora: PEFT's
# adapters on linears; over a quantized base they are QLoRA and QDoRA.
Method = Literal["selection", "full", "lora", "dora"]
METHODS: tuple[Method, ...] = get_args(Method)
Precision = Literal["fp32", "bf16", "fp16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Quantization = Literal["none", "nf4", "int8"]
Batching = Literal["pad", "pack"]

BYTES_OF_PRECISION: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """The pass over data that computes scores, before training."""

    # Samples in one of its micro-batches.
    micro_batch: int
    # Name of the score; see sparse_zero.selection.scores.
    score: str
    # frozen, or full: full fine-tuning steps, see the settings below.
    weights: CalibrationWeights = "frozen"
    # sum: scores that are not linear in the gradient keep an accumulator for each matrix, on the host.
    accumulate: Accumulate = "sum"
    accumulator_dtype: AccumulatorDtype = "float32"
    # Of the candidates; what they leave open is the score's. Empty: all linears of the layers, in blocks of 256.
    regions: tuple[RegionConfig, ...] = ()
    # Share of the layers, from the lowest, without candidates; see sparse_zero.selection.config.
    min_depth: float = 0.0
    full: FullCalibrationConfig = field(default_factory=FullCalibrationConfig)
    # Positions whose logits exist at once; None: all.
    loss_chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryJob:
    """One training job, without its model and selection."""

    world_size: int = 1
    stage: Literal[0, 1, 2, 3] = 2
    placement: Placement = "inplace"
    precision: Precision = "bf16"
    # Samples of one rank in a forward pass, and tokens of each.
    micro_batch: int
    length: int
    # pack: the micro-batch is one row of micro_batch * length tokens.
    batching: Batching = "pad"
    # Samples that the rows hold together, where packed ones are given as one; None: as many as micro_batch.
    samples: int | None = None
    # Positions of a row with logits; None: all but the last.
    label_positions: int | None = None
    # Positions, over all rows, whose logits exist at once, if there are more; None: all.
    loss_chunk: int | None = None
    # Micro-batches between two optimizer steps.
    accumulation: int = 1
    gradient_checkpointing: bool = False
    attention: Attention = "sdpa"
    quantization: Quantization = "none"
    double_quantization: bool = True
    optimizer: OptimizerName = "adamw"
    # Patterns of each entry of the optimizer's per_module: what they match is a group of its own.
    per_module: tuple[tuple[str, ...], ...] = ()
    offload_optimizer: Offload = "none"
    offload_base: Offload = "none"
    method: Method = "selection"
    # Of LoRA and DoRA: rank, and the last components of the names of the linears that have adapters.
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # Of DeepSpeed's zero_optimization section (bucket sizes, prefetching); the rest is this package's default.
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    # None: no calibration, the selection is there.
    calibration: CalibrationJob | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "micro_batch", "length", "accumulation", "lora_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.label_positions is not None and not 1 <= self.label_positions <= self.row_length:
            raise InputError(f"label_positions is {self.label_positions}: a row has {self.row_length} positions")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise InputError(
                f"loss_chunk is {self.loss_chunk}: it must be at least 1, or None for all positions at once"
            )
        if self.placement == "inplace" and self.quantization != "none" and self.method == "selection":
            raise InputError(
                f"quantization is {self.quantization!r} with placement 'inplace', which writes into the weights: use "
                "delta"
            )
        if self.method == "full" and self.quantization != "none":
            raise InputError(f"quantization is {self.quantization!r} with method 'full': codes cannot be trained")

    @property
    def element_bytes(self) -> int:
        """Of one entry of the base and of activations."""
        return BYTES_OF_PRECISION[self.precision]

    @property
    def trained_bytes(self) -> int:
        """Of one entry of what is trained, as the model computes with it.

        An engine for 16 bits casts parameters to them. Not at stage 3, where it finds the base in shards and casts
        nothing (DeepSpeed 0.19.8, ``runtime/engine.py: _configure_distributed_model``): PEFT's adapters stay in fp32.
        """
        return 4 if self.stage == 3 and self.method in ("lora", "dora") else self.element_bytes

    @property
    def rows(self) -> int:
        """Rows of the micro-batch as the model sees it."""
        return 1 if self.batching == "pack" else self.micro_batch

    @property
    def row_length(self) -> int:
        """Tokens of each row."""
        return self.length * self.micro_batch // self.rows

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.micro_batch * self.length

    @property
    def needs_mask(self) -> bool:
        """Whether a mask of positions by positions is made: rows are padded, or hold several samples.

        One sample alone is neither, and flash attention is told of lengths instead.
        """
        return (self.samples or self.micro_batch) > 1 and self.attention != "flash_attention_2"

    @property
    def logit_rows(self) -> int:
        """Positions with logits, over all rows."""
        positions = self.row_length - 1 if self.label_positions is None else self.label_positions
        return self.rows * max(positions, 1)

    def share(self, entries: int) -> int:
        """Of what is split over the ranks, the entries of one."""
        return math.ceil(entries / self.world_size)
