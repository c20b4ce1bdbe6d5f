"""`sparse-zero launch`: start the worker on every rank of the cluster."""

import argparse
import dataclasses
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from launcher.commands.common import Parser, add_command, read_run
from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.emitting.emit import SYSTEMS, emit
from launcher.preflight.before_launch import check_before_launch
from launcher.preflight.forecast_beside import ForecastBeside
from launcher.preflight.wanted import wanted_of
from launcher.process_ranks import free_port, slurm_port
from launcher.run_folder import RunFolder
from launcher.saying import say
from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.command_line import check_remote_shell, script_file, worker_by_hand, worker_command
from launcher.starting.find_mpirun import mpirun_first
from launcher.starting.live_view import make_view
from launcher.starting.nodes import (
    Limits,
    Node,
    Reach,
    Start,
    choose_nodes,
    limits_of,
    master_of,
    read_nodes,
    standing_by,
)
from launcher.starting.reach import reach_of
from launcher.starting.slurm import nodes_of_allocation
from launcher.starting.start_files import exported_variables, files_of_run
from launcher.starting.supervising import Supervisor
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
sparse-zero launch --config run.yaml --emit slurm --out job.sh     a batch script; then: sbatch job.sh
""",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    instead.add_argument(
        "--emit", choices=SYSTEMS, help="start nothing: write what this batch system needs to run the same config"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where --emit writes; nothing may be there yet (default: printed)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    if args.emit is not None or args.out is not None:
        return emit(args)
    config = read_run(args)
    num_gpus, devices = ranks_of(config)
    nodes = nodes_of(config.cluster, num_gpus)
    limits = limits_of(config.cluster, nodes) if nodes else Limits(least=1, most=1)
    starting = choose_nodes(nodes, limits)
    ranks = sum(node.slots for node in starting) or (num_gpus or 0) * config.cluster.num_nodes
    if ranks:
        # Found here, a contradiction is one line; found by the workers, it is one for every rank.
        deepspeed_config(config, ranks)

    cluster = config.cluster
    if cluster.reaches_nodes:
        check_remote_shell(
            python=sys.executable,
            folder=str(Path.cwd()),
            python_path=os.environ.get("PYTHONPATH", ""),
            package=script_file("launcher.starting.start_rank"),
        )
    environment = exported_variables(cluster, os.environ)
    left = standing_by(cluster, nodes, starting)
    if left is not None:
        say(left)
    remote, port = reach_of(cluster), master_port_of(config)

    def command(start: Start, folder: Path) -> list[str]:
        changed, hostfile = cluster, None
        if cluster.reaches_nodes:
            changed, hostfile = cluster_of_start(config, nodes, start), str(folder / f"hostfile-{start.restarts}")
            write_hostfile(Path(hostfile), start.nodes, cluster)
        return worker_command(
            changed,
            start.record,
            overrides_of_start(config, start),
            python=sys.executable,
            num_gpus=None if cluster.reaches_nodes else num_gpus,
            master_port=port,
            hostfile=hostfile,
            nodes=[node.name for node in start.nodes],
            devices=devices or None,
        )

    if args.dry_run:
        _print_plan(args, config, nodes, limits, remote, environment, command)
        return 0
    beside: AbstractContextManager[object] = nullcontext()
    if cluster.preflight:
        wanted = wanted_of(
            config,
            nodes,
            ranks_here=num_gpus,
            world_size=ranks or 1,
            master_port=port,
            environment=environment,
            devices=devices,
        )
        beside = ForecastBeside(wanted, check_before_launch(wanted, [node.name for node in starting]))
    with beside, tempfile.TemporaryDirectory(prefix="sparse_zero_launch_") as folder, _mpirun(cluster, Path(folder)):
        supervisor = Supervisor(
            nodes or [Node("this machine", 1)],
            limits,
            cluster,
            lambda start: command(start, Path(folder)),
            RunFolder(config.output.folder),
            remote,
            files_of_run(config, environment),
            make_view(config.output.folder),
        )
        return supervisor.run()


def nodes_of(cluster: ClusterConfig, ranks_per_node: int | None) -> list[Node]:
    """All nodes that this command may start something on, and their ranks; none where every node has its command."""
    if cluster.launcher == "slurm":
        return nodes_of_allocation(cluster, os.environ)
    if cluster.names_nodes:
        nodes = [Node(node.name, ranks_per_node or node.slots) for node in read_nodes(cluster)]
        if cluster.launcher == "mpich" and len({node.slots for node in nodes}) > 1:
            raise InputError(
                "cluster.launcher is mpich, and the nodes have different numbers of slots: set cluster.ranks_per_node"
            )
        return nodes
    if cluster.num_nodes > 1:
        return []
    import torch

    return [Node("this machine", ranks_per_node or torch.cuda.device_count())]


def _mpirun(cluster: ClusterConfig, folder: Path) -> AbstractContextManager[None]:
    """Has DeepSpeed start the right mpirun, where it starts one."""
    return mpirun_first(cluster.launcher, folder) if cluster.launcher in ("openmpi", "mpich") else nullcontext()


def cluster_of_start(config: RunConfig, nodes: Sequence[Node], start: Start) -> ClusterConfig:
    """The section of one start: on other nodes, perhaps with another first one.

    Raises:
        InputError: the run's batches do not fit its ranks.
    """
    cluster = dataclasses.replace(
        config.cluster,
        num_nodes=len(start.nodes),
        ranks_per_node=start.nodes[0].slots,
        master_address=master_of(config.cluster, nodes[0], start),
        # Limits are those of the whole run, and of no interest to the ranks of this one start.
        min_world_size=None,
        max_world_size=None,
    )
    deepspeed_config(dataclasses.replace(config, cluster=cluster), sum(node.slots for node in start.nodes))
    return cluster


def write_hostfile(path: Path, nodes: Sequence[Node], cluster: ClusterConfig) -> None:
    """The nodes of one start, for the launcher."""
    # mpirun has ssh told the user.
    user = f"{cluster.ssh_user}@" if cluster.launcher == "pdsh" and cluster.ssh_user else ""
    lines = (f"{'' if '@' in node.name else user}{node.name} slots={node.slots}\n" for node in nodes)
    path.write_text("".join(lines), encoding="utf-8")


def overrides_of_start(config: RunConfig, start: Start) -> list[str]:
    """What of the config is another at a restart: from where it goes on."""
    checkpoints, resume = RunFolder(config.output.folder).checkpoints, config.checkpoint.resume
    named_here = resume not in ("auto", "never") and Path(resume).resolve().parent == checkpoints.resolve()
    if start.restarts and (resume == "never" or named_here):
        # By now the run folder has what this very run wrote, which is what the setting was to keep apart.
        return ["--checkpoint.resume=auto"]
    return []


def _print_plan(
    args: argparse.Namespace,
    config: RunConfig,
    nodes: Sequence[Node],
    limits: Limits,
    remote: Reach | None,
    environment: Mapping[str, str],
    command: Callable[[Start, Path], Sequence[str]],
) -> None:
    """What would run, line by line as a shell would take it, and in comments what it would be given."""
    chosen = choose_nodes(nodes, limits)
    start = Start(nodes=chosen, restarts=0, record="/tmp/sparse-zero-RANDOM")
    guard = [sys.executable, script_file("launcher.starting.node_guard")]
    with tempfile.TemporaryDirectory(prefix="sparse_zero_launch_") as folder:
        line = shlex.join(command(start, Path(folder)))
        print("# on every node a guard, which writes the config and the environment for the ranks, and ends them")
        for node in nodes or (None,):
            print(shlex.join(remote(node.name, guard) if remote and node else guard))
        if environment:
            print(f"# variables for every rank: {', '.join(sorted(environment))}")
        if config.cluster.reaches_nodes:
            print(f"# hostfile-0: {'; '.join((Path(folder) / 'hostfile-0').read_text().splitlines())}")
        print("# on this node, the launcher")
        print(line.replace(folder, "/tmp/sparse_zero_launch_RANDOM"))
    print("# any launcher that is started by hand runs this on every rank")
    print(shlex.join(worker_by_hand(args.config, args.overrides, python=sys.executable)))


def ranks_of(config: RunConfig) -> tuple[int | None, Sequence[str] | None]:
    """Ranks per node (None: the launcher counts) and the GPUs that they may use (None: all; none: on the CPU)."""
    wanted = config.cluster.ranks_per_node
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if config.cluster.reaches_nodes:
        return wanted, None
    import torch  # takes a second

    if not torch.cuda.is_available():
        return wanted or _CPU_RANKS, ()
    available = torch.cuda.device_count()
    if wanted is not None and wanted > available:
        raise InputError(f"cluster.ranks_per_node is {wanted}, but {available} GPUs are visible: lower it")
    return wanted, visible or None


def master_port_of(config: RunConfig) -> int:
    """The port of the rendezvous: the config's, or a free one of this node, or the usual one across nodes."""
    cluster = config.cluster
    if cluster.master_port is not None:
        return cluster.master_port
    if cluster.launcher == "slurm" and os.environ.get("SLURM_JOB_ID", "").isdecimal():
        return slurm_port(int(os.environ["SLURM_JOB_ID"]), 0)  # Jobs may share a node.
    if cluster.num_nodes > 1:
        return _PORT_ACROSS_NODES
    return free_port()
