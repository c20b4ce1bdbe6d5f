"""What does a run need of its nodes, and what are they asked for it?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.preflight import node_probe
from launcher.run_folder import kept_folder
from launcher.starting.nodes import Node
from sparse_zero.zero.unsupported import offload_device

# Of DeepSpeed's operators: name of the compiled file, and of the class in deepspeed.ops.op_builder that builds it.
OPERATORS = {
    "deepspeed_shm_comm": "ShareMemCommBuilder",
    "cpu_adam": "CPUAdamBuilder",
    "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder",
    "fused_lion": "FusedLionBuilder",
    "async_io": "AsyncIOBuilder",
}


# What the only node is called, as in `sparse-zero launch`.
THIS_MACHINE = "this machine"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the facts of the nodes are held against."""

    config: RunConfig
    # All that may take part, the first one's first; rank 0 is on it.
    nodes: tuple[Node, ...]
    # Ranks of the first start.
    world_size: int
    # Where ranks meet: a name or an address that the config gives, and the port; None where nobody else needs them.
    master_address: str | None
    master_port: int | None
    # Variables that every rank gets.
    environment: Mapping[str, str] = field(default_factory=dict)
    # Ids of the GPUs that local ranks may use; None: all; none where ranks compute on the CPU, whatever is there.
    devices: Sequence[str] | None = None
    # Whether all nodes are asked, from here; False: only this one of several is.
    is_whole: bool = True
    # DeepSpeed's operators that ranks on CPUs and on GPUs compile when they first use them.
    cpu_operators: tuple[str, ...] = ()
    gpu_operators: tuple[str, ...] = ()
    # Hash of this package's modules here, where the config is read; None: not asked.
    code_digest: str | None = None
    # What the run will write in all, by a forecast; None: unknown.
    output_bytes: int | None = None

    @property
    def several(self) -> bool:
        """Whether ranks of several machines meet."""
        return len(self.nodes) > 1 or not self.is_whole

    @property
    def folders(self) -> dict[str, str]:
        """Of every setting that names a folder of each node, which must be there: the folder."""
        named = {
            "zero.nvme_path": self.config.zero.nvme_path,
            "selection.accumulator_folder": self.config.selection.accumulator_folder,
        }
        return {field: folder for field, folder in named.items() if folder is not None}

    @property
    def master(self) -> str | None:
        """The node on which rank 0 starts; None where it is none of those that are asked, as far as is known."""
        return self.nodes[0].name if self.is_whole else None


def host_of(node: str) -> str:
    """The name of a machine, without the user that ssh is told."""
    return node.rpartition("@")[2]


def operators_of(config: RunConfig, *, has_gpus: bool) -> tuple[str, ...]:
    """Those of DeepSpeed's operators that the run compiles when it first uses them: keys of :data:`OPERATORS`."""
    settings = deepspeed_config(config, None)
    devices = {offload_device(settings, section) for section in ("offload_optimizer", "offload_param")}
    on_host = not has_gpus or offload_device(settings, "offload_optimizer") is not None
    found = [] if has_gpus else ["deepspeed_shm_comm"]
    kind = {"deepspeed_adamw": "adam", "lion": "lion"}.get(config.training.optimizer)
    found += [f"{'cpu' if on_host else 'fused'}_{kind}"] if kind else []
    return (*found, *(["async_io"] if "nvme" in devices else []))


def python_path(config: RunConfig) -> list[str]:
    """Where ranks look for modules before what is installed."""
    here = [str(Path.cwd())] if config.cluster.reaches_nodes else []  # DeepSpeed puts it first.
    return [*here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _files(config: RunConfig) -> dict[str, dict[str, str | None]]:
    """Of every setting that names data: where they are, and the split."""
    data = config.data
    found: dict[str, tuple[str | None, str | None]] = {
        "data.train": (data.train, data.train_split),
        "data.validation": (data.validation, data.validation_split),
        "data.test": (data.test if config.output.evaluate else None, data.test_split),
        "data.calibration": (data.calibration if config.calibrates else None, data.calibration_split),
        "data.forgetting": (data.forgetting, data.forgetting_split),
        "selection.file": (config.selection.file, None),
        "zero.config": (config.zero.config if isinstance(config.zero.config, str) else None, None),
    }
    return {name: {"path": absolute(path), "split": split} for name, (path, split) in found.items() if path is not None}


def absolute(path: str) -> str:
    """A path of a config as the ranks take it, which start in this folder."""
    return str(Path(path).expanduser().absolute())


def wanted_of(
    config: RunConfig,
    nodes: Sequence[Node],
    *,
    ranks_here: int | None,
    world_size: int,
    master_port: int,
    environment: Mapping[str, str],
    devices: Sequence[str] | None = None,
) -> Wanted:
    """What a run needs.

    Args:
        config: of the run.
        nodes: all that may take part; none where every node has a command of its own.
        ranks_here: ranks of this machine, where it is such a node; None: one.
        world_size: ranks of the first start.
        master_port: where they meet.
        environment: variables that every rank gets.
        devices: ids of the GPUs that local ranks may use; None: all.

    Raises:
        InputError: the user's DeepSpeed config does not hold.
    """
    cluster = config.cluster
    address = cluster.master_address
    if address is None and cluster.launcher == "slurm" and cluster.network_interface is None:
        address = nodes[0].name
    is_alone = len(nodes) == 1
    return Wanted(
        config=config,
        nodes=tuple(nodes) or (Node(THIS_MACHINE, ranks_here or 1),),
        world_size=world_size,
        master_address=address,
        # On one machine a free one is found when ranks start.
        master_port=None if is_alone and cluster.master_port is None else master_port,
        environment=environment,
        devices=devices,
        is_whole=bool(nodes),
        cpu_operators=operators_of(config, has_gpus=False),
        gpu_operators=operators_of(config, has_gpus=True),
        code_digest=node_probe.code()["digest"] if cluster.reaches_nodes else None,
    )


def question_of(wanted: Wanted, node: Node, *, mark: str, seconds: float) -> dict[str, Any]:
    """What the probe on a node is asked.

    Args:
        wanted: of the run.
        node: the one that is asked.
        mark: name of the file that it makes where the run folder is or will be.
        seconds: that each of its answers may take.
    """
    config = wanted.config
    names = [host_of(each.name) for each in wanted.nodes] if len(wanted.nodes) > 1 else []
    if wanted.several and wanted.master_address is not None:
        names.append(wanted.master_address)
    return {
        "python_path": python_path(config),
        "environment": {
            name: value for name, value in wanted.environment.items() if name.startswith("TORCH_EXTENSIONS")
        },
        "names": list(dict.fromkeys(names)),
        "port": wanted.master_port if wanted.master in (None, node.name) else None,
        "model": {
            "name": absolute(config.model.name_or_path),
            "gguf_file": config.model.gguf_file,
            "tokenizer": config.model.tokenizer and absolute(config.model.tokenizer),
        },
        "files": _files(config),
        "folders": {field: absolute(folder) for field, folder in wanted.folders.items()},
        "output": absolute(config.output.folder),
        "mark": mark,
        "operators": sorted({*wanted.cpu_operators, *wanted.gpu_operators}),
        "seconds": seconds,
    }


def keeps_weights(config: RunConfig) -> bool:
    """Whether the calibration leaves weights, which only one node has where nodes share no folder."""
    return kept_folder(config) is not None
