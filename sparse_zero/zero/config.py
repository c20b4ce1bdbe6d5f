"""Where do the values act, and how is DeepSpeed configured?"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sparse_zero.errors import InputError

Placement = Literal["inplace", "delta"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """The ZeRO stage, the placement of the values, and an own DeepSpeed config."""

    # 0: plain data parallelism; 1: moments and masters partitioned; 2: gradients too; 3: the base as well.
    stage: Literal[0, 1, 2, 3] = 2
    # inplace: values are written back into W after each step; delta: W is untouched and the product is added.
    placement: Placement = "inplace"
    # An own DeepSpeed JSON: a file name, or the content inline. "auto" fields are filled from the run.
    config: str | dict[str, Any] | None = None
    # Extra key/values of DeepSpeed's zero_optimization section (bucket sizes, prefetch), passed through.
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise InputError(f"zero.stage is {self.stage!r}: choose 0, 1, 2 or 3")
        if self.placement not in PLACEMENTS:
            raise InputError(f"zero.placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")
        if self.stage == 3 and self.placement == "inplace":
            raise InputError(
                "zero.placement is 'inplace' at zero.stage 3, which shards the base weights: "
                "use zero.placement delta, or a stage up to 2"
            )
        if "stage" in self.options and self.options["stage"] != self.stage:
            raise InputError(
                f"zero.options.stage is {self.options['stage']!r} but zero.stage is {self.stage}: remove one of them"
            )
