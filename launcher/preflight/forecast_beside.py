"""Will a run that is being started fit into memory? Also the script that says so while its ranks start.

Forecasting imports transformers, which takes seconds that a launch need not wait for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from launcher.config import parse_config, resolved_yaml
from launcher.preflight.asking import Answers
from launcher.preflight.wanted import Wanted
from launcher.process_ranks import OF_ONE_RANK
from launcher.starting.nodes import Node
from launcher.yaml_files import parse_yaml

_LOWEST_PRIORITY = 19
# proc(5): where memory is short, the kernel ends this one first.
_OOM_SCORE = Path("/proc/self/oom_score_adj")
# Of a node's facts.
_SECTIONS = ("gpus", "memory")


class ForecastBeside:
    """A child process of the lowest priority that warns, on this one's error stream, of what cannot fit.

    A context: at its end the child is ended, done or not.

    Args:
        wanted: what the run needs.
        answers: of its nodes.
    """

    def __init__(self, wanted: Wanted, answers: Answers) -> None:
        here = Path(__file__).resolve()
        environment = {name: value for name, value in os.environ.items() if not OF_ONE_RANK.fullmatch(name)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here.parents[2]), os.environ.get("PYTHONPATH")]))
        environment.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        self._process = subprocess.Popen(
            [sys.executable, str(here), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        told = {
            "config": parse_yaml(resolved_yaml(wanted.config), "the run"),
            "nodes": {node.name: node.slots for node in wanted.nodes},
            "world_size": wanted.world_size,
            "devices": wanted.devices,
            "facts": {node: {name: facts[name] for name in _SECTIONS} for node, facts in answers.facts.items()},
        }
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin:
            self._process.stdin.write(json.dumps(told).encode())

    def __enter__(self) -> ForecastBeside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> int:
    """Forecast what standard input describes, and say what does not fit."""
    from launcher.memory.simulating_beside import end_with

    end_with(int(sys.argv[1]))
    os.nice(_LOWEST_PRIORITY)
    with suppress(OSError):
        _OOM_SCORE.write_text("1000", encoding="utf-8")
    told = json.load(sys.stdin)
    from launcher.preflight.memory_check import check_memory, forecast_need
    from launcher.preflight.table import problem_lines

    try:
        config = parse_config(told["config"])
        wanted = Wanted(
            config=config,
            nodes=tuple(Node(name, slots) for name, slots in told["nodes"].items()),
            world_size=told["world_size"],
            master_address=None,
            master_port=None,
            devices=told["devices"],
        )
        need = forecast_need(config, told["world_size"])
        # Without a closed form for the model there is nothing to warn of.
        found = [] if need.problem else check_memory(wanted, Answers(facts=told["facts"]), need)
        lines = problem_lines([finding.as_warning() for finding in found if finding.status == "fail"])
    except Exception as error:  # The run goes on without: one line, whatever it is.
        lines = [f"warn: no forecast of memory: {' '.join(str(error).split())[:200] or type(error).__name__}"]
    for line in lines:
        print(f"sparse-zero: {line}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
