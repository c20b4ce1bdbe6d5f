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
    """

    def __init__(
        self, num_points: int, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console

        self._console = Console(stderr=True) if console is None else console
        self._clock, self._num_points = clock, num_points
        self._number, self._seconds, self._started = 0, 0.0, 0.0
        self._bar: Any = None
        self._task: Any = None

    def start(self, name: str) -> None:
        """A point begins."""
        self._number += 1
        self._started = self._clock()
        if self._bar is None:
            self.say(f"[{self._number}/{self._num_points}] {name}{self._left()}")
        else:
            self._bar.update(self._task, description=f"{name}{self._left()}")

    def end(self, name: str, what: str, details: Sequence[str] = ()) -> None:
        """A point has ended."""
        seconds = self._clock() - self._started
        self._seconds += seconds
        self.say(f"[{self._number}/{self._num_points}] {name}: {what} after {format_duration(seconds)}")
        for line in details:
            self.say(f"    {line}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._number)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        console = self._console if self._bar is None else self._bar.console
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        """By the mean of the points so far: those of other methods or sizes take other times."""
        done = self._number - 1
        return f", about {format_duration(self._seconds / done * (self._num_points - done))} left" if done else ""

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
