"""How is each of many jobs run in a process of its own, some at once, so that an interrupted study continues?"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from sparse_zero.errors import InputError

# What a simulation imports; importing it takes longer than most simulations.
PRELOADED = (
    "launcher.plan.simulating",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "deepspeed.runtime.zero.muon.original_muon",
    "torch.testing._internal.distributed.fake_pg",
)
# Of what a failed process said.
_TOLD_CHARACTERS = 4000


def _child(function: Callable[..., Any], arguments: Mapping[str, Any], out: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        found = function(**arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def in_fork(
    context: ForkServerContext, function: Callable[..., Any], arguments: Mapping[str, Any], timeout: float
) -> dict[str, Any]:
    """What ``function(**arguments)`` returns in a process of its own, or "failed" and what it said.

    Args:
        context: see :func:`tests.distributed.spawn.preloaded_context`.
        function: of a module, by whose name the process finds it; returns a mapping for JSON.
        arguments: can be pickled.
        timeout: seconds after which it is killed.
    """
    with tempfile.TemporaryDirectory(prefix="sparse_zero_case_") as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        process = context.Process(target=_child, args=(function, dict(arguments), str(out), str(log)))
        process.start()
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        if late:
            return {"failed": f"no result after {timeout:.0f} s"}
        if code != 0 or not out.is_file():
            told = log.read_text(errors="replace")[-_TOLD_CHARACTERS:].strip() if log.is_file() else ""
            return {"failed": told or f"exit code {code}"}
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """By name, the lines of a file that :func:`run_all` wrote; of a name that is there twice, the last.

    A last line that was cut when the program was killed is passed over.
    """
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        found[row["name"]] = row
    return found


def _end_cut_line(path: Path) -> None:
    """Let the next line not stick to one that a killed program has begun."""
    if path.is_file():
        text = path.read_bytes()
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def run_all(
    names: Sequence[str],
    work: Callable[[str], dict[str, Any]],
    results: Path,
    *,
    workers: int,
    on_result: Callable[[str, dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Do ``work`` for every name that ``results`` does not hold yet, and add what it returns as one line.

    Args:
        names: of all jobs.
        work: starts a process and waits for it; what it returns has "failed" if there is no result.
        results: JSON lines; those of failed jobs are not kept, so that a rerun tries them again.
        workers: jobs at once.
        on_result: told of each new result.

    Returns:
        Results by name, in the order of ``names``.

    Raises:
        InputError: fewer than one worker.
    """
    if workers < 1:
        raise InputError(f"--workers is {workers}: take at least 1")
    results.parent.mkdir(parents=True, exist_ok=True)
    known = finished(results)
    _end_cut_line(results)
    lock = threading.Lock()

    def one(name: str) -> tuple[str, dict[str, Any]]:
        found = {"name": name, **work(name)}
        if "failed" not in found:
            with lock, results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        return name, found

    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(one, name) for name in names if name not in known]
        try:
            for future in as_completed(waiting):
                name, found = future.result()
                known[name] = found
                on_result(name, found)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: known[name] for name in names}
