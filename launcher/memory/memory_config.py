"""What does a run find out about its memory?"""

import math
from dataclasses import dataclass
from typing import Literal

from sparse_zero.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Measurement, simulation, and how they are held against the forecast."""

    # Measure by phase and kind what the tensors of the first two optimizer steps take. These steps are slower on a CPU
    # (every operation is looked at); the others, and all results, are as without.
    measure: bool = True
    # Simulate the run beside it, in a child process of the lowest priority on rank 0's node: half a gigabyte and up to
    # a minute of one core, see sparse-zero plan. auto: where five minutes of training or more are left.
    simulate: Literal["auto", True, False] = "auto"
    # How long the run waits at its end for a simulation that is not done.
    wait_seconds: float = 20.0
    # A forecast or simulation whose peak differs from the measured one by more than this share is warned of.
    warn_above: float = 0.05

    def __post_init__(self) -> None:
        if self.simulate is True and not self.measure:
            raise InputError(
                "memory.simulate is true and memory.measure is false, which a simulation is held against: "
                "set memory.measure to true, or simulate by sparse-zero plan --simulate"
            )
        if not (math.isfinite(self.wait_seconds) and self.wait_seconds >= 0):
            raise InputError(f"memory.wait_seconds is {self.wait_seconds}: give seconds, 0 or more")
        if not (math.isfinite(self.warn_above) and self.warn_above > 0):
            raise InputError(f"memory.warn_above is {self.warn_above}: give a share above 0, such as 0.05")
