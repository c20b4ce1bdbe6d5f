"""Which texts are emitted for some runs? `python -m tests.launcher.emitted_examples` writes them anew.

What is compared with the files in ``golden`` leaves the resolved config out: it has every default of every section.
"""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launcher.config import RunConfig, parse_config
from launcher.emitting.kubernetes import kubernetes_manifest
from launcher.emitting.skypilot import skypilot_task
from launcher.emitting.slurm_script import slurm_script

GOLDEN = Path(__file__).parent / "golden"
# What a shell, a YAML reader or Kubernetes may not take for more than text; the last lines end a script's or a document.
HOSTILE = "a b'c\"d$(touch hacked)`touch hacked`;touch hacked %h #x \\ $(HOME) ${HOME}"
HOSTILE_LINES = f"{HOSTILE}\nEND_OF_CONFIG\n---\n#SBATCH --uid=0\ntouch hacked"


def example_run(**sections: Any) -> RunConfig:
    """A run on two nodes with 8 ranks each; sections replace those of it."""
    return parse_config(
        {
            "model": {"name_or_path": "/shared/models/llama"},
            "data": {"train": "/shared/data/train.json"},
            "selection": {
                "regions": [{"kind": "block", "modules": ["*.q_proj"], "block_size": 64}],
                "budget": {"fraction": 0.01},
            },
            "training": {"steps": 2000},
            "zero": {},
            "output": {"folder": "/shared/runs/Llama_SMT"},
            **sections,
        }
    )


def _slurm() -> RunConfig:
    batch = {
        "time_limit_minutes": 1440, "gpu_type": "a100", "cpus_per_rank": 12, "memory_gib": 900,
        "setup": ["module load cuda", ". .venv/bin/activate"],
        "slurm": {"partition": "gpu", "account": "team#1", "qos": "long", "constraint": "ib&[rack1|rack2]"},
    }  # fmt: skip
    return example_run(cluster={"launcher": "slurm", "num_nodes": 2, "ranks_per_node": 8}, batch=batch)


def _slurm_least() -> RunConfig:
    batch = {"gpus_per_rank": 0, "slurm": {"max_requeues": 0, "node_cache": False}}
    return example_run(cluster={"launcher": "slurm", "ranks_per_node": 2}, batch=batch)


KUBERNETES = {
    "image": "registry.example.com/sparse-zero:1",
    "gpu_type": "NVIDIA-A100-SXM4-80GB",
    "cpus_per_rank": 8,
    "memory_gib": 512,
    "time_limit_minutes": 600,
    "kubernetes": {
        "namespace": "team",
        "volumes": [{"claim": "shared", "path": "/shared"}],
        "secrets": [{"variable": "HF_TOKEN", "secret": "hub", "key": "token"}],
    },
}
EXPORT = ["HF_TOKEN", "NCCL_DEBUG=WARN", f"OWN={HOSTILE_LINES}"]


def _pytorch_job() -> RunConfig:
    cluster = {"launcher": "torchrun", "num_nodes": 2, "ranks_per_node": 8, "master_address": "x", "export": EXPORT}
    return example_run(cluster=cluster, batch=KUBERNETES)


def _mpi_job() -> RunConfig:
    cluster = {"launcher": "openmpi", "num_nodes": 2, "ranks_per_node": 8, "hostfile": "/etc/mpi/hostfile"}
    return example_run(cluster={**cluster, "export": EXPORT}, batch=KUBERNETES)


def _skypilot() -> RunConfig:
    batch = {
        "gpu_type": "A100-80GB", "cpus_per_rank": 8, "memory_gib": 512, "image": "registry.example.com/sparse-zero:1",
        "setup": [". ~/venv/bin/activate"],
        "skypilot": {
            "infra": "aws/us-east-1", "spot": True, "workdir": ".", "install": ["pip install ."], "secrets": ["HF_TOKEN"],
            "file_mounts": [
                {"source": "s3://runs", "path": "/shared", "mode": "mount"},
                {"source": "~/data", "path": "/data"},
            ],
        },
    }  # fmt: skip
    cluster = {"launcher": "torchrun", "num_nodes": 2, "ranks_per_node": 8, "master_address": "x", "export": EXPORT}
    return example_run(cluster=cluster, batch=batch)


def _as_script(config: RunConfig) -> str:
    config_path = Path("runs and tests") / f"{HOSTILE}.yaml"
    return slurm_script(
        config, config_path, ["--training.steps=3", f"--output.folder={HOSTILE}"], Path("/shared/project")
    )


EXAMPLES: dict[str, tuple[Callable[[], RunConfig], Callable[[RunConfig], str]]] = {
    "slurm.sh": (_slurm, _as_script),
    "slurm-least.sh": (_slurm_least, _as_script),
    "pytorch-job.yaml": (_pytorch_job, kubernetes_manifest),
    "mpi-job.yaml": (_mpi_job, kubernetes_manifest),
    "skypilot.yaml": (_skypilot, skypilot_task),
}


def example(name: str) -> str:
    """The text that is emitted."""
    config, emitted = EXAMPLES[name]
    return emitted(config())


def config_in(text: str) -> str:
    """The resolved config that stands in a manifest or a task."""
    first, *_ = yaml.safe_load_all(text)
    if "data" in first:
        return str(first["data"]["run.yaml"])
    found = re.search(r"<<'(\w+)'\n(.*\n)\1\nexec", first["run"], re.DOTALL)
    assert found is not None
    return found[2]


def without_config(text: str) -> str:
    """What is compared."""
    if not text.startswith("#!"):
        indent = " " * (4 if "kind: ConfigMap" in text else 2)
        block = textwrap.indent(config_in(text), indent)
        assert block in text
        text = text.replace(block, f"{indent}(the resolved config)\n")
    return text


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in EXAMPLES:
        (GOLDEN / each).write_text(without_config(example(each)), encoding="utf-8")
