"""How long do the parts of a training step take on this rank?"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Part = Literal["forward", "backward", "update"]
_PARTS: tuple[Part, ...] = ("forward", "backward", "update")


class StepTimes:
    """Seconds of each part, added up over the micro-batches of a step.

    On a GPU they lie between events on its stream, since the host only enqueues the work. Forward passes of ZeRO stages
    0 to 2 wait for no other rank: a rank whose forward takes longer than the others' is slow itself.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._events: list[tuple[Part, Any, Any]] = []

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """The block is a part of a micro-batch's work."""
        if self._is_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[Part, float]:
        """Those of the step that ended; they begin anew. On a GPU, after the host has waited for the step."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000.0
        taken, self._seconds = self._seconds, dict.fromkeys(_PARTS, 0.0)
        self._events.clear()
        return taken
