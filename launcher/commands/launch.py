"""`sparse-zero launch`: start the worker on every rank of the cluster."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from launcher.command_line import worker_command
from launcher.commands.common import Parser, add_command, read_run
from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.process_ranks import free_port
from sparse_zero.errors import InputError

# Two ranks show on any machine what one would hide, and share two cores.
_CPU_RANKS = 2
# What nodes agree on without a word: the default of torch and of DeepSpeed.
_PORT_ACROSS_NODES = 29500
# Time for the workers to write a checkpoint and end, after the launcher itself has ended.
_GRACE_SECONDS = 120.0


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "launch",
        "fine-tune on every rank of the cluster section, through DeepSpeed's or torch's launcher",
        """
sparse-zero launch --config configs/runs/quickstart.yaml           every GPU here, or 2 CPU ranks
sparse-zero launch --config run.yaml --cluster.ranks_per_node=4
sparse-zero launch --config configs/runs/llama-2-7b-smt-2x8.yaml --cluster.hostfile=hosts --dry-run
""",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    config = read_run(args)
    hostfile = config.cluster.hostfile
    if config.cluster.launcher == "pdsh" and hostfile is not None and not Path(hostfile).is_file():
        raise InputError(f"cluster.hostfile is {hostfile}, which is no file: it needs a line 'name slots=8' a node")
    num_gpus, devices = _ranks(config)
    if num_gpus is not None:
        # Found here, a contradiction is one line; found by the workers, it is one for every rank.
        deepspeed_config(config, num_gpus * config.cluster.num_nodes)
    command = worker_command(
        config,
        args.config,
        args.overrides,
        python=sys.executable,
        num_gpus=num_gpus,
        master_port=_master_port(config),
        devices=devices,
    )
    if args.dry_run:
        print(shlex.join(command))
        return 0
    return _run_to_the_end(command)


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _run_to_the_end(command: Sequence[str]) -> int:
    """Run the launcher in a process group of its own, and let a signal end all of it cleanly.

    DeepSpeed's runner dies of a signal without ending its workers. So the whole group is told, the workers write
    their checkpoint, and this process waits until the group is empty. A second signal kills it.

    Returns:
        The launcher's exit code; 128 + signal when one ended the run.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    process = subprocess.Popen(command, start_new_session=True)
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        deadline = time.monotonic() + _GRACE_SECONDS
        while _group_is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code


def _ranks(config: RunConfig) -> tuple[int | None, Sequence[str] | None]:
    """Ranks per node (None: the launcher counts) and the GPUs that they may use (None: all)."""
    wanted = config.cluster.ranks_per_node
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if config.cluster.launcher == "pdsh":
        return wanted, None
    import torch  # takes a second

    if not torch.cuda.is_available():
        return wanted or _CPU_RANKS, None
    available = torch.cuda.device_count()
    if wanted is not None and wanted > available:
        raise InputError(f"cluster.ranks_per_node is {wanted}, but {available} GPUs are visible: lower it")
    return wanted, visible or None


def _master_port(config: RunConfig) -> int:
    """The port of the rendezvous: the config's, or a free one of this node, or the usual one across nodes."""
    cluster = config.cluster
    if cluster.master_port is not None:
        return cluster.master_port
    if cluster.num_nodes > 1:
        return _PORT_ACROSS_NODES
    return free_port()
