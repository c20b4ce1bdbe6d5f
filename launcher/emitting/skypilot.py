"""Which task runs a config on machines that SkyPilot finds?"""

import dataclasses
from typing import Any

from launcher.config import RunConfig, resolved_yaml
from launcher.emitting.job import TOLD_AT_THE_START, check_exported, host_name, is_below, ranks_per_node
from launcher.yaml_files import dump_yaml
from sparse_zero.errors import InputError

# What SkyPilot leaves free on its machines.
_PORT = 29500


def skypilot_task(config: RunConfig) -> str:
    """The text of a task for ``sky launch`` or ``sky jobs launch``; the config is in it.

    Raises:
        InputError: the config is for another launcher, says too little, or writes what a spot machine takes with it.
    """
    cluster, batch, skypilot = config.cluster, config.batch, config.batch.skypilot
    if cluster.launcher not in ("local", "torchrun"):
        raise InputError(
            f"cluster.launcher is {cluster.launcher}, and SkyPilot runs one command on every machine: use torchrun"
        )
    _check_starts(config)
    if batch.gpus_per_rank and batch.gpu_type is None:
        raise InputError(
            "batch.gpu_type is missing: SkyPilot looks for a kind of GPU: write A100-80GB, or set gpus_per_rank to 0"
        )
    check_exported(config, skypilot.secrets, "batch.skypilot.secrets", [mount.path for mount in skypilot.file_mounts])
    kept = [mount.path for mount in skypilot.file_mounts if mount.mode == "mount"]
    if skypilot.spot and not is_below(config.output.folder, kept):
        raise InputError(
            f"output.folder is {config.output.folder} and batch.skypilot.spot is true: a machine that is taken away "
            "takes the checkpoints with it; name a folder below a bucket of batch.skypilot.file_mounts with mode: mount"
        )
    mounts = {
        mount.path: mount.source if mount.mode == "copy" else {"source": mount.source, "mode": "MOUNT"}
        for mount in skypilot.file_mounts
    }
    task: dict[str, Any] = {
        "name": host_name(config),
        "num_nodes": cluster.num_nodes,
        "resources": _resources(config),
        "workdir": skypilot.workdir,
        "file_mounts": mounts,
        # Null: the value comes with `sky launch --secret NAME`.
        "secrets": dict.fromkeys(skypilot.secrets),
        "setup": "".join(f"{line}\n" for line in skypilot.install),
        "run": _run(config),
    }
    notes = ["Written by `sparse-zero launch --emit skypilot`; start it with sky launch, or sky jobs launch."]
    if batch.time_limit_minutes is not None:
        notes.append("Not said here: batch.time_limit_minutes; SkyPilot knows no limit of a run.")
    filled = {key: value for key, value in task.items() if value not in (None, "", {})}
    return "".join(f"# {note}\n" for note in notes) + dump_yaml(filled, blocks=True)


def _check_starts(config: RunConfig) -> None:
    """Refuse what the start on the machines would: its launcher is torchrun, whichever the config has."""
    try:
        dataclasses.replace(
            config.cluster,
            launcher="torchrun",
            ranks_per_node=ranks_per_node(config),
            master_address=TOLD_AT_THE_START,
            master_port=config.cluster.master_port or _PORT,
        )
    except InputError as error:
        raise InputError(f"SkyPilot's machines are started with cluster.launcher torchrun: {error}") from error


def _resources(config: RunConfig) -> dict[str, Any]:
    ranks, batch = ranks_per_node(config), config.batch
    found = {
        "infra": batch.skypilot.infra,
        "accelerators": f"{batch.gpu_type}:{ranks}" if batch.gpus_per_rank else None,
        "cpus": None if batch.cpus_per_rank is None else f"{batch.cpus_per_rank * ranks}+",
        "memory": None if batch.memory_gib is None else f"{batch.memory_gib}+",
        "image_id": None if batch.image is None else f"docker:{batch.image}",
        "use_spot": batch.skypilot.spot or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _run(config: RunConfig) -> str:
    """What runs on every machine: the config, as it stands, goes into a file; then the launcher starts."""
    lines = resolved_yaml(config).removesuffix("\n").split("\n")
    # No line of the config can end it early, or seem to.
    end = "END_OF_CONFIG"
    while end in map(str.strip, lines):
        end += "_"
    overrides = [
        "--cluster.launcher=torchrun",
        '--cluster.num_nodes="$SKYPILOT_NUM_NODES"',
        f"--cluster.ranks_per_node={ranks_per_node(config)}",
        '--cluster.master_address="$(head -n 1 <<<"$SKYPILOT_NODE_IPS")"',
        f"--cluster.master_port={config.cluster.master_port or _PORT}",
    ]
    return "\n".join(
        [
            *config.batch.setup,
            "# Read through a descriptor: no file is left, however the run ends.",
            "config=$(mktemp) || exit 1",
            f"cat >\"$config\" <<'{end}'",
            *lines,
            end,
            'exec 9<"$config" || exit 1',
            'rm -- "$config"',
            "exec sparse-zero launch --config /dev/fd/9 \\",
            *(f"    {override} \\" for override in overrides[:-1]),
            f"    {overrides[-1]}",
            "",
        ]
    )
