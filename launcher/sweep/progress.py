"""What does the user see while a sweep runs?"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from launcher.summary import format_duration

if TYPE_CHECKING:
    from rich.console import Console


class SweepProgress:
    """Lines that stay for every point and, in a terminal, a bar below them.

    Args:
        num_points: that are to be run.
        console: where to; None is standard error.
        clock: seconds from any origin; for tests.
        at_once: points that run side by side.
    """

    def __init__(
        self,
        num_points: int,
        console: "Console | None" = None,
        clock: Callable[[], float] = time.monotonic,
        at_once: int = 1,
    ) -> None:
        from rich.console import Console

        self._console = Console(stderr=True) if console is None else console
        self._clock, self._num_points, self._at_once = clock, num_points, at_once
        self._done, self._seconds = 0, 0.0
        # Of the points that run: their numbers, and when they began.
        self._running: dict[str, tuple[int, float]] = {}
        self._bar: Any = None
        self._task: Any = None

    def add(self, num_points: int) -> None:
        """So many more are to be run."""
        self._num_points += num_points
        if self._bar is not None:
            self._bar.update(self._task, total=self._num_points)

    def start(self, name: str) -> None:
        """A point begins."""
        number = self._done + len(self._running) + 1
        self._running[name] = number, self._clock()
        if self._bar is None:
            self.say(f"[{number}/{self._num_points}] {name}{self._left()}")
        else:
            self._bar.update(self._task, description=f"{name}{self._left()}")

    def end(self, name: str, what: str, details: Sequence[str] = ()) -> None:
        """A point has ended."""
        number, started = self._running.pop(name)
        seconds = self._clock() - started
        self._done += 1
        self._seconds += seconds
        self.say(f"[{number}/{self._num_points}] {name}: {what} after {format_duration(seconds)}")
        for line in details:
            self.say(f"    {line}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        console = self._console if self._bar is None else self._bar.console
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        """By the mean of the points so far: those of other methods or sizes take other times."""
        if not self._done:
            return ""
        mean, left = self._seconds / self._done, self._num_points - self._done
        return f", about {format_duration(mean * left / self._at_once)} left"

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal and self._num_points:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=12),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._num_points)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
