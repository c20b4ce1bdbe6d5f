"""How do the tests run a function on several real ranks: gloo, file rendezvous, a time limit, tracebacks shown?

Ranks are forked from one process that has imported torch, DeepSpeed and transformers, and done nothing else: importing
them costs more than most of what the ranks are asked to do.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.distributed.rank_main import run_rank

ROOT = Path(__file__).resolve().parents[2]
# The last ones are imported by the first engine (torch's compiler), loaded model, progress bar and report.
PRELOADED = [
    "tests.distributed.workers",
    "launcher.train",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.original_muon",
    "transformers.models.auto.modeling_auto",
    "rich.progress",
    "matplotlib.backends.backend_agg",
]
# Libraries read these when they are loaded, which happens once, before the ranks are forked.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def preloaded_context() -> ForkServerContext:
    """What starts processes that are forked from one which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _environment(ENVIRONMENT):
        forkserver.ensure_running()
    return context


def run_ranks(function: str, world_size: int, *, timeout: float = 240.0, **arguments: Any) -> Any:
    """Call ``module:function(**arguments)`` on every rank of a new world; return what rank 0 returns.

    Args:
        function: ``tests.distributed.workers:name``; it runs after DeepSpeed's process group is up.
        world_size: ranks, each a process with one thread.
        timeout: seconds until all ranks are killed and the test fails.
        arguments: JSON values.
    """
    context = preloaded_context()
    with tempfile.TemporaryDirectory(prefix="sparse_zero_ranks_") as folder:
        result = Path(folder) / "result.json"
        job = {
            "function": function,
            "arguments": arguments,
            "result": str(result),
            "rendezvous": f"{folder}/rendezvous",
            "folder": folder,
        }
        processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
            }
            process = context.Process(target=run_rank, args=(json.dumps(job), environment))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                if any(process.exitcode not in (None, 0) for process in processes):
                    time.sleep(2.0)  # Let the others say what they saw before they are ended.
                    break
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            codes = [process.exitcode for process in processes]
            for process in processes:
                if process.exitcode is None:
                    process.kill()
                process.join()
                process.close()
        if codes != [0] * world_size:
            logs = "\n".join(
                f"--- rank {rank}, exit code {code if code is not None else 'none: killed'}\n"
                + (Path(folder) / f"rank{rank}.log").read_text(errors="replace")[-6000:]
                for rank, code in enumerate(codes)
            )
            raise AssertionError(f"{function} failed on {world_size} ranks\n{logs}")
        return json.loads(result.read_text())
