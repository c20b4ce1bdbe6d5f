"""Where do the values act, and how is DeepSpeed configured?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sparse_zero.errors import InputError

Placement = Literal["inplace", "delta"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Offload = Literal["none", "cpu", "nvme"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 where it says nothing."""
    return int((settings.get("zero_optimization") or {}).get("stage", 0))


def bf16_section(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section ``bf16`` of a DeepSpeed config, by either of its names."""
    return settings.get("bf16", settings.get("bfloat16")) or {}


def low_precision(settings: Mapping[str, Any]) -> str | None:
    """To which of bf16 and fp16 a DeepSpeed config has the parameters cast; None: they stay as they are."""
    for name, section in (("bf16", bf16_section(settings)), ("fp16", settings.get("fp16") or {})):
        if section.get("enabled"):
            return name
    return None


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """The ZeRO stage, the placement of the values, and an own DeepSpeed config."""

    # 0: plain data parallelism; 1: moments and masters partitioned; 2: gradients too; 3: the base as well.
    stage: Literal[0, 1, 2, 3] = 2
    # inplace: values are written back into W after each step; delta: W is untouched and the product is added.
    placement: Placement = "inplace"
    # Where the values' masters and moments live: on the device, in host memory, or on a disk.
    offload_optimizer: Offload = "none"
    # Stage 3: where each rank's shard of the base lives.
    offload_base: Offload = "none"
    # Folder on a local disk for what is offloaded to nvme.
    nvme_path: str | None = None
    # How inplace values in bf16 or fp16 come from their fp32 masters at write-back.
    rounding: Rounding = "nearest"
    # An own DeepSpeed JSON: a file name, or the content inline. "auto" fields are filled from the run.
    config: str | dict[str, Any] | None = None
    # Extra key/values of DeepSpeed's zero_optimization section (bucket sizes, prefetch), passed through.
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise InputError(f"zero.stage is {self.stage!r}: choose 0, 1, 2 or 3")
        if self.placement not in PLACEMENTS:
            raise InputError(f"zero.placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")
        for name, value in (("offload_optimizer", self.offload_optimizer), ("offload_base", self.offload_base)):
            if value not in OFFLOADS:
                raise InputError(f"zero.{name} is {value!r}: choose one of {', '.join(OFFLOADS)}")
            if value == "nvme" and not self.nvme_path:
                raise InputError(f"zero.{name} is 'nvme': set zero.nvme_path to a folder on a local disk")
        if self.rounding not in ROUNDINGS:
            raise InputError(f"zero.rounding is {self.rounding!r}: choose one of {', '.join(ROUNDINGS)}")
        if "stage" in self.options and self.options["stage"] != self.stage:
            raise InputError(
                f"zero.options.stage is {self.options['stage']!r} but zero.stage is {self.stage}: remove one of them"
            )
