"""How does a child process compute something beside this one, without disturbing it, and end when it does?"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from launcher.process_ranks import OF_ONE_RANK

_LOWEST_PRIORITY = 19
# With what tells this process its rank, they are this run's; the child is in no world, or in one of its own.
_OF_THIS_WORLD = ("MASTER_ADDR", "MASTER_PORT")
# prctl(2): the signal that this process gets when the one that started it ends.
_PR_SET_PDEATHSIG = 1
# proc(5): where memory is short, the kernel ends this one first.
_OOM_SCORE = Path("/proc/self/oom_score_adj")


class ChildBeside:
    """A script of this package in a process of the lowest priority, on one core and no GPU.

    It calls :func:`begin_beside` first, and ends with the process that started it, whatever ends that.

    Args:
        script: its file.
        told: what it is given, for JSON.
        stdout: where its output goes, as :class:`subprocess.Popen` takes it.
        stderr: likewise.
    """

    def __init__(self, script: Path, told: Mapping[str, Any], *, stdout: int | IO[bytes], stderr: int) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _OF_THIS_WORLD and not OF_ONE_RANK.fullmatch(name)
        }
        package = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [sys.executable, str(script.resolve()), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin:
            self.process.stdin.write(json.dumps(told).encode())

    def close(self) -> None:
        """End it and what it has started, if it still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def begin_beside() -> Any:
    """In the child: be what :class:`ChildBeside` says, and return what was told."""
    _end_with(int(sys.argv[1]))
    os.nice(_LOWEST_PRIORITY)
    with suppress(OSError):
        _OOM_SCORE.write_text("1000", encoding="utf-8")
    return json.load(sys.stdin)


def _end_with(parent: int) -> None:
    """End this process, and what it starts, when the parent ends."""

    def end(number: int, frame: FrameType | None) -> None:
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        end(0, None)
