"""`sparse-zero launch`: start the worker on every rank of the cluster."""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launcher.cluster_config import ClusterConfig
from launcher.command_line import worker_command
from launcher.commands.common import Parser, add_command, read_run
from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.process_ranks import free_port
from launcher.run_folder import RunFolder
from launcher.supervising import Limits, Node, Start, Supervisor, limits_of, master_of, read_hostfile
from sparse_zero.errors import InputError

# Two ranks show on any machine what one would hide, and share two cores.
_CPU_RANKS = 2
# What nodes agree on without a word: the default of torch and of DeepSpeed.
_PORT_ACROSS_NODES = 29500


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
    num_gpus, devices = _ranks(config)
    nodes = _nodes(config.cluster, num_gpus)
    limits = limits_of(config.cluster, nodes) if nodes else Limits(least=1, most=1)
    ranks = sum(node.slots for node in nodes[: config.cluster.num_nodes]) or (num_gpus or 0) * config.cluster.num_nodes
    if ranks:
        # Found here, a contradiction is one line; found by the workers, it is one for every rank.
        deepspeed_config(config, ranks)

    def command(config: RunConfig, extra: Sequence[str]) -> list[str]:
        return worker_command(
            config,
            args.config,
            [*args.overrides, *extra],
            python=sys.executable,
            num_gpus=num_gpus,
            master_port=_master_port(config),
            devices=devices,
        )

    if args.dry_run:
        print(shlex.join(command(config, [])))
        return 0
    with tempfile.TemporaryDirectory(prefix="sparse_zero_launch_") as folder:
        supervisor = Supervisor(
            nodes or [Node("this machine", 1)],
            limits,
            config.cluster,
            lambda start: command(config_of_start(config, nodes, start, Path(folder)), worker_arguments(config, start)),
            RunFolder(config.output.folder).checkpoints,
            _remote(config.cluster),
        )
        return supervisor.run()


def _nodes(cluster: ClusterConfig, ranks_per_node: int | None) -> list[Node]:
    """All nodes that this command may start something on, and their ranks; none where every node has its command."""
    if cluster.launcher == "pdsh":
        assert cluster.hostfile is not None
        nodes = read_hostfile(Path(cluster.hostfile))
        return [Node(node.name, ranks_per_node or node.slots) for node in nodes]
    if cluster.num_nodes > 1:
        return []
    import torch

    return [Node("this machine", ranks_per_node or torch.cuda.device_count())]


def _remote(cluster: ClusterConfig) -> list[str]:
    """What runs a command on another node, in the way in which pdsh reaches it; empty where there is no other."""
    if cluster.launcher != "pdsh":
        return []
    if shutil.which("ssh") is None:
        raise InputError("cluster.launcher is pdsh, and this machine has no ssh: install the OpenSSH client")
    given = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(cluster.node_timeout))}", *given]


def config_of_start(config: RunConfig, nodes: Sequence[Node], start: Start, folder: Path) -> RunConfig:
    """The config of one start: on other nodes, perhaps with another first one."""
    if config.cluster.launcher != "pdsh":
        return config
    hostfile = folder / f"hostfile-{start.restarts}"
    hostfile.write_text("".join(f"{node.name} slots={node.slots}\n" for node in start.nodes), encoding="utf-8")
    cluster = dataclasses.replace(
        config.cluster,
        hostfile=str(hostfile),
        num_nodes=len(start.nodes),
        master_address=master_of(config.cluster, nodes[0], start.nodes[0]),
        # Limits are those of the whole run, and of no interest to the ranks of this one start.
        min_world_size=None,
        max_world_size=None,
    )
    changed = dataclasses.replace(config, cluster=cluster)
    deepspeed_config(changed, sum(node.slots for node in start.nodes))
    return changed


def worker_arguments(config: RunConfig, start: Start) -> list[str]:
    """What the worker is told besides: where to record its end, and from where a restart goes on."""
    extra = [f"--exit_record={start.record}"]
    checkpoints, resume = RunFolder(config.output.folder).checkpoints, config.checkpoint.resume
    named_here = resume not in ("auto", "never") and Path(resume).resolve().parent == checkpoints.resolve()
    if start.restarts and (resume == "never" or named_here):
        # By now the run folder has what this very run wrote, which is what the setting was to keep apart.
        extra.append("--checkpoint.resume=auto")
    return extra


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
