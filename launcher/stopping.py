"""How does a signal end a run cleanly, although it may reach only some of the ranks?"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked this process to stop. The ranks agree on it once a step."""

    def __init__(self) -> None:
        # Number of the signal, 0 while none has come.
        self.signal = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second SIGINT ends the process at once."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs; the old handlers come back afterwards."""
    request = StopRequest()
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
