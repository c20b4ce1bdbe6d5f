"""What do all nodes answer, within a time?

Every node gets a process of its own, all at once; one that does not answer is a node without facts, never a wait.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from launcher.preflight import node_probe
from launcher.starting.node_script import NodeScript
from launcher.starting.nodes import Node, Reach

Facts = Mapping[str, Any]
_Result = TypeVar("_Result")
# Round trips by which a clock is read: the quickest counts.
_CLOCK_TRIPS = 3
# A file system that needs longer to show a new file to other nodes is not one to share a run folder on.
_MARK_SECONDS = 3.0
# For scripts to remove what they made, when they are told to end.
_CLOSE_SECONDS = 5.0
# Where those that answer late need not be waited for: so many times as long as the others, and this long at least.
_LATE_FACTOR, _LATE_SECONDS = 3.0, 5.0


class Talk(NodeScript):
    """A script on a node that answers in lines of JSON. A context of :class:`Talks` tells it to end.

    Args:
        node: where it runs.
        reach: see :data:`launcher.starting.nodes.Reach`; None for this machine.
        script: its path, the same on every node.
        first: the first line that it gets.
    """

    def __init__(self, node: Node, reach: Reach | None, script: Path, first: Any) -> None:
        self._answers: queue.Queue[Any] = queue.Queue()
        # What ssh says is read by reach_checks.
        super().__init__(node, reach, script, json.dumps(first), environment={**os.environ, "LC_ALL": "C"})

    def _hear(self, value: Any) -> None:
        # A login shell may print JSON by chance.
        if isinstance(value, dict) and value.pop("probe", None) is True:
            self._answers.put(value)

    def _hear_end(self) -> None:
        self._answers.put(None)

    def send(self, value: Any) -> None:
        """One line; nothing where the script is gone."""
        self.send_line(json.dumps(value))

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None when the script is gone or a time of the monotonic clock has come."""
        with suppress(queue.Empty):
            found: dict[str, Any] | None = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            return found
        return None

    def why(self) -> tuple[int | None, str]:
        """Exit code, None while it runs, and what it or ssh said on the error stream."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        for thread in self._threads if self._process.poll() is not None else ():
            thread.join(1.0)
        return self._process.poll(), "\n".join(self._errors)


class Talks:
    """Scripts on several nodes; a context, at whose end all are gone."""

    def __init__(self) -> None:
        self.all: list[Talk] = []

    def start(self, node: Node, reach: Reach | None, script: Path, first: Any) -> Talk:
        """One more."""
        talk = Talk(node, reach, script, first)
        self.all.append(talk)
        return talk

    def __enter__(self) -> Talks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for talk in self.all:
            talk.end_input()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for talk in self.all:
            talk.close(max(time.monotonic() + 0.1, deadline))


def with_each(talks: Sequence[Talk], what: Callable[[Talk], _Result]) -> list[_Result]:
    """``what`` of every talk, at once."""
    if not talks:
        return []
    pool = ThreadPoolExecutor(len(talks))
    try:
        return list(pool.map(what, talks))
    finally:
        # Where a signal ends this, the threads do as soon as the scripts are told to end: not to be waited for before.
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Silence:
    """Why a node has told nothing."""

    # Of ssh, or of the script; None: it had not ended when the time was over.
    code: int | None
    # What was said on the error stream.
    said: str
    # How long it was waited for.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A node's clock, by the middle of a round trip."""

    # Ahead of this machine's; negative: behind.
    ahead_seconds: float
    # Within which that is sure: half a round trip.
    within_seconds: float


@dataclass(kw_only=True)
class Answers:
    """What the nodes have told; a node is in facts or in silent."""

    facts: dict[str, Facts] = field(default_factory=dict)
    silent: dict[str, Silence] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    # Of each node: the first one in order that has the same run folder.
    folders: dict[str, str] = field(default_factory=dict)


def ask_nodes(
    questions: Mapping[Node, Mapping[str, Any]], reach: Reach | None, seconds: float, *, waits_for_all: bool
) -> Answers:
    """Start the probe on every node, and have the facts of all that answer.

    Args:
        questions: of :func:`launcher.preflight.wanted.question_of`.
        reach: how other nodes are reached; None where the only one is this machine.
        seconds: within which a node must have answered.
        waits_for_all: whether a node may take all of them while the others have long answered.
    """
    found, since = Answers(), time.monotonic()
    with Talks() as talks:
        for node, question in questions.items():
            talks.start(node, reach, Path(node_probe.__file__), question)
        taken: dict[Node, float] = {}

        def facts_of(talk: Talk) -> Facts | None:
            while (now := time.monotonic()) < since + seconds:
                usual = statistics.median(list(taken.values())) if len(taken) * 2 >= len(questions) else None
                late = usual is not None and now - since > max(_LATE_SECONDS, _LATE_FACTOR * usual)
                if late and not waits_for_all:
                    return None
                answer = talk.answer(min(now + 0.2, since + seconds))
                if answer is not None:
                    taken[talk.node] = time.monotonic() - since
                    return answer
                if talk.is_gone:
                    return talk.answer(time.monotonic() + 0.5)
            return None

        for talk, facts in zip(talks.all, with_each(talks.all, facts_of), strict=True):
            if facts is not None:
                found.facts[talk.node.name] = facts
        answering = [talk for talk in talks.all if talk.node.name in found.facts]
        others = [talk for talk in talks.all if talk.node.name not in found.facts]
        taken_seconds = time.monotonic() - since
        for talk, (code, said) in zip(others, with_each(others, Talk.why), strict=True):
            found.silent[talk.node.name] = Silence(code=code, said=said, seconds=taken_seconds)
        for talk, clock in zip(answering, with_each(answering, _clock), strict=True):
            if clock is not None:
                found.clocks[talk.node.name] = clock
        found.folders = _folders(answering, found.facts, {node.name: q["mark"] for node, q in questions.items()})
    return found


def _clock(talk: Talk) -> Clock | None:
    best: Clock | None = None
    for _ in range(_CLOCK_TRIPS):
        before, started = time.time(), time.monotonic()
        talk.send({"do": "clock"})
        answer = talk.answer(started + 2.0)
        if answer is None or "time" not in answer:
            break
        half = (time.monotonic() - started) / 2
        if best is None or half < best.within_seconds:
            best = Clock(ahead_seconds=answer["time"] - (before + half), within_seconds=half)
    return best


def _folders(talks: Sequence[Talk], facts: Mapping[str, Facts], marks: Mapping[str, str]) -> dict[str, str]:
    """Of each node that could make its mark, the first that has the same folder, which may be itself."""
    made = [talk for talk in talks if "problem" not in facts[talk.node.name]["output"]]
    made = [talk for talk in made if "existing" in facts[talk.node.name]["output"]]

    def first(talk: Talk) -> str:
        # Only nodes that found the same place can share it.
        place = facts[talk.node.name]["output"]["existing"]
        others = [each.node.name for each in made if facts[each.node.name]["output"]["existing"] == place]
        if len(others) == 1:
            return talk.node.name
        names = [marks[name] for name in others]
        talk.send({"do": "marks", "names": names, "seconds": _MARK_SECONDS})
        seen = (talk.answer(time.monotonic() + _MARK_SECONDS + 5.0) or {}).get("seen", [])
        return next((name for name in others if marks[name] in seen), talk.node.name)

    return dict(zip([talk.node.name for talk in made], with_each(made, first), strict=True))
