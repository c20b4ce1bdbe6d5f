"""How do a run's config and environment reach the ranks of every node, whatever stands in them?

`sparse-zero launch` hands both to the guard of each node (:mod:`launcher.starting.node_guard`), in lines over ssh, and
the guard writes them into its record folder, for its user alone. So no text of a user's is ever part of a command line,
in which one of the shells between here and there might split or run it, and where every user of the node could read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from launcher.config import RunConfig, resolved_yaml
from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.exported import name_and_value
from launcher.yaml_files import read_text
from sparse_zero.errors import InputError

# In the record folder.
CONFIG_NAME, ENVIRONMENT_NAME = "config.yaml", "environment.json"
# Variables with these beginnings go to all nodes: libraries that the ranks use read them. DeepSpeed's launcher would
# forward those of NCCL, UCX and Python only.
_FORWARDED = re.compile(
    r"(?!CUDA_VISIBLE_DEVICES$)(NCCL|GLOO|UCX|TORCH|PYTORCH|CUDA|OMP|MKL|DS|DEEPSPEED|HF|TRANSFORMERS|TOKENIZERS|MLFLOW|WANDB)_.*"
)


def _entry(text: str, source: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """(name, value) of ``NAME`` or ``NAME=value``."""
    name, value = name_and_value(text, source)
    if value is None and name not in environ:
        raise InputError(f"{source} names {name}, which is not set here: set it, or write {name}=value")
    return name, environ[name] if value is None else value


def exported_variables(cluster: ClusterConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """What is set in the environment of every rank on every node.

    What libraries read (NCCL_*, GLOO_*, HF_*, OMP_*, ...) as it is here, then the lines of ``cluster.export_file``,
    then ``cluster.export``; the later one counts. ``cluster.network_interface`` names it to NCCL and gloo.

    Args:
        cluster: the run's section.
        environ: of this process.

    Raises:
        InputError: a name that is none, a variable that is not set, a file that cannot be read.
    """
    found = {}
    if cluster.reaches_nodes:  # Else the ranks have this environment anyway.
        found = {name: value for name, value in environ.items() if _FORWARDED.fullmatch(name)}
    if cluster.network_interface is not None:
        found["NCCL_SOCKET_IFNAME"] = found["GLOO_SOCKET_IFNAME"] = cluster.network_interface
    if cluster.export_file is not None:
        path = Path(cluster.export_file)
        for number, line in enumerate(read_text(path, "cluster.export_file").splitlines(), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                name, value = _entry(line.strip(), f"cluster.export_file {path}, line {number}", environ)
                found[name] = value
    for text in cluster.export:
        name, value = _entry(text, "cluster.export", environ)
        found[name] = value
    return found


def files_of_run(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Name and content of what the guards write into their record folders."""
    return {CONFIG_NAME: resolved_yaml(config), ENVIRONMENT_NAME: json.dumps(dict(environment))}
