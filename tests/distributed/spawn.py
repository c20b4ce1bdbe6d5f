"""How do the tests run a function on several real ranks: gloo, file rendezvous, a time limit, tracebacks shown?"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: str, world_size: int, *, timeout: float = 240.0, **arguments: Any) -> Any:
    """Call ``module:function(**arguments)`` on every rank of a new world; return what rank 0 returns.

    Args:
        function: ``tests.distributed.workers:name``; it runs after DeepSpeed's process group is up.
        world_size: ranks, each a process with one thread.
        timeout: seconds until all ranks are killed and the test fails.
        arguments: JSON values.
    """
    with tempfile.TemporaryDirectory(prefix="sparse_zero_ranks_") as folder:
        result = Path(folder) / "result.json"
        job = {
            "function": function,
            "arguments": arguments,
            "result": str(result),
            "rendezvous": f"{folder}/rendezvous",
        }
        processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            with (Path(folder) / f"rank{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.distributed.rank_main", json.dumps(job)],
                        env=environment,
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() not in (None, 0) for process in processes):
                    time.sleep(2.0)  # Let the others say what they saw before they are ended.
                    break
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if codes != [0] * world_size:
            logs = "\n".join(
                f"--- rank {rank}, exit code {code if code is not None else 'none: killed'}\n"
                + (Path(folder) / f"rank{rank}.log").read_text(errors="replace")[-6000:]
                for rank, code in enumerate(codes)
            )
            raise AssertionError(f"{function} failed on {world_size} ranks\n{logs}")
        return json.loads(result.read_text())
