"""What does a function return on several real ranks that start at once, since they are forked and import nothing?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from launcher.process_ranks import free_port
from tests.distributed.rank_main import work_in_world
from tests.distributed.spawn import environment_of_rank, said_by, wait_for

_LOOPBACK = "127.0.0.1"
# What DeepSpeed's CPU collectives leave in shared memory, by address and port.
_LEFT_BEHIND = "/dev/shm/deepspeed_allreduce_buffer_*{address}_{port}_*"


def _rank(function: Callable[..., Any], arguments: Mapping[str, Any], environment: dict[str, str], folder: str) -> None:
    """What each process does."""
    out = Path(folder) / f"rank{environment['RANK']}.json"
    work_in_world(
        lambda: out.write_text(json.dumps(function(**arguments)), encoding="utf-8"), environment, Path(folder)
    )


def on_forked_ranks(
    context: ForkServerContext,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    world_size: int,
    timeout: float,
) -> dict[str, Any]:
    """What every rank of a new world (gloo) returns, as "ranks"; or "failed" and what they said.

    Args:
        context: see :func:`tests.distributed.spawn.preloaded_context`.
        function: of a module; called as ``function(**arguments)`` on each rank; returns what JSON can hold.
        arguments: can be pickled.
        world_size: ranks, each a process with one thread.
        timeout: seconds until all are killed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sparse_zero_ranks_") as folder:
        processes = []
        for rank in range(world_size):
            meeting = {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
            environment = {**environment_of_rank(rank, world_size), **meeting}
            process = context.Process(target=_rank, args=(function, dict(arguments), environment, folder))
            process.start()
            processes.append(process)
        codes = wait_for(processes, timeout)
        for left in Path("/").glob(_LEFT_BEHIND.format(address=_LOOPBACK, port=port).lstrip("/")):
            left.unlink(missing_ok=True)
        if codes != [0] * world_size:
            return {"failed": said_by(Path(folder), codes)}
        return {"ranks": [json.loads(Path(f"{folder}/rank{rank}.json").read_text()) for rank in range(world_size)]}
