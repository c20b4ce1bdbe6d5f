"""How is a command run on another node of the cluster?"""

from __future__ import annotations

import os
import shlex
import shutil

from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.command_line import ssh_options
from launcher.starting.nodes import Reach
from launcher.starting.slurm import on_allocated_node
from sparse_zero.errors import InputError


def reach_of(cluster: ClusterConfig, connect_seconds: float | None = None) -> Reach | None:
    """What runs a command on another node, as the launcher reaches it; None where there is no other.

    Args:
        cluster: the run's section.
        connect_seconds: for ssh to connect; None: ``cluster.node_timeout``.

    Raises:
        InputError: this machine has no ssh.
    """
    if not cluster.reaches_nodes:
        return None
    if cluster.launcher == "slurm":
        return on_allocated_node
    if shutil.which("ssh") is None:
        raise InputError(
            f"cluster.launcher is {cluster.launcher}, and this machine has no ssh: install the OpenSSH client"
        )
    given = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")) if cluster.launcher == "pdsh" else []
    seconds = max(1, int(cluster.node_timeout if connect_seconds is None else connect_seconds))
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}", *ssh_options(cluster), *given]
    return lambda node, command: [*ssh, node, "exec " + shlex.join(command)]
