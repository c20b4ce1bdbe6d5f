"""Which command starts the worker on every rank?"""

import os
import re
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from os import devnull
from pathlib import Path

from launcher.starting.cluster_config import ClusterConfig
from sparse_zero.errors import InputError

# DeepSpeed's backends put the current folder, the interpreter and PYTHONPATH into a remote command line as they are, or
# in double quotes, and pdsh replaces %h, %n and the like.
_SAFE_IN_SHELL = re.compile(r"[\w@+=:./-]*")


def script_file(module: str) -> str:
    """The path of an installed module of this package, found without importing it.

    Raises:
        InputError: it is not installed as a file.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"{module.replace('.', '/')}.py is not installed as a file: install the package with pip")
    return spec.origin


def worker_by_hand(config_path: str | Path, overrides: Sequence[str], *, python: str) -> list[str]:
    """What every rank runs where a launcher is started by hand."""
    return [python, script_file("launcher.train"), "--config", str(Path(config_path).absolute()), *overrides]


def worker_command(
    cluster: ClusterConfig,
    record: str,
    overrides: Sequence[str],
    *,
    python: str,
    num_gpus: int | None,
    master_port: int,
    hostfile: str | None = None,
    nodes: Sequence[str] = (),
    devices: Sequence[str] | None = None,
    script: str | None = None,
) -> list[str]:
    """The command that starts ``launcher/starting/start_rank.py`` on every rank of ``cluster``, as an argument list.

    Args:
        cluster: the run's section.
        record: folder on every node from which the worker reads its config and environment.
        overrides: ``--section.key=value`` of this start; none holds text of a user's.
        python: the interpreter; on several nodes it has the same path on each.
        num_gpus: ranks on each node; None leaves them to the launcher (every GPU, or the hostfile's slots).
        master_port: port of the ranks' rendezvous, in place of ``cluster.master_port``, which may leave it open.
        hostfile: the nodes and slots of this start, no more and no fewer; of launchers that reach nodes.
        nodes: their names.
        devices: ids of the GPUs that local ranks may use; the first ``num_gpus`` are taken. None: all.
        script: the worker; None is the installed one.
    """
    worker = [script or script_file("launcher.starting.start_rank"), record, *overrides]
    # The launchers say the local rank in the environment; the worker needs no argument for it.
    deepspeed = [python, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    port = ["--master_port", str(master_port)]
    if cluster.launcher == "local":
        # Without a hostfile named, DeepSpeed would follow /job/hostfile where there is one.
        command = [*deepspeed, "--hostfile", devnull, *port]
        if cluster.bind_to_core:
            command.append("--bind_cores_to_rank")
        if devices is not None and num_gpus is not None:
            return [*command, "--include", f"localhost:{','.join(devices[:num_gpus])}", *worker]
        return [*command, *_count("--num_gpus", num_gpus), *worker]
    if cluster.reaches_nodes:
        assert hostfile is not None
        # --force_multi: a hostfile of one node would otherwise start here, whatever node it names.
        command = [*deepspeed, "--launcher", cluster.launcher, "--force_multi", "--hostfile", hostfile, *port]
        command.append("--no_ssh_check")  # Every node has answered already.
        if cluster.master_address is not None:
            command += ["--master_addr", cluster.master_address]
        if cluster.ssh_port is not None:
            command += ["--ssh_port", str(cluster.ssh_port)]
        # DeepSpeed takes them apart again.
        arguments = shlex.join([*_of_launcher(cluster, nodes), *cluster.launcher_arguments])
        command += [f"--launcher_args={arguments}"] if arguments else []
        if cluster.launcher != "pdsh":  # DeepSpeed's own worker tells it the ranks; mpirun and srun do not.
            worker.insert(2, f"--meet={cluster.master_address}:{master_port}")
        return [*command, *worker]
    command = [python, "-m", "torch.distributed.run", "--nnodes", str(cluster.num_nodes)]
    command += ["--nproc_per_node", "gpu" if num_gpus is None else str(num_gpus)]
    if cluster.num_nodes == 1:
        return [*command, "--master_addr", "127.0.0.1", *port, *worker]
    # Every node runs this same command; the rendezvous tells them apart.
    endpoint = f"{cluster.master_address}:{master_port}"
    return [
        *command,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        endpoint,
        "--rdzv_id",
        "sparse-zero",
        *worker,
    ]


def _of_launcher(cluster: ClusterConfig, nodes: Sequence[str]) -> list[str]:
    """Arguments that pdsh, mpirun or srun needs to do what the section says."""
    if cluster.launcher == "openmpi":
        # Else DeepSpeed names eth0, which not every node has.
        interface = cluster.network_interface or "0.0.0.0/0"
        found = ["--mca", "btl_tcp_if_include", interface, "--mca", "oob_tcp_if_include", interface]
        found += ["--map-by", "slot", "--bind-to", "core" if cluster.bind_to_core else "none"]
        ssh = ssh_options(cluster)
        if ssh:
            found += ["--mca", "plm_rsh_args", " ".join(ssh)]
        if os.geteuid() == 0:  # mpirun refuses the superuser otherwise, also in a container.
            found.append("--allow-run-as-root")
        return found
    if cluster.launcher == "mpich":
        found = ["-launcher", "ssh", "-bind-to", "core" if cluster.bind_to_core else "none"]
        return [*found, *(["-iface", cluster.network_interface] if cluster.network_interface else [])]
    if cluster.launcher == "slurm":
        assert cluster.ranks_per_node is not None
        # The guards are steps of the same job.
        found = ["--overlap", f"--nodes={cluster.num_nodes}", f"--ntasks-per-node={cluster.ranks_per_node}"]
        found.append(f"--cpu-bind={'cores' if cluster.bind_to_core else 'none'}")
        return [*found, f"--nodelist={','.join(nodes)}"]
    return []


def ssh_options(cluster: ClusterConfig) -> list[str]:
    """What ssh is told besides its own configuration."""
    port = [] if cluster.ssh_port is None else ["-p", str(cluster.ssh_port)]
    return [*port, *([] if cluster.ssh_user is None else ["-l", cluster.ssh_user])]


def check_remote_shell(*, python: str, folder: str, python_path: str, package: str) -> None:
    """Refuse paths that DeepSpeed's launcher would let a remote shell take apart or run.

    Raises:
        InputError: names what has to be moved.
    """
    for name, value in (
        ("the current folder", folder),
        ("the interpreter", python),
        ("PYTHONPATH", python_path),
        ("the package's folder", package),
    ):
        if not _SAFE_IN_SHELL.fullmatch(value):
            raise InputError(
                f"{name} is {value!r}, which DeepSpeed's launcher cannot pass to other nodes as it is: use a path of "
                "letters, digits and -_./ without spaces"
            )


def _count(flag: str, number: int | None) -> list[str]:
    return [] if number is None else [flag, str(number)]
