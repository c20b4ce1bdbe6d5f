"""Will a run that is being started fit into memory? Also the script that says so while its ranks start.

Forecasting imports transformers, which takes seconds that a launch need not wait for.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from launcher.beside import ChildBeside, begin_beside
from launcher.config import parse_config, resolved_yaml
from launcher.preflight.asking import Answers
from launcher.preflight.wanted import Wanted
from launcher.saying import say
from launcher.starting.nodes import Node
from launcher.yaml_files import parse_yaml

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
        told = {
            "config": parse_yaml(resolved_yaml(wanted.config), "the run"),
            "nodes": {node.name: node.slots for node in wanted.nodes},
            "world_size": wanted.world_size,
            "devices": wanted.devices,
            "facts": {node: {name: facts[name] for name in _SECTIONS} for node, facts in answers.facts.items()},
        }
        self._child = ChildBeside(Path(__file__), told, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        """By this process's own stream, which a picture of the run scrolls below the words."""
        assert self._child.process.stderr is not None
        for line in self._child.process.stderr:
            with suppress(OSError):  # The terminal may be gone.
                print(line.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ForecastBeside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()
        self._thread.join()
        assert self._child.process.stderr is not None
        self._child.process.stderr.close()


def main() -> int:
    """Forecast what standard input describes, and say what does not fit."""
    told = begin_beside()
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
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
