"""What does the user see while a run trains?"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from launcher.summary import ABSENT, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between two plain lines where there is no terminal: readable in a log file of a day.
DEFAULT_LINE_SECONDS = 30.0


class TrainingProgress(Protocol):
    """What the training loop tells; a context manager around the loop."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a finished step: a training row of the metrics."""

    def message(self, text: str) -> None:
        """Show a line of text that stays."""

    def __enter__(self) -> "TrainingProgress": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _value(row: Mapping[str, Any], name: str, format_spec: str) -> str:
    value = row.get(name)
    return format(value, format_spec) if isinstance(value, (int, float)) else ABSENT


def describe_step(row: Mapping[str, Any]) -> str:
    """Loss, learning rate, speed and memory of one training row in about 50 characters, 60 with an MFU."""
    loss = "skipped" if row.get("skipped") else _value(row, "loss", ".4f")
    share = "" if row.get("mfu") is None else f"{_value(row, 'mfu', '.0%')} MFU  "
    return (
        f"loss {loss}  lr {_value(row, 'learning_rate', '.2e')}  "
        f"{format_count(row.get('tokens_per_second'))} tok/s  {share}{format_bytes(row.get('peak_memory_bytes'))}"
    )


class SilentProgress:
    """The progress of ranks that show nothing."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def __enter__(self) -> "SilentProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""


class LineClock:
    """When a plain line is due where there is no terminal: the first time, then after ``seconds``, and at the end."""

    def __init__(self, seconds: float = DEFAULT_LINE_SECONDS) -> None:
        self._seconds = seconds
        self._shown: float | None = None

    def is_due(self, now: float, *, is_last: bool) -> bool:
        """Whether a line is to be shown, which counts as shown then; ``now`` in seconds from any origin."""
        if self._shown is not None and now - self._shown < self._seconds and not is_last:
            return False
        self._shown = now
        return True


class LineProgress:
    """A plain line at the first step, then at most every ``line_seconds``, and at the last step."""

    def __init__(
        self,
        *,
        num_steps: int,
        first_step: int,
        console: "Console",
        line_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._num_steps = num_steps
        self._first_step = first_step
        self._console = console
        self._lines = LineClock(line_seconds)
        self._clock = clock
        self._started = clock()

    def update(self, row: Mapping[str, Any]) -> None:
        """Print the step's line when its time has come."""
        now, step = self._clock(), int(row["step"])
        if not self._lines.is_due(now, is_last=step >= self._num_steps):
            return
        done = step - self._first_step
        left = (now - self._started) / done * (self._num_steps - step) if done > 0 else None
        self.message(f"step {step}/{self._num_steps}  {describe_step(row)}  ETA {format_duration(left)}")

    def message(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "LineProgress":
        self._started = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""


class BarProgress:
    """A bar at the bottom of the terminal; messages scroll above it."""

    def __init__(self, *, num_steps: int, first_step: int, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._first_step = first_step
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        # Steps before the resumed one are shown as done but must not count as speed.
        self._task = self._progress.add_task("", total=num_steps, completed=first_step)

    def update(self, row: Mapping[str, Any]) -> None:
        """Move the bar to the step and show its numbers."""
        self._progress.update(self._task, completed=int(row["step"]), description=describe_step(row))

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "BarProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def training_progress(
    *,
    num_steps: int,
    rank: int,
    first_step: int = 0,
    line_seconds: float = DEFAULT_LINE_SECONDS,
    console: "Console | None" = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingProgress:
    """The progress display that suits this process: a bar, plain lines or nothing.

    Args:
        num_steps: the run's last step; steps count from 1.
        rank: process rank; only rank 0 shows anything.
        first_step: steps already done when this process starts (the resumed checkpoint's).
        line_seconds: where the output is no terminal, seconds between two plain lines.
        console: where to; None is standard error, so that standard output stays free for results.
        clock: seconds from any origin; for tests.
    """
    if rank != 0:
        return SilentProgress()
    from rich.console import Console

    console = Console(stderr=True) if console is None else console
    if console.is_terminal:
        return BarProgress(num_steps=num_steps, first_step=first_step, console=console)
    return LineProgress(
        num_steps=num_steps, first_step=first_step, console=console, line_seconds=line_seconds, clock=clock
    )
