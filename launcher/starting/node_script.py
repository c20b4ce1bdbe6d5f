"""How does this process start a script on a node, here or elsewhere, and speak with it in lines?"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.starting.nodes import Node, Reach

# Of what a script, or ssh, says on the error stream: the last lines.
_MAX_ERROR_LINES = 50


class NodeScript:
    """A script on a node that is sent lines, and of whose output the lines of JSON are heard.

    Args:
        node: where it runs.
        reach: how other nodes are reached; None for this machine.
        script: its path, the same on every node.
        first: the first line that it gets.
        environment: of the process that starts it here; None: this one's.
    """

    def __init__(
        self, node: Node, reach: Reach | None, script: Path, first: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.node = node
        command = [sys.executable, str(script)]
        # Its own session: a Ctrl-C in the terminal is for this process, which tells the others.
        self._process = subprocess.Popen(
            command if reach is None else reach(node.name, command),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self._errors: deque[str] = deque(maxlen=_MAX_ERROR_LINES)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()
        self.send_line(first)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # What a login shell prints.
                self._hear(json.loads(line))
        self._hear_end()

    def _hear(self, value: Any) -> None:
        """Take a line; by the thread that reads."""
        raise NotImplementedError

    def _hear_end(self) -> None:
        """Nothing more will come; by the thread that reads."""

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line.decode(errors="replace").rstrip())

    def send_line(self, text: str) -> None:
        """One line; nothing where the script is gone."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # It may have been closed.
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()

    @property
    def is_gone(self) -> bool:
        """Whether the script, or the connection to it, has ended."""
        return self._process.poll() is not None

    def end_input(self) -> None:
        """Let it read the end of its input, without waiting."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self, deadline: float) -> None:
        """Wait for its end until a time of the monotonic clock, and end the connection."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(1.0)
        self.end_input()
        # A child of ssh may hold the others open: closing one would wait for the thread that reads it.
        for thread, pipe in zip(self._threads, (self._process.stdout, self._process.stderr), strict=True):
            if pipe is not None and not thread.is_alive():
                with suppress(OSError):
                    pipe.close()
