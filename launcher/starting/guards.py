"""What does the launching process know of one node, through the guard that it has started there?"""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from launcher.starting import node_guard
from launcher.starting.node_script import NodeScript
from launcher.starting.nodes import Node, Reach

# A guard is sent a line a second.
BEAT_SECONDS = 1.0


class Guard(NodeScript):
    """The connection to the guard of one node.

    Args:
        node: where it runs.
        remote: from a node's name and a command to one that runs it there, such as ssh; None for this machine.
        setup: its first line.
    """

    def __init__(self, node: Node, remote: Reach | None, setup: Mapping[str, Any]) -> None:
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
        self._is_closed = threading.Event()
        super().__init__(node, remote, Path(node_guard.__file__), json.dumps(setup))
        # Also while a terminal keeps the main thread from writing: the guard ends the run of one that is silent.
        threading.Thread(target=self._beat, daemon=True).start()

    def _hear(self, value: Any) -> None:
        if not isinstance(value, dict) or "ranks" not in value:
            return
        self.step = value.get("step", self.step)
        self.addresses = value.get("addresses", self.addresses)
        for stream, text in value.get("said", ()):
            self.said.put((stream, text))
        self.words.update({int(rank): text for rank, text in value.get("words", {}).items()})
        if "stacks" in value:
            self.stacks = {int(rank): text for rank, text in value["stacks"].items()}
        self.report, self.heard = value, time.monotonic()

    @property
    def errors(self) -> str:
        """The last that it, or ssh, has said on the error stream."""
        return next((line.strip() for line in reversed(self._errors) if line.strip()), "")

    def _beat(self) -> None:
        """Give signs of life."""
        while not self._is_closed.wait(BEAT_SECONDS):
            self.send_line("beat")

    @property
    def states(self) -> Mapping[str, int | str]:
        """Of the ranks there, as told last: "running", "lost", or an exit code."""
        found: dict[str, int | str] = (self.report or {}).get("ranks", {})
        return found

    def silent_for(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self.heard

    def close(self, deadline: float) -> None:
        """Wait for its last report until a time of the monotonic clock, and end the connection."""
        super().close(deadline)
        self._is_closed.set()
