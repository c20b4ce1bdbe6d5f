"""How are checkpoints written while training goes on, and how are errors of that not lost?"""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from sparse_zero.checkpoint.checkpoint import Snapshot, write_snapshot


class CheckpointWriter:
    """Writes one snapshot at a time in a thread of its own; for the rank that writes.

    The thread is no daemon: a process that ends, by whatever exception, waits for it, and only a signal that kills at
    once does not. What it leaves then is a temporary folder, never part of a checkpoint.

    Args:
        background: False: :meth:`submit` returns when everything is written.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        # Of the thread, until it is raised.
        self._error: BaseException | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether :meth:`check` would raise."""
        return self._error is not None

    def submit(self, snapshot: Snapshot, folder: Path, then: Callable[[], None] | None = None) -> None:
        """Start to write ``snapshot``; waits for an earlier one first.

        Args:
            snapshot: given away: it must not be changed, and is freed when it is written.
            folder: of the checkpoint.
            then: called in the thread when the checkpoint is complete, not if it fails.

        Raises:
            Exception: of an earlier write; nothing is started then.
        """
        self.wait()
        held = [snapshot]

        def write() -> None:
            try:
                write_snapshot(held.pop(), folder)
                if then is not None:
                    then()
            except BaseException as error:
                self._error = error

        if not self._background:
            write()
            self.check()
            return
        self._thread = threading.Thread(target=write, name=f"write {folder.name}", daemon=False)
        self._thread.start()

    def check(self) -> None:
        """Raise what a write has raised, once; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when nothing is being written, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait; an error of the thread does not hide one of the block, but is added to it as a note."""
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as other:
            error.add_note(f"a checkpoint could not be written either: {other}")
