"""How does a signal end a run cleanly, although it may reach only some of the ranks?

While steps are trained, a signal becomes a request: the ranks agree on it once a step, and a checkpoint is written.
Anywhere else (loading, calibrating, evaluating, exporting) it ends the process at once, and what is half written is
removed; the last checkpoint is whole before any of that begins. ``docs/checkpoints.md`` has the exit codes.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# From a user, a launcher, a terminal that is gone (ssh), and a batch system that warns of the end (Slurm's --signal).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Exit codes besides 0: an error while running, wrong input, another rank that is gone (in sysexits.h a failure that may
# be over at the next try), and 128 + signal after a clean stop.
EXIT_ERROR, EXIT_INPUT, EXIT_LOST, EXIT_SIGNAL = 1, 2, 75, 128
# A terminal and a launcher may both pass on the one Ctrl-C; a person who presses it again takes longer than this.
SECOND_INTERRUPT_SECONDS = 1.0
# Python handles signals between its own instructions: not while a library waits for a rank that never comes.
_DEAF_SECONDS = 5.0


class Stopped(KeyboardInterrupt):
    """A signal came where nothing is left to be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.signal = number


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        # Number of the first signal, 0 while none has come.
        self.signal = 0
        # Whether the first signal raises Stopped where it finds the process; else somebody looks at it.
        self.raises = True
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal. Later ones do not disturb what it has begun, unless a user interrupts again.

        Raises:
            Stopped: the first signal, where it is not waited for; or a second SIGINT.
        """
        if number == signal.SIGHUP:
            _drop_closed_outputs()
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
            if self.raises:
                raise Stopped(number)
        elif number == signal.SIGINT and now - self._since >= SECOND_INTERRUPT_SECONDS:
            raise Stopped(number)


def _drop_closed_outputs() -> None:
    """Let standard output and error go nowhere, where their reader is gone: writing would raise before a save."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        try:
            is_closed = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
        except OSError:
            continue
        if is_closed:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _installed() -> StopRequest | None:
    """The request that signals go to already, if any."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, StopRequest) else None


def _end_if_deaf(request: StopRequest, reader: int) -> None:
    """End the process where a signal has come, nobody waits to save, and Python does not get to its handlers."""
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] not in SIGNALS:
                continue
            time.sleep(_DEAF_SECONDS)
            if request.signal:
                return
            if request.raises:
                os._exit(EXIT_SIGNAL + number[0])


@contextmanager
def _watched(request: StopRequest) -> Iterator[None]:
    """Have a thread see to it that signals end the process wherever it waits."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_if_deaf, args=(request, reader), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.close(writer)


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Turn the first signal into :class:`Stopped` while the block runs, so that what is half written is removed.

    Where a library keeps it waiting for more than some seconds, the process ends without that; the next start removes
    what is half written. A hangup that is ignored when the block begins (nohup) stays ignored. The old handlers come
    back afterwards.
    """
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, request.handle)
    try:
        with _watched(request):
            yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn signals into a request while the block runs.

    Within :func:`stoppable` it is the one request of both: what nobody looked at in this block can be asked for after.
    """
    request = _installed()
    if request is None:
        with stoppable() as request, stop_requests():
            yield request
        return
    before, request.raises = request.raises, False
    try:
        yield request
    finally:
        request.raises = before
