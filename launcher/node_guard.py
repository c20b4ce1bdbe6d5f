"""Which processes of a run live on this node, how did its ranks end, and how is all of it ended?

`sparse-zero launch` starts this script once on every node, here or over ssh, and speaks with it in lines:

    in   {"record": FOLDER, "before": [FOLDERS of earlier starts], "checkpoints": FOLDER, "silence": SECONDS or null}
         beat    a sign of life
         stop N  signal N to the ranks, which then write a checkpoint and end
         end     kill what is left, say so, and leave
    out  {"ranks": {RANK: STATE}}, twice a second; a state is "running", "lost", or an exit code
         {"ended": true, "left": [NAMES], "step": NEWEST CHECKPOINT or null, "ranks": ...}, last

When the other side is gone, or silent for too long, everything is killed as well: nothing of a run outlives its
launcher, and a node that was cut off stops before the run goes on elsewhere. What belongs to the run is known by the
record folder, whose name stands in the command line of launchers and ranks and is never used twice.

The record folder also holds each rank's exit code, in a file named as the rank: launchers tell one code for all of
them, and some tell 0 for a failure.
"""

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

# Between two looks.
_INTERVAL_SECONDS = 0.5
# For new ranks it is looked among all processes of the node, of which there may be thousands: as often in the first
# minutes, in which they start, and seldom later.
_STARTING_SECONDS, _SELDOM_SECONDS = 300.0, 10.0
# For killed processes to be gone.
_KILL_SECONDS = 10.0


def write_exit_record(folder: str | None, code: int) -> None:
    """Tell the guard of this node with which code this rank ends; nothing without a folder or without a guard."""
    if folder is not None:
        with contextlib.suppress(OSError):
            Path(folder, os.environ.get("RANK", "0")).write_text(str(code), encoding="utf-8")


def _exit_code(record: Path, rank: int) -> int | None:
    try:
        return int((record / str(rank)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def newest_step(checkpoints: Path) -> int | None:
    """Step of the newest complete checkpoint in a folder, by name only; None if there is none."""
    try:
        names = [path.name for path in checkpoints.iterdir() if (path / "manifest.json").is_file()]
    except OSError:
        return None
    return max((int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)), default=None)


def processes_of(record: str) -> list[psutil.Process]:
    """Processes whose command line names ``record``, and all that they have started; never this one or its parents."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    children: dict[int, list[psutil.Process]] = {}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["ppid", "cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid in mine:
            continue
        children.setdefault(process.info["ppid"], []).append(process)
        if any(record in argument for argument in process.info["cmdline"] or ()):
            found[process.pid] = process
    waiting = list(found)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                waiting.append(child.pid)
    return list(found.values())


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Watch:
    """What a guard knows of the run on its node.

    Args:
        record: the run's record folder on this node.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        # The first process of every rank: what it forks has its command line and environment too.
        self._ranks: dict[int, psutil.Process] = {}
        self._started = self._searched = time.monotonic()

    def look(self) -> dict[str, Any]:
        """The ranks' states."""
        now = time.monotonic()
        if now - self._started < _STARTING_SECONDS or now - self._searched > _SELDOM_SECONDS:
            self._searched = now
            self._search()
        return {"ranks": self._states()}

    def _search(self) -> None:
        """Find ranks that have started."""
        processes = processes_of(str(self._record))
        parents = {process.pid: process.info["ppid"] for process in processes}
        for process in processes:
            rank = _environment(process).get("RANK", "")
            # Launchers have the record in their command line and no rank; what a rank starts has its parent's rank.
            if rank.isdecimal() and int(rank) not in self._ranks:
                parent = next((other for other in processes if other.pid == parents[process.pid]), None)
                if parent is None or _environment(parent).get("RANK") != rank:
                    self._ranks[int(rank)] = process

    def _states(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for rank, process in self._ranks.items():
            if _is_alive(process):
                states[str(rank)] = "running"
            else:
                code = _exit_code(self._record, rank)
                states[str(rank)] = "lost" if code is None else code
        return states

    def stop(self, number: int) -> None:
        """Send the ranks a signal; before there are any, everything."""
        ranks = [process for process in self._ranks.values() if _is_alive(process)]
        for process in ranks or processes_of(str(self._record)):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def forget(self) -> None:
        """Remove what the ranks of this node have left in the record folder, and the folder after the last of them."""
        for rank in self._ranks:
            (self._record / str(rank)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._record.rmdir()

    def end(self) -> dict[str, Any]:
        """Kill everything; the last states, and the names of what could not be killed."""
        before = self.look()["ranks"]
        deadline = time.monotonic() + _KILL_SECONDS
        while (left := processes_of(str(self._record))) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        # What was running until now has been ended, which is no loss; what came between is told as it was.
        after = self._states()
        ranks = {
            rank: state if state == "running" and after[rank] == "lost" else after[rank]
            for rank, state in before.items()
        }
        return {
            "ended": True,
            "left": [f"{process.pid} {process.name()}" for process in left if _is_alive(process)],
            "ranks": ranks,
        }


def _say(report: Mapping[str, Any]) -> None:
    print(json.dumps(report), flush=True)


def _serve(watch: Watch, silence: float | None) -> None:
    """Report and obey until told to end, or until nobody tells anything any more."""
    heard, unread = time.monotonic(), b""
    while silence is None or time.monotonic() - heard < silence:
        if select.select([0], [], [], _INTERVAL_SECONDS)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return
            heard = time.monotonic()
            *words, unread = (unread + data).split(b"\n")
            if b"end" in words:
                return
            for word in words:
                if word.startswith(b"stop "):
                    watch.stop(int(word[5:]))
        _say(watch.look())


def _first_line() -> bytes:
    """Read without a buffer, which would keep from ``select`` what follows."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def main() -> int:
    """Guard until told to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # They are for the run, and its launcher decides what follows.
    setup = json.loads(_first_line() or b"null")
    if setup is None:
        return 1
    # Of a node that was cut off, and is back before it has noticed. One look for all: there may be hundreds.
    arguments = [each for process in psutil.process_iter(["cmdline"]) for each in process.info["cmdline"] or ()]
    for earlier in setup["before"]:
        if any(earlier in argument for argument in arguments):
            Watch(Path(earlier)).end()
    record = Path(setup["record"])
    record.mkdir(mode=0o700, exist_ok=True)  # Nodes may share it.
    watch = Watch(record)
    try:
        # Also when this write fails, because the other side is gone already.
        with contextlib.suppress(BrokenPipeError):
            _say({"ranks": {}, "step": newest_step(Path(setup["checkpoints"]))})
            _serve(watch, setup["silence"])
    finally:
        last = watch.end()
        watch.forget()
    with contextlib.suppress(BrokenPipeError):
        _say({**last, "step": newest_step(Path(setup["checkpoints"]))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
