"""What does the launching process know of one node, through the guard that it has started there?"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from launcher.starting import node_guard
from launcher.starting.nodes import Node, Reach

# A guard is sent a line a second.
BEAT_SECONDS = 1.0


class Guard:
    """The connection to the guard of one node.

    Args:
        node: where it runs.
        remote: from a node's name and a command to one that runs it there, such as ssh; None for this machine.
        setup: its first line.
    """

    def __init__(self, node: Node, remote: Reach | None, setup: Mapping[str, Any]) -> None:
        self.node = node
        command = [sys.executable, str(Path(node_guard.__file__))]
        if remote is not None:
            command = remote(node.name, command)
        # Its own session: a Ctrl-C in the terminal is for this process, which tells the others.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self.heard = time.monotonic()
        self.report: dict[str, Any] | None = None
        # Of the newest checkpoint that its node sees, as told first and last.
        self.step: int | None = None
        # IPv4 addresses of its node, by interface.
        self.addresses: dict[str, str] = {}
        # (stream, text) that rank 0 has written here, in its order.
        self.said: SimpleQueue[tuple[str, str]] = SimpleQueue()
        # Of each rank that failed: what it said last. And the stacks of all, None while they have not come.
        self.words: dict[int, str] = {}
        self.stacks: dict[int, str] | None = None
        self.errors = ""
        self._is_closed = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        self.send(json.dumps(setup))
        # Also while a terminal keeps the main thread from writing: the guard ends the run of one that is silent.
        for thread in (*self._threads, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # What a login script prints.
                report = json.loads(line)
                if isinstance(report, dict) and "ranks" in report:
                    self.step = report.get("step", self.step)
                    self.addresses = report.get("addresses", self.addresses)
                    for stream, text in report.get("said", ()):
                        self.said.put((stream, text))
                    self.words.update({int(rank): text for rank, text in report.get("words", {}).items()})
                    if "stacks" in report:
                        self.stacks = {int(rank): text for rank, text in report["stacks"].items()}
                    self.report, self.heard = report, time.monotonic()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors = line.decode(errors="replace").strip() or self.errors

    def send(self, word: str) -> None:
        """One line to the guard; nothing where it is gone."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # It may have been closed.
            self._process.stdin.write(word.encode() + b"\n")
            self._process.stdin.flush()

    def _beat(self) -> None:
        """Give signs of life."""
        while not self._is_closed.wait(BEAT_SECONDS):
            self.send("beat")

    @property
    def states(self) -> Mapping[str, int | str]:
        """Of the ranks there, as told last: "running", "lost", or an exit code."""
        found: dict[str, int | str] = (self.report or {}).get("ranks", {})
        return found

    @property
    def is_gone(self) -> bool:
        """Whether the connection has ended."""
        return self._process.poll() is not None

    def silent_for(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self.heard

    def close(self, deadline: float) -> None:
        """Wait for its last report until a time of the monotonic clock, and end the connection."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._is_closed.set()
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join(1.0)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        # A child of ssh may hold the others open: closing one would wait for the thread that reads it.
        for thread, pipe in zip(self._threads, (self._process.stdout, self._process.stderr), strict=True):
            assert pipe is not None
            if not thread.is_alive():
                with suppress(OSError):
                    pipe.close()
