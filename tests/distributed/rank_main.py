"""What does each spawned rank do: join the process group, call the function, write rank 0's result?"""

import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# What processes of a run know their rank and meeting place by. DeepSpeed sets them in processes that start alone, too.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def become_rank(environment: dict[str, str], log: Path) -> None:
    """Give this forked process the environment of a rank, and a file of its own for its output."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def be_a_program(
    module: str, arguments: Sequence[str], folder: Path, environment: dict[str, str], log: Path
) -> NoReturn:
    """Be a program in this forked process, as if ``python -m module arguments`` had been typed in ``folder``.

    Args:
        module: has ``main(arguments)``, which returns the exit code.
        arguments: of its command line.
        folder: to work in.
        environment: replaces that of the process it was forked from.
        log: gets its output, of both streams.
    """
    become_rank(environment, log)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    # Returns as the interpreter of a script does: threads that write are waited for.
    sys.exit(importlib.import_module(module).main(list(arguments)))


def run_rank(description: str, environment: dict[str, str]) -> None:
    """Run a job on this rank, with output to a file of its own; ends the process with exit code 0, or 1 on an error.

    Args:
        description: JSON with the function, its arguments, and the files for result, rendezvous and output.
        environment: replaces that of the process it was forked from.
    """
    job = json.loads(description)

    def work() -> None:
        module, _, name = str(job["function"]).partition(":")
        warnings.simplefilter("default")
        result = getattr(importlib.import_module(module), name)(**job["arguments"])
        if os.environ["RANK"] == "0":
            Path(job["result"]).write_text(json.dumps(result))

    work_in_world(work, environment, Path(job["folder"]))


def work_in_world(work: Callable[[], object], environment: dict[str, str], folder: Path) -> NoReturn:
    """Do ``work`` as one rank of a world (gloo); ends the process with exit code 0, or 1 on an error.

    Args:
        work: what the rank does.
        environment: replaces that of the process it was forked from.
        folder: of the ranks' rendezvous and logs.
    """
    become_rank(environment, folder / f"rank{environment['RANK']}.log")
    code = 0
    try:
        _join_and(work, f"file://{folder}/rendezvous")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # As a process that was started for this would: no handlers and threads of the one it was forked from.
    os._exit(code)


def _join_and(work: Callable[[], object], rendezvous: str) -> None:
    import torch

    torch.set_num_threads(1)
    import deepspeed
    import torch.distributed as dist

    from sparse_zero.collectives import leave_process_group

    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=rendezvous,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        verbose=False,
    )
    work()
    dist.barrier()
    leave_process_group()
