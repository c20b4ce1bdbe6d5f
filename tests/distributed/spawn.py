"""How do the tests run a function on several real ranks: gloo, file rendezvous, a time limit, tracebacks shown?

Ranks are forked from one process that has imported torch, DeepSpeed and transformers, and done nothing else: importing
them costs more than most of what the ranks are asked to do.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launcher.process_ranks import free_port
from tests.distributed.rank_main import RANK_VARIABLES, be_a_program, run_rank

ROOT = Path(__file__).resolve().parents[2]
# The last ones are imported by the first engine (torch's compiler), loaded model, progress bar and report.
PRELOADED = [
    "tests.distributed.workers",
    "launcher.__main__",
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


def preloaded_context(modules: Sequence[str] = PRELOADED) -> ForkServerContext:
    """What starts processes that are forked from one which has imported ``modules``; it does so at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    # A script's own path is not that of the process that imports.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with _environment({**ENVIRONMENT, "PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


def rank_variables(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher on one node tells a rank of its place."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def environment_of_rank(rank: int, world_size: int) -> dict[str, str]:
    """That of this process, with what tells a rank its place."""
    return {**os.environ, **ENVIRONMENT, **rank_variables(rank, world_size)}


def wait_for(processes: Sequence[BaseProcess], timeout: float, expected: int = 0) -> list[int | None]:
    """Exit codes of ranks, when all have ended, or been ended: one has failed, or it took ``timeout`` seconds.

    Args:
        processes: started; they are closed.
        timeout: seconds.
        expected: a rank that ends with it has not failed.
    """
    deadline = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in processes):
            if any(process.exitcode not in (None, expected) for process in processes):
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
    return codes


def said_by(folder: Path, codes: Sequence[int | None], characters: int = 6000) -> str:
    """The end of what each rank wrote to its log in ``folder``."""
    parts = []
    for rank, code in enumerate(codes):
        log = folder / f"rank{rank}.log"
        said = log.read_text(errors="replace")[-characters:] if log.is_file() else ""
        parts.append(f"--- rank {rank}, exit code {'none: killed' if code is None else code}\n{said}")
    return "\n".join(parts)


def outside_of_jobs() -> dict[str, str]:
    """This process's environment, without what launchers and schedulers tell their ranks; one thread for torch."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM_"))}
    return {**{name: value for name, value in kept.items() if name not in RANK_VARIABLES}, **ENVIRONMENT}


def environments_of_job(num_ranks: int) -> list[dict[str, str]]:
    """All of the environment of each rank of a new job on this node, as a launcher would give it."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_SIZE": str(num_ranks)}
    return [{**outside_of_jobs(), **meeting, **rank_variables(rank, num_ranks)} for rank in range(num_ranks)]


def run_program(
    module: str,
    arguments: Sequence[str],
    *,
    num_ranks: int = 0,
    folder: Path | None = None,
    code: int = 0,
    timeout: float = 240.0,
) -> str:
    """What ``python -m module arguments`` says, forked from a process that has its imports done.

    Args:
        module: has ``main(arguments)``, which returns the exit code.
        arguments: of its command line.
        num_ranks: how many of them a launcher would start; 0: it is started alone, as by a user.
        folder: to work in; None is that of the tests.
        code: the exit code that all shall have.
        timeout: seconds until all are killed.
    """
    context = preloaded_context()
    with tempfile.TemporaryDirectory(prefix="sparse_zero_said_") as logs:
        processes = []
        for rank, environment in enumerate(environments_of_job(num_ranks) or [outside_of_jobs()]):
            log = Path(logs) / f"rank{rank}.log"
            log.touch()
            job = (module, list(arguments), folder or Path.cwd(), environment, log)
            processes.append(context.Process(target=be_a_program, args=job))
            processes[-1].start()
        codes = wait_for(processes, timeout, code)
        said = said_by(Path(logs), codes, 100_000)
    assert codes == [code] * len(codes), said
    return said


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
            environment = environment_of_rank(rank, world_size)
            process = context.Process(target=run_rank, args=(json.dumps(job), environment))
            process.start()
            processes.append(process)
        codes = wait_for(processes, timeout)
        if codes != [0] * world_size:
            raise AssertionError(f"{function} failed on {world_size} ranks\n{said_by(Path(folder), codes)}")
        return json.loads(result.read_text())
