"""Which nodes does the Slurm job have that this process runs in, and how is a command run on one of them?"""

import re
import subprocess
from collections.abc import Mapping, Sequence

from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.nodes import Node
from sparse_zero.errors import InputError

_ASK_SECONDS = 30.0


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """A number above zero; None where there is none."""
    value = environ.get(name, "")
    return int(value) if re.fullmatch(r"[1-9]\d*", value) else None


def _ranks_per_node(cluster: ClusterConfig, environ: Mapping[str, str]) -> int:
    """As many as the config, the job's tasks, or its GPUs on each node say.

    One task per node is the usual header of a job whose one command starts the ranks: then the GPUs count.
    """
    if cluster.ranks_per_node is not None:
        return cluster.ranks_per_node
    tasks, gpus = (_number(environ, name) for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"))
    if gpus is not None and tasks in (None, 1):
        return gpus
    if tasks is not None:
        return tasks
    raise InputError(
        "cluster.ranks_per_node is missing, and the job was given neither --ntasks-per-node nor --gpus-per-node: "
        "set one of them"
    )


def nodes_of_allocation(cluster: ClusterConfig, environ: Mapping[str, str]) -> list[Node]:
    """The nodes of the job, in Slurm's order, each with as many ranks.

    Args:
        cluster: the run's section.
        environ: of a process in the job.

    Raises:
        InputError: this is no job, its nodes cannot be told, or nobody says how many ranks a node takes.
    """
    listed = environ.get("SLURM_JOB_NODELIST", "")
    if not listed:
        raise InputError(
            "cluster.launcher is slurm, and this is no Slurm job (SLURM_JOB_NODELIST is not set): start it with "
            "sbatch or in salloc"
        )
    ranks = _ranks_per_node(cluster, environ)
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=_ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"scontrol does not tell the nodes of SLURM_JOB_NODELIST {listed!r} ({error})") from error
    return [Node(name, ranks) for name in done.stdout.split()]


def on_allocated_node(node: str, command: Sequence[str]) -> list[str]:
    """What runs ``command`` as a step of its own on a node of the job, beside the steps that are there."""
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--cpu-bind=none", f"--nodelist={node}"]
    return [*step, *command]
