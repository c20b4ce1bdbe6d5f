"""How is a run simulated while it trains, without disturbing it? Also the script that the child process is."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from launcher.config import RunConfig, parse_config, resolved_yaml
from launcher.process_ranks import OF_ONE_RANK
from launcher.yaml_files import parse_yaml

_LOWEST_PRIORITY = 19
# With what tells this process its rank, they are this run's; the simulation is a world of its own.
_OF_THIS_WORLD = ("MASTER_ADDR", "MASTER_PORT")
# prctl(2): the signal that this process gets when the one that started it ends.
_PR_SET_PDEATHSIG = 1
# proc(5): where memory is short, the kernel ends this one first.
_OOM_SCORE = Path("/proc/self/oom_score_adj")


class SimulationBeside:
    """A child process of the lowest priority, on one core and no GPU, that simulates a run.

    It ends with the process that started it, whatever ends that. As a context, at the block's end.

    Args:
        config: of the run.
        world_size: ranks.
        changes: fields of :class:`~sparse_zero.memory.closed_form.job.MemoryJob`, as JSON values.
    """

    def __init__(self, config: RunConfig, world_size: int, changes: Mapping[str, Any]) -> None:
        here = Path(__file__).resolve()
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in _OF_THIS_WORLD and not OF_ONE_RANK.fullmatch(name)
            },
            "PYTHONPATH": os.pathsep.join(filter(None, [str(here.parents[2]), os.environ.get("PYTHONPATH")])),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        # A file takes whatever is said without anybody reading.
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(here), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        told = {
            "config": parse_yaml(resolved_yaml(config), "the run"),
            "world_size": world_size,
            "changes": dict(changes),
        }
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin:
            self._process.stdin.write(json.dumps(told).encode())

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def result(self, wait_seconds: float) -> dict[str, Any]:
        """What :func:`launcher.plan.simulation.simulate_run` returns, or ``{"problem": why there is none}``."""
        try:
            code = self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return {
                "problem": f"not done {wait_seconds:g} s after the run (memory.wait_seconds); sparse-zero plan does it"
            }
        self._out.seek(0)
        with suppress(ValueError):
            found = json.loads(self._out.read())
            if isinstance(found, dict):
                return found
        return {"problem": f"the simulation ended with code {code}"}

    def close(self) -> None:
        """End it, if it still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()


def end_with(parent: int) -> None:
    """End this process, and what it starts, when the parent ends."""

    def end(number: int, frame: FrameType | None) -> None:
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        end(0, None)


def main() -> int:
    """Simulate what standard input describes; the result goes to standard output."""
    end_with(int(sys.argv[1]))
    os.nice(_LOWEST_PRIORITY)
    with suppress(OSError):
        _OOM_SCORE.write_text("1000")
    told = json.load(sys.stdin)
    from launcher.plan.simulation import simulate_run

    found: dict[str, Any]
    try:
        with redirect_stdout(sys.stderr):
            found = simulate_run(parse_config(told["config"]), told["world_size"], **told["changes"])
    except Exception as error:  # A line in the report, whatever it is.
        found = {"problem": " ".join(str(error).split())[:500] or type(error).__name__}
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
