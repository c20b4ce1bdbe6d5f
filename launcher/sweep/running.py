"""How are the points of a sweep run, one after another, so that neither a crash nor a signal costs more than one?"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from launcher.run_folder import RunLock
from launcher.stopping import EXIT_ERROR, EXIT_SIGNAL, SIGNALS, Stopped, StopRequest, stop_requests
from launcher.sweep.progress import SweepProgress
from launcher.sweep.sweep_folder import Listed, SweepFolder

_LOOK_SECONDS = 0.1
# Of a log, shown where a point fails: its last lines, and errors of ours that a launcher has said much after.
_LAST_LINES, _LAST_BYTES, _MAX_ERRORS = 15, 2**16, 3
_ERROR = "sparse-zero: error: "
# Interrupts of a user that the point gets before it is killed: one to stop, one to hurry.
_MAX_INTERRUPTS = 2
# What colours a terminal or moves its cursor.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07)")


def lock_of(folder: SweepFolder) -> RunLock:
    """Keeps a second sweep out of the folder."""
    return RunLock(folder.path, "sweep.folder", "another sweep")


def start_command(config: Path) -> list[str]:
    """What starts one point, as an argument list."""
    return [sys.executable, "-m", "launcher", "launch", "--config", str(config)]


def run_points(
    folder: SweepFolder, chosen: Sequence[Listed], progress: SweepProgress, *, stops_at_failure: bool
) -> int:
    """Run points that are not finished; returns the exit code: of a signal, 1 where one did not finish, or 0.

    Args:
        folder: of the sweep, with its list and configs.
        chosen: the points; those that another process runs are passed over.
        progress: is told.
        stops_at_failure: end with the first point that fails, instead of going on with the next.
    """
    code = 0
    with stop_requests() as request, progress:
        for listed in chosen:
            if request.signal:
                return EXIT_SIGNAL + request.signal
            if folder.state(listed.name) == "running":
                progress.say(f"{listed.name} is being run by another process: passed over")
                code = EXIT_ERROR
                continue
            progress.start(listed.name)
            log = folder.log(listed.name)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                begin = output.tell()
                ended = run_point(folder, listed.name, request, output)
            if ended == 0:
                progress.end(listed.name, "finished")
                continue
            # It may have failed for a reason of its own just when the signal came.
            if request.signal and ended - EXIT_SIGNAL in (*SIGNALS, signal.SIGKILL):
                progress.end(listed.name, "stopped")
                return EXIT_SIGNAL + request.signal
            code = EXIT_ERROR
            progress.end(listed.name, f"failed with exit code {ended}", [*last_lines(log, begin), f"all of it: {log}"])
            if stops_at_failure:
                break
    return code


def run_point(folder: SweepFolder, name: str, request: StopRequest, output: IO[bytes] | None) -> int:
    """Run one point in a process of its own and keep how it ended; returns its exit code.

    Args:
        folder: of the sweep.
        name: of the point.
        request: signals that have come are passed on.
        output: where the point's output goes; None: where this process's goes.
    """
    began = time.monotonic()
    process = begin_point(folder, name, start_command(folder.config(name)), output)
    try:
        code = _wait(process, request)
    finally:
        if process.poll() is None:
            process.terminate()
    return keep_outcome(folder, name, code, time.monotonic() - began)


def begin_point(
    folder: SweepFolder,
    name: str,
    command: Sequence[str],
    output: IO[bytes] | None,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a point, and forget how an earlier start of it ended.

    Args:
        folder: of the sweep.
        name: of the point.
        command: what starts it.
        output: where the point's output goes; None: where this process's goes.
        environment: of the point; None: this process's.
    """
    if folder.state(name) != "running":
        folder.outcome(name).unlink(missing_ok=True)
    # A session of its own: a terminal's interrupt comes to this process alone, which passes it on.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def shell_code(code: int) -> int:
    """What a shell would call the code that :class:`subprocess.Popen` has, which is negative of a signal."""
    return code if code >= 0 else EXIT_SIGNAL - code


def keep_outcome(folder: SweepFolder, name: str, code: int, seconds: float) -> int:
    """Write how a point ended; its exit code, which is 1 where its summary is missing.

    Args:
        folder: of the sweep.
        name: of the point.
        code: as :func:`shell_code` says it.
        seconds: that it took.
    """
    if code == 0 and not folder.run(name).summary.is_file():
        code = EXIT_ERROR
    # Another start that has the run folder will say how the point ends; this one was turned away.
    if not (code and folder.state(name) == "running"):
        folder.write_outcome(name, code, seconds)
    return code


def _wait(process: "subprocess.Popen[bytes]", request: StopRequest) -> int:
    """Wait until a point has ended, passing signals on; its exit code as a shell would say it."""
    told = interrupts = 0
    while True:
        try:
            code = process.poll()
            if code is not None:
                return shell_code(code)
            if request.signal and not told:
                told = request.signal
                interrupts = 1
                process.send_signal(told)
            time.sleep(_LOOK_SECONDS)
        except Stopped:
            # A user cannot wait: the launcher hurries at the second one.
            interrupts += 1
            process.send_signal(signal.SIGINT if interrupts <= _MAX_INTERRUPTS else signal.SIGKILL)


def last_lines(log: Path, begin: int = 0) -> list[str]:
    """Errors and the last lines of a log from byte ``begin`` on, without what would control a terminal."""
    with suppress(OSError), log.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(begin, end - _LAST_BYTES))
        text = _ESCAPES.sub("", file.read().decode("utf-8", errors="replace")).replace("\r", "\n")
        lines = ["".join(letter for letter in line if letter.isprintable()) for line in text.splitlines()]
        said = [line for line in lines if line.strip()]
        return [line for line in said[:-_LAST_LINES] if _ERROR in line][:_MAX_ERRORS] + said[-_LAST_LINES:]
    return []
