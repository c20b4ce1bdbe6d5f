"""How does a rank say how far it is, so that its node's guard can show it, and notice when it goes no further?

A rank that `sparse-zero launch` started keeps one small file up to date (:data:`FIELDS`), in the folder of its node's
guard (:mod:`launcher.starting.node_guard`). Writing it takes some microseconds; nothing waits for anybody.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launcher.starting.node_guard import node_folder
from launcher.starting.rank_status import status_file, write_status

# What a status holds: ticks since the start (it is alive as long as they change), the phase and whether it ticks;
# whether the run folder is this run's; then what is known of training: steps done, micro-batches done of the next one,
# last step, loss, input tokens a second of all ranks, floating-point operations a second of a rank and their share of
# what its device can do (if that is known), seconds of this rank's forward passes in a step as they are lately, peak
# bytes of its device (without one, of its process), the step of the newest checkpoint that was begun.
FIELDS = (
    "ticks", "phase", "is_ticking", "owns_folder", "step", "micro_batch", "num_steps", "loss", "tokens_per_second",
    "flops_per_second", "mfu", "forward_seconds", "memory_bytes", "checkpoint",
)  # fmt: skip
# Asks for the stacks of all threads, in the log of the rank; see node_guard.
STACKS_SIGNAL = signal.SIGUSR2


class Pulse:
    """The status of one rank.

    Args:
        record: the record folder of this start; None where no guard looks, and then nothing is written.
        rank: of this process.
    """

    def __init__(self, record: str | None = None, rank: int = 0) -> None:
        self._status: dict[str, Any] = {"ticks": 0, "phase": "start", "is_ticking": False, "owns_folder": False}
        self._descriptor: int | None = None
        folder = None if record is None else node_folder(record)
        if folder is not None and folder.is_dir():  # Else a launcher was started by hand, with its arguments copied.
            self._descriptor = os.open(status_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # Before the first status: who has one can be asked.
            faulthandler.register(STACKS_SIGNAL, file=sys.stderr, all_threads=True)
            faulthandler.enable(file=sys.stderr)  # A crash in a library tells where it was.
        self._write()

    def _write(self) -> None:
        if self._descriptor is not None:
            write_status(self._descriptor, self._status)

    def tick(self, **numbers: Any) -> None:
        """Something was done: a step, or a batch of something else.

        Args:
            numbers: of :data:`FIELDS`, as they are from now on.
        """
        assert set(numbers) <= set(FIELDS), numbers
        self._status.update(numbers, ticks=self._status["ticks"] + 1)
        self._write()

    @contextmanager
    def phase(self, name: str, *, ticks: bool = False) -> Iterator[None]:
        """The block is a phase of the run.

        Args:
            name: as it is shown.
            ticks: whether it ticks, so that a long silence means that it hangs.
        """
        before = {each: self._status[each] for each in ("phase", "is_ticking")}
        self.tick(phase=name, is_ticking=ticks)
        yield  # Where it fails, the phase stays what it was.
        self.tick(**before)
