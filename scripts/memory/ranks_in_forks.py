"""How does a function run on several real ranks that start at once, since they are forked and import nothing?"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from launcher.process_ranks import free_port

_LOOPBACK = "127.0.0.1"
# What DeepSpeed's CPU collectives leave in shared memory, by address and port.
_LEFT_BEHIND = "/dev/shm/deepspeed_allreduce_buffer_*{address}_{port}_*"
_TOLD_CHARACTERS = 4000


def _rank(
    function: Callable[..., Any], arguments: Mapping[str, Any], environment: Mapping[str, str], folder: str
) -> None:
    """What each process does. It ends without the handlers of the one that it was forked from."""
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    descriptor = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 0
    try:
        import deepspeed
        import torch
        import torch.distributed as dist

        from sparse_zero.collectives import leave_process_group

        torch.set_num_threads(1)
        deepspeed.init_distributed(
            dist_backend="gloo",
            auto_mpi_discovery=False,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            verbose=False,
        )
        found = function(**arguments)
        Path(f"{folder}/rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
        leave_process_group()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
        context: see :func:`scripts.memory.in_processes.preloaded_context`.
        function: of a module; called as ``function(**arguments)`` on each rank; returns what JSON can hold.
        arguments: can be pickled.
        world_size: ranks, each a process with one thread.
        timeout: seconds until all are killed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sparse_zero_ranks_") as folder:
        processes = []
        for rank in range(world_size):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            environment |= {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
            process = context.Process(target=_rank, args=(function, dict(arguments), environment, folder))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        while any(each.is_alive() for each in processes) and time.monotonic() < deadline:
            if any(each.exitcode not in (None, 0) for each in processes):
                time.sleep(2.0)  # Let the others say what they saw.
                break
            time.sleep(0.05)
        codes = [each.exitcode for each in processes]
        for each in processes:
            if each.exitcode is None:
                each.kill()
            each.join()
            each.close()
        for left in Path("/").glob(_LEFT_BEHIND.format(address=_LOOPBACK, port=port).lstrip("/")):
            left.unlink(missing_ok=True)
        if codes != [0] * world_size:
            return {"failed": _told(Path(folder), codes)}
        return {"ranks": [json.loads(Path(f"{folder}/rank{rank}.json").read_text()) for rank in range(world_size)]}


def _told(folder: Path, codes: list[int | None]) -> str:
    parts = []
    for rank, code in enumerate(codes):
        log = folder / f"rank{rank}.log"
        said = log.read_text(errors="replace")[-_TOLD_CHARACTERS:] if log.is_file() else ""
        parts.append(f"--- rank {rank}, exit code {'none: killed' if code is None else code}\n{said}")
    return "\n".join(parts)
