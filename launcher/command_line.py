"""Which command starts the worker on every rank?"""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from os import devnull
from pathlib import Path

from launcher.config import RunConfig
from sparse_zero.errors import InputError

# DeepSpeed's pdsh backend puts arguments with spaces into double quotes, in which these still act, and pdsh
# itself replaces %h, %n and the like.
_UNSAFE_QUOTED = frozenset("$`\\%!")


def worker_script() -> str:
    """The path of the installed ``launcher/train.py``, found without importing it."""
    spec = find_spec("launcher.train")
    if spec is None or spec.origin is None:
        raise InputError("launcher/train.py is not installed as a file: install the package with pip")
    return spec.origin


def worker_command(
    config: RunConfig,
    config_path: str | Path,
    overrides: Sequence[str],
    *,
    python: str,
    num_gpus: int | None,
    master_port: int,
    devices: Sequence[str] | None = None,
    script: str | None = None,
) -> list[str]:
    """The command that starts ``launcher/train.py`` on every rank of ``config.cluster``, as an argument list.

    Args:
        config: the run.
        config_path: its YAML file, handed on to the worker as an absolute path.
        overrides: ``--section.key=value`` as given, handed on too.
        python: the interpreter; on several nodes it has the same path on each.
        num_gpus: ranks on each node; None leaves them to the launcher (every GPU, or the hostfile's slots).
        master_port: port of the ranks' rendezvous, in place of ``cluster.master_port``, which may leave it open.
        devices: ids of the GPUs that local ranks may use; the first ``num_gpus`` are taken. None: all.
        script: the worker; None is the installed one.

    Raises:
        InputError: for an argument that pdsh would not pass on as it is.
    """
    cluster = config.cluster
    worker = [script or worker_script(), "--config", str(Path(config_path).absolute()), *overrides]
    # The launchers say the local rank in the environment; the worker needs no argument for it.
    deepspeed = [python, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    port = ["--master_port", str(master_port)]
    if cluster.launcher == "local":
        # Without a hostfile named, DeepSpeed would follow /job/hostfile where there is one.
        command = [*deepspeed, "--hostfile", devnull, *port]
        if devices is not None and num_gpus is not None:
            return [*command, "--include", f"localhost:{','.join(devices[:num_gpus])}", *worker]
        return [*command, *_count("--num_gpus", num_gpus), *worker]
    if cluster.launcher == "pdsh":
        # --force_multi: a hostfile of one node would otherwise start here, whatever node it names.
        command = [*deepspeed, "--launcher", "pdsh", "--force_multi", "--hostfile", str(cluster.hostfile)]
        command += ["--num_nodes", str(cluster.num_nodes), *_count("--num_gpus", num_gpus), *port]
        if cluster.master_address is not None:
            command += ["--master_addr", cluster.master_address]
        return [*command, *(_for_remote_shell(argument) for argument in worker)]
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


def _count(flag: str, number: int | None) -> list[str]:
    return [] if number is None else [flag, str(number)]


def _for_remote_shell(argument: str) -> str:
    """What DeepSpeed's pdsh backend must be given for the remote worker to get ``argument``."""
    if " " not in argument and "%" not in argument:
        return shlex.quote(argument)
    if _UNSAFE_QUOTED & set(argument):
        raise InputError(
            f"{argument} cannot be passed on through pdsh (it has a space or % besides a special sign): "
            "put the setting into the config file"
        )
    return argument
