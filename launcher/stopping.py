"""How does a signal end a run cleanly, although it may reach only some of the ranks?

While steps are trained, a signal becomes a request: the ranks agree on it once a step, and a checkpoint is written.
Anywhere else (loading, calibrating, saving) it ends the process at once; files appear whole or not at all.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal came while nothing could be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.signal = number


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        # Number of the signal, 0 while none has come.
        self.signal = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second SIGINT ends the process at once."""
        if self.signal and number == signal.SIGINT:
            raise Stopped(number)
        self.signal = self.signal or number


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM by ``handler`` while the block runs; the old handlers come back afterwards."""
    before: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn signals into a request while the block runs."""
    request = StopRequest()
    with _handling(request.handle):
        yield request


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn signals into :class:`Stopped` while the block runs, so that what is half written is removed."""
    with _handling(_stop_at_once):
        yield
