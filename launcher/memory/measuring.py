"""How much memory does each phase of a run take on this rank: its tensors by kind, and the process or the GPU?

On a CPU a recorder sees every operation from the making of the engine through the first optimizer steps, and the
first save; the resident size of the process is read for every phase of the run. On a GPU the peaks of its allocator
are read instead, which is cheap, and knows no kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from launcher.memory.memory_config import MemoryConfig
from launcher.memory.room import held_bytes
from launcher.memory.run_recorder import RunRecorder, named_nodes
from launcher.starting.control_groups import oom_counter, oom_kills
from models.data import IGNORED, ClassifiedSample, Sample, TokenizedSample
from models.families import head_name
from sparse_zero.memory.measure import PeakMemory
from sparse_zero.memory.simulation.recorder import tag_model
from sparse_zero.memory.simulation.timeline import KINDS
from sparse_zero.selection.selection import Selection

# The first optimizer step makes the optimizer's states; the second is as all others.
NUM_STEPS = 2
# Of the micro-batches of a step, the first ones and the last are measured: those between hold what these hold.
_FIRST_MICRO_BATCHES = 2


class PhasePeaks:
    """Peaks of this process's memory by phase, on a GPU of its allocator; phases may lie in phases.

    Args:
        device: where the memory lies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = PeakMemory(device)
        self._stack: list[str] = []
        # Bytes, by phase; reserved: of a GPU, what the allocator had taken from the driver.
        self.peaks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        # Before anything of the run: the interpreter and its libraries.
        self.at_start = self._memory.current_bytes() or 0

    @property
    def source(self) -> str:
        """Which figure it is, see :mod:`sparse_zero.memory.measure`."""
        return self._memory.source

    @property
    def now(self) -> str:
        """The innermost phase; "" outside of all."""
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is (a part of) the phase ``name``."""
        self._look()
        self._memory.reset()
        self._stack.append(name)
        try:
            yield
        finally:
            self._look()
            self._stack.pop()
            self._memory.reset()

    def peak(self, name: str) -> int:
        """Bytes at most in a phase so far."""
        self._look()
        return self.peaks.get(name, 0)

    def largest(self) -> int:
        """Bytes at most in all phases so far."""
        self._look()
        return max(self.peaks.values(), default=self.at_start)

    def close(self) -> None:
        """Stop what samples, if anything does."""
        self._memory.close()

    def _look(self) -> None:
        found = self._memory.peak_bytes()
        for name in self._stack:
            self.peaks[name] = max(self.peaks.get(name, 0), found)
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            for name in self._stack:
                self.reserved[name] = max(self.reserved.get(name, 0), reserved)


def label_positions(samples: Sequence[Sample], batching: Literal["pad", "pack"]) -> int:
    """How many positions of a micro-batch's rows get logits: those that predict a label in some row, at least one."""
    if any(isinstance(sample, ClassifiedSample) for sample in samples):
        return 1
    tokenized = [sample for sample in samples if isinstance(sample, TokenizedSample)]
    if batching == "pack":
        return max(1, sum(label != IGNORED for sample in tokenized for label in sample.labels[1:]))
    found = {place for sample in tokenized for place, label in enumerate(sample.labels) if place and label != IGNORED}
    return max(1, len(found))


def shape_of(samples: Sequence[Sample], batching: Literal["pad", "pack"], accumulation: int) -> dict[str, int]:
    """What of a micro-batch decides how much memory it takes; ``tokens`` are those that are no padding."""
    lengths = [len(sample.input_ids) for sample in samples]
    rows, length = (1, sum(lengths)) if batching == "pack" else (len(samples), max(lengths))
    return {
        "micro_batch": rows,
        "length": length,
        "label_positions": label_positions(samples, batching),
        "tokens": sum(lengths),
        "accumulation": accumulation,
        "samples": len(samples),
    }


class RunMemory:
    """What a run finds out about its memory on this rank, as it goes.

    Args:
        config: the run's section; None: nothing but the peaks of the process.
        device: of this rank.
    """

    def __init__(self, config: MemoryConfig | None, device: torch.device) -> None:
        self.config, self.device = config, device
        self.peaks = PhasePeaks(device)
        # See launcher.memory.out_of_memory: what the process held before the run, or when it was measured last, that
        # was no tensor; and what was selected.
        self.overhead = held_bytes()
        self.oom_counter = oom_counter()
        self.oom_kills_at_start = oom_kills(self.oom_counter)
        self.selection: Selection | None = None
        measures = config is not None and config.measure
        self._recorder = RunRecorder() if measures and device.type == "cpu" else None
        # Optimizer steps that are still to be measured, and whether this micro-batch is.
        self._steps_left, self._is_measured = NUM_STEPS if measures else 0, False
        self._num_steps = 0
        self._module: Any = None
        self._head: str | None = None
        # The micro-batches that were measured in the latest step: rows, length, label positions, filled tokens.
        self.micro_batches: list[dict[str, int]] = []
        self._latest: tuple[Sequence[Sample], Literal["pad", "pack"], int] | None = None
        # By phase, as Timeline.to_json tells it.
        self.tensors: dict[str, Any] = {}
        # Of the run, also where nothing is measured.
        self.now = "load"

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were measured."""
        return self._num_steps

    @property
    def is_measuring(self) -> bool:
        """Whether steps are to be measured yet."""
        return self._steps_left > 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the run of which the process's peak is taken: load, calibration, train, ..."""
        before, self.now = self.now, name
        with self.peaks.phase(name):
            yield
        self.now = before  # Not where it failed: then it is told which one did.

    def start(self, model: Any) -> None:
        """Count the model's tensors, before there is an engine.

        Args:
            model: sparse.
        """
        if self._recorder is None:
            return
        self._head = head_name(model)
        with self._recorder.phase("load"):
            tag_model(self._recorder, model)

    @contextmanager
    def engine(self, name: Literal["engine", "resume"] = "engine") -> Iterator[None]:
        """The block makes the engine, or puts a checkpoint into it."""
        with self.phase(name), self._recording(name, self.is_measuring):
            yield

    def made(self, engine: Any) -> None:
        """The engine is there, in the block of :meth:`engine`: it has laid out the parameters anew."""
        self._module = engine.module
        if self._recorder is not None:
            tag_model(self._recorder, engine.module)

    def micro_batch(self, samples: Sequence[Sample], batching: Literal["pad", "pack"], index: int, number: int) -> None:
        """Say which micro-batch follows: the ``index``-th of ``number`` in its step."""
        # The first of a step holds no gradients of others.
        self._latest = samples, batching, 1 if index == 0 else number
        self._is_measured = self.is_measuring and (index < _FIRST_MICRO_BATCHES or index + 1 == number)
        if self._is_measured:
            # Forecasts and simulations are of a step like the second one, with its micro-batches.
            self.micro_batches = [] if index == 0 else self.micro_batches
            self.micro_batches = self.all_micro_batches()

    def all_micro_batches(self) -> list[dict[str, int]]:
        """Those that were measured, and the latest; each once."""
        if self._latest is None:
            return self.micro_batches
        latest = shape_of(*self._latest)
        return self.micro_batches if latest in self.micro_batches else [*self.micro_batches, latest]

    @contextmanager
    def part(self, name: Literal["forward", "backward", "step"]) -> Iterator[None]:
        """The block is that part of a micro-batch's work."""
        before, self.now = self.now, name
        with ExitStack() as stack:
            if self._is_measured:
                stack.enter_context(self.peaks.phase(name))
                stack.enter_context(self._recording(name, True))
            yield
        self.now = before

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The block saves a checkpoint; the first one is measured."""
        with self.phase("save"), self._recording("save", self._num_steps > 0):
            yield
        if self._recorder is not None and self._num_steps:
            self._take(ends=not self.is_measuring)

    @contextmanager
    def _recording(self, name: str, measures: bool) -> Iterator[None]:
        recorder = self._recorder
        if recorder is None or not measures:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(recorder)
            if self._module is not None:
                stack.enter_context(recorder.modules_of(self._module))
                stack.enter_context(named_nodes(self._module))
            stack.enter_context(recorder.phase(name))
            yield

    def end_step(self, *, applied: bool = True) -> bool:
        """An optimizer step is done; whether it was the last one to be measured.

        Args:
            applied: whether it changed anything. One that was discarded makes no moments, and does not count.
        """
        self._is_measured = False
        if not self.is_measuring or not applied:
            return False
        self._steps_left -= 1
        self._num_steps += 1
        if self._recorder is not None:
            self._take(ends=False)
            if self._num_steps == 1:
                self._recorder.end_first_step()
        return not self.is_measuring

    def stop(self) -> bool:
        """Measure no more, as the engine is about to be another one; whether it was measuring."""
        was, self._steps_left = self.is_measuring, 0
        if was and self._recorder is not None:
            self._take(ends=True)
        self._recorder = None
        return was

    def _take(self, *, ends: bool) -> None:
        assert self._recorder is not None
        live = self._recorder.live_bytes
        self.overhead = {name: max(self.overhead[name], held - live) for name, held in held_bytes().items()}
        self.tensors = self._recorder.timeline(self._head).to_json()
        if ends:
            self._recorder = None

    def held_when_it_failed(self) -> dict[str, Any] | None:
        """Where memory ran out, if that was measured: the bytes that were held, by kind, the module, the operation."""
        recorder = self._recorder
        if recorder is None or recorder.failed is None:
            return None
        event, module, operation = recorder.failed
        live = recorder.timeline(self._head).live["device"][event]
        by_kind = {kind: int(live[column]) for column, kind in enumerate(KINDS) if int(live[column])}
        return {"num_bytes": int(live.sum()), "by_kind": by_kind, "module": module, "operation": operation}

    def forget(self) -> None:
        """Let go of the model."""
        self._module = self._recorder = None

    def to_json(self) -> dict[str, Any]:
        """What this rank has found, for :mod:`launcher.memory.report`."""
        self.peaks.largest()
        return {
            "steps": self._num_steps,
            "micro_batches": self.micro_batches,
            "tensors": self.tensors,
            "source": self.peaks.source,
            "process": dict(self.peaks.peaks),
            "reserved": dict(self.peaks.reserved),
            "at_start": self.peaks.at_start,
        }
