"""Does every kind of wrong input end with one clear line, exit code 2, and nothing written?"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from launcher.__main__ import main
from launcher.yaml_files import dump_yaml
from models.loading import ModelConfig
from sparse_zero.checkpoint.folders import MANIFEST
from tests.models.tiny import tiny_tokenizer, write_tiny_llama
from tests.models.tiny_families import FAMILIES

ROOT = Path(__file__).parents[2]


def run_mapping() -> dict[str, Any]:
    """A run whose config holds; its model folder does not exist, so that nothing can get far."""
    return {
        "model": {"name_or_path": "model-folder"},
        "data": {"train": "train.json"},
        "selection": {
            "regions": [{"kind": "block", "modules": ["*.q_proj"], "block_size": 64}],
            "budget": {"fraction": 0.01},
        },
        "training": {"steps": 2},
        "zero": {},
        "output": {"folder": "out"},
    }


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything under ``folder``: names, modification times and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of wrong input: what is typed, what lies in the folder, and what must be said."""

    name: str
    # What the one line must contain: the field and the value, and the remedy where it is not plain.
    says: Sequence[str]
    # Overrides and options after --config run.yaml; arguments replaces the whole command line.
    overrides: Sequence[str] = ()
    arguments: Sequence[str] | None = None
    command: str = "train"
    # Removed from the run's mapping before it is written.
    remove: Sequence[str] = ()
    # Further files of the folder, or another run.yaml.
    files: dict[str, str | bytes] = field(default_factory=dict)
    # Set in the environment, as a launcher would.
    environment: dict[str, str] = field(default_factory=dict)


def sweep_file(**section: Any) -> dict[str, str | bytes]:
    """A run.yaml with a section ``sweep`` that holds, but for what is given here."""
    return {
        "run.yaml": dump_yaml(
            {**run_mapping(), "sweep": {"folder": "sweeps", "grid": {"training.seed": [0, 1]}, **section}}
        )
    }


# A selection file with one number in it and no header beyond its format.
NO_HEADER = save({"a/rows": torch.zeros(1, dtype=torch.int32)}, {"format": "sparse_zero.selection"})

# What makes a run one of a classifier.
CLASSIFIES = [
    "--model.task=sequence_classification",
    "--model.num_labels=2",
    "--data.fields={text: sentence, label: label}",
]
CLASSES = [*CLASSIFIES, "--data.train=classes.tsv"]

# A batch script, for which no rank starts.
EMITS = ["--emit", "slurm", "--cluster.ranks_per_node=2"]

CONFIG_CASES = [
    # the command line
    Case(name="no command", arguments=[], says=["COMMAND", "required", "sparse-zero --help"]),
    Case(name="unknown command", arguments=["trian"], says=["invalid choice: 'trian'", "train"]),
    Case(name="no config", arguments=["train"], says=["--config", "sparse-zero train --help"]),
    Case(name="unknown option", overrides=["--fast"], says=["unknown argument --fast"]),
    Case(name="stray argument", overrides=["now"], says=["unknown argument now"]),
    Case(name="override without section", overrides=["--steps=3"], says=["unknown argument --steps=3"]),
    Case(name="override without value", overrides=["--training.steps"], says=["--training.steps has no value", "--training.steps=VALUE"]),
    Case(name="abbreviated option", arguments=["train", "--conf", "run.yaml"], says=["--config"]),
    Case(name="override where none is taken", arguments=["report", "out", "--training.steps=3"], says=["unknown argument --training.steps=3"]),
    # the file
    Case(name="missing file", arguments=["train", "--config", "gone.yaml"], says=["gone.yaml does not exist"]),
    Case(name="folder for a file", arguments=["train", "--config", "."], says=["is a folder"]),
    Case(name="empty file", files={"run.yaml": ""}, says=["run.yaml is empty"]),
    Case(name="no mapping", files={"run.yaml": "- model\n- data\n"}, says=["run.yaml holds a list at its top level"]),
    Case(name="syntax error", files={"run.yaml": "model:\n  a: [1\ndata: 2\n"}, says=["run.yaml, line 3"]),
    Case(name="tab", files={"run.yaml": "model:\n\tname_or_path: m\n"}, says=["run.yaml, line 2", "\\t"]),
    Case(name="binary file", files={"run.yaml": b"\xff\xfe\x00"}, says=["run.yaml is not a text file in UTF-8"]),
    Case(name="control character", files={"run.yaml": "model: \x01\n"}, says=["run.yaml is not YAML"]),
    Case(name="key twice", files={"run.yaml": "model: {}\ndata: {}\nmodel: {}\n"}, says=["'model' stands twice, in lines 1 and 3"]),
    Case(name="tagged object", files={"run.yaml": "model: !!python/object:os.system {}\n"}, says=["run.yaml, line 1", "python/object"]),
    Case(name="number as key", files={"run.yaml": "1: {}\n"}, says=["the key 1", "put it in quotes"]),
    Case(name="circle of extends", files={"run.yaml": "extends: a.yaml\n", "a.yaml": "extends: run.yaml\n"}, says=["goes in a circle", "a.yaml"]),
    Case(name="extends a missing file", files={"run.yaml": "extends: [parts/gone.yaml]\n"}, says=["gone.yaml does not exist"]),
    Case(name="flash attention in fp32", overrides=["--model.attention=flash_attention_2"], says=["model.attention is 'flash_attention_2'", "model.dtype float32", "set model.dtype to bfloat16"]),
    # keys
    Case(name="missing section", remove=["training"], says=["training is missing in run.yaml"]),
    Case(name="missing key", remove=["model.name_or_path"], says=["model.name_or_path is missing in run.yaml"]),
    Case(name="empty section", overrides=["--checkpoint.every=1"], files={"run.yaml": dump_yaml({**run_mapping(), "training": None})}, says=["training is None: expected a mapping"]),
    Case(name="unknown section", overrides=["--trainig.steps=3"], says=["unknown key trainig", "did you mean training?"]),
    Case(name="unknown key", overrides=["--training.learning_rat=3"], says=["unknown key training.learning_rat", "did you mean training.learning_rate?"]),
    Case(name="key in the wrong section", overrides=["--model.micro_batch_size=3"], says=["unknown key model.micro_batch_size", "did you mean training.micro_batch_size?"]),
    Case(name="unknown key in a list", overrides=["--selection.regions.0.sise=3"], says=["unknown key selection.regions.0.sise"]),
    Case(name="index out of range", overrides=["--selection.regions.4.block_size=3"], says=["selection.regions has 1 entries", "'4'"]),
    # types
    Case(name="word for an integer", overrides=["--training.steps=many"], says=["training.steps is 'many': expected an integer"]),
    Case(name="word for a truth value", overrides=["--output.merged=yes"], says=["output.merged is 'yes': expected true or false"]),
    Case(name="number for a text", overrides=["--model.revision=7"], says=["model.revision is 7: expected a text"]),
    Case(name="text for a list", overrides=["--selection.regions.0.modules=q"], says=["selection.regions.0.modules is 'q': expected a list"]),
    Case(name="list for a section", overrides=["--zero.options=[1]"], says=["zero.options is [1]: expected a mapping"]),
    Case(name="not one of the choices", overrides=["--training.precision=bf61"], says=["training.precision is 'bf61'", "did you mean bf16?"]),
    # values
    Case(name="world size 0", command="launch", overrides=["--cluster.ranks_per_node=0"], says=["cluster.ranks_per_node is 0", "at least one rank"]),
    Case(name="no nodes", overrides=["--cluster.num_nodes=0"], says=["cluster.num_nodes is 0"]),
    Case(name="restarts below none", overrides=["--cluster.max_restarts=-1"], says=["cluster.max_restarts is -1"]),
    Case(name="fewest ranks above the most", overrides=["--cluster.min_world_size=4", "--cluster.max_world_size=2"], says=["cluster.min_world_size is 4", "max_world_size 2"]),
    Case(name="no time for a node", overrides=["--cluster.node_timeout=0"], says=["cluster.node_timeout is 0"]),
    Case(name="no time to hang", overrides=["--cluster.hang_timeout=0"], says=["cluster.hang_timeout is 0", "null waits forever"]),
    Case(name="a simulation of nothing", overrides=["--memory.measure=false", "--memory.simulate=true"], says=["memory.simulate is true and memory.measure is false"]),
    Case(name="ranks outside of the limits", command="launch", overrides=["--cluster.ranks_per_node=2", "--cluster.min_world_size=3", "--cluster.max_world_size=3"], says=["this machine: 2 ranks", "cluster.min_world_size"]),
    Case(name="fewer nodes than asked for", command="launch", files={"hosts": "a slots=2\n"}, overrides=["--cluster.launcher=pdsh", "--cluster.hostfile=hosts", "--cluster.num_nodes=2"], says=["cluster.num_nodes is 2", "hosts has 1 nodes"]),
    Case(name="doctor outside of a job", command="doctor", overrides=["--cluster.launcher=slurm"], says=["cluster.launcher is slurm", "no Slurm job", "salloc"]),
    Case(name="doctor without its hostfile", command="doctor", overrides=["--cluster.launcher=pdsh", "--cluster.hostfile=hosts"], says=["cluster.hostfile is hosts", "no file"]),
    Case(name="preflight in words", command="launch", overrides=["--cluster.preflight=quick"], says=["cluster.preflight is 'quick'", "true or false"]),
    Case(name="hostfile in another form", command="launch", files={"hosts": "a:2\n"}, overrides=["--cluster.launcher=pdsh", "--cluster.hostfile=hosts"], says=["hosts, line 1 is 'a:2'", "name slots=8"]),
    Case(name="neither shared nor not", overrides=["--output.shared=maybe"], says=["output.shared is 'maybe'", "auto, True, False"]),
    Case(name="steps and epochs", overrides=["--training.epochs=1"], says=["epochs=1", "steps=2", "exactly one"]),
    Case(name="negative learning rate", overrides=["--training.learning_rate=-1e-3"], says=["training.learning_rate is -0.001", "positive"]),
    Case(name="learning rate not a number", overrides=["--training.learning_rate=.nan"], says=["training.learning_rate is nan"]),
    Case(name="chunk of no positions", overrides=["--training.loss_chunk=0"], says=["training.loss_chunk is 0", "at least 1"]),
    Case(name="kernels for GPUs", overrides=["--training.kernels=liger"], says=["training.kernels is 'liger'", "GPU", "use torch"]),
    Case(name="Triton's kernels without a GPU", overrides=["--training.region_kernels=triton"], says=["training.region_kernels is 'triton'", "set it to plain"]),
    Case(name="region kernels that nobody knows", overrides=["--training.region_kernels=fast"], says=["training.region_kernels is 'fast'", "plain, auto, triton"]),
    Case(name="two ways to cut the loss", overrides=["--training.kernels=liger", "--training.loss_chunk=8"], says=["training.loss_chunk is 8", "liger", "leave loss_chunk out"]),
    Case(name="kernels that nobody knows", overrides=["--training.kernels=triton"], says=["training.kernels is 'triton'", "torch, liger"]),
    Case(name="micro batch above global batch", overrides=["--training.micro_batch_size=99"], says=["training.micro_batch_size is 99", "16"]),
    Case(name="unknown optimizer", overrides=["--training.optimizer=adamW"], says=["training.optimizer is 'adamW'", "did you mean adamw?"]),
    Case(name="settings of a kind that is not trained", overrides=["--training.per_kind.row.weight_decay=0.1"], says=["per_kind.row is set", "trains block only"]),
    Case(name="rate and factor of a kind", overrides=["--training.per_kind.block={learning_rate: 1.0, learning_rate_factor: 2.0}"], says=["learning_rate=1.0 and learning_rate_factor=2.0", "at most one"]),
    Case(name="modules with nothing of their own", overrides=["--training.per_module=[{modules: ['*.q_proj']}]"], says=["per_module of *.q_proj sets nothing", "learning_rate"]),
    Case(name="setting of modules that does not exist", overrides=["--training.per_module=[{modules: ['*.q_proj'], rate: 1.0}]"], says=["training.per_module.0.rate"]),
    Case(name="rounding of what is not rounded", overrides=["--zero.rounding=stochastic"], says=["zero.rounding is 'stochastic'", "zero.placement inplace", "fp32"]),
    Case(name="warm-up above one", overrides=["--training.warmup_fraction=3"], says=["training.warmup_fraction is 3", "[0, 1]"]),
    Case(name="budget of nothing", overrides=["--selection.budget.fraction=0"], says=["selection.budget.fraction is 0", "(0, 1]"]),
    Case(name="budget above everything", overrides=["--selection.budget.fraction=1.5"], says=["selection.budget.fraction is 1.5", "(0, 1]"]),
    Case(name="two budgets", overrides=["--selection.budget.parameters=10"], says=["fraction=0.01", "parameters=10", "exactly one"]),
    Case(name="no budget", remove=["selection.budget"], says=["selection.budget is missing"]),
    Case(name="block without size", remove=["selection.regions.0.block_size"], says=["selection.regions.block_size is None"]),
    Case(name="row with a size", overrides=["--selection.regions.0.kind=row"], says=["selection.regions.block_size is 64", "remove it"]),
    Case(name="part of a block", overrides=["--selection.regions.0.block_size=16.5"], says=["selection.regions.0.block_size is 16.5"]),
    Case(name="accumulate of another kind beside a file", overrides=["--selection.file=chosen.safetensors", "--selection.accumulate=steps"], remove=["selection.regions", "selection.budget"], says=["selection.accumulate is 'steps'", "per_step"]),
    Case(name="base kept of nothing trained", overrides=["--selection.full_calibration.keep_weights_in=new"], says=["keep_weights_in is new", "calibration_weights is 'frozen'"]),
    Case(name="re-selection that never comes", overrides=["--selection.reselect={every: 5, until: 4}"], says=["selection.reselect.until is 4", "every 5"]),
    Case(name="captured share of low scores", overrides=["--selection.regions.0.pick=min", "--selection.reselect={every: 1, captured_below: 0.5}"], says=["captured_below is 0.5", "pick is 'min'"]),
    Case(name="depth traded for low scores", overrides=["--selection.regions.0.pick=min", "--selection.depth_tradeoff=1"], says=["depth_tradeoff is 1.0", "pick is 'min'"]),
    Case(name="depth of all layers", overrides=["--selection.min_depth=1"], says=["selection.min_depth is 1.0", "[0, 1)"]),
    Case(name="depth of a file", overrides=["--selection.file=chosen.safetensors", "--selection.min_depth=0.5"], remove=["selection.regions", "selection.budget"], says=["selection.file is chosen.safetensors", "selection.min_depth is 0.5"]),
    Case(name="selection with a broken header", arguments=["inspect", "one.safetensors"], files={"one.safetensors": NO_HEADER}, says=["one.safetensors has a header that cannot be read", "select again"]),
    Case(name="unknown score", overrides=["--selection.score=abs_of_men"], says=["selection.score is 'abs_of_men'", "did you mean 'abs_of_mean'"]),
    Case(name="score that cannot be imported", overrides=["--selection.score=gone.module:rule"], says=["selection.score is 'gone.module:rule'", "PYTHONPATH"]),
    Case(name="classes without a number", overrides=["--model.task=sequence_classification"], says=["model.num_labels is None", "number of classes"]),
    Case(name="classes of a language model", overrides=["--model.num_labels=2"], says=["model.num_labels is 2 with model.task causal_lm"]),
    Case(name="task that nobody knows", overrides=["--model.task=classification"], says=["model.task is 'classification'", "sequence_classification"]),
    Case(name="classifier without labels", overrides=[*CLASSIFIES, "--data.fields={text: sentence}"], says=["data.fields.label is missing", "sequence_classification"]),
    Case(name="labels of a language model", overrides=["--data.fields={text: sentence, label: label}"], says=["data.fields.label is 'label' with model.task causal_lm"]),
    Case(name="label without a text", overrides=["--data.fields={label: label}"], says=["data.fields.label is 'label' without data.fields.text"]),
    Case(name="pair without a label", overrides=["--data.fields={text: a, second_text: b}"], says=["data.fields.second_text is 'b' without data.fields.label"]),
    Case(name="packed classes", overrides=[*CLASSIFIES, "--data.batching=pack"], says=["data.batching is 'pack' with model.task sequence_classification", "leave it out"]),
    Case(name="template of classes", overrides=[*CLASSIFIES, "--data.template=chat"], says=["data.template is 'chat' with model.task sequence_classification"]),
    Case(name="generated classes", overrides=[*CLASSIFIES, "--data.evaluation.kind=generate"], says=["data.evaluation.kind is 'generate' with model.task sequence_classification"]),
    Case(name="classes of a language model's answers", overrides=["--data.evaluation.kind=classify"], says=["data.evaluation.kind is 'classify' with model.task causal_lm"]),
    Case(name="chunks of classes", overrides=[*CLASSIFIES, "--training.loss_chunk=8"], says=["training.loss_chunk is 8 with model.task sequence_classification"]),
    Case(name="prefix cache of classes", overrides=[*CLASSIFIES, "--training.prefix_cache={}"], says=["training.prefix_cache is 'set' with model.task sequence_classification"]),
    Case(name="quantized classifier", overrides=[*CLASSIFIES, "--model.quantization=nf4", "--zero.placement=delta"], says=["model.quantization is 'nf4' with model.task sequence_classification"]),
    Case(name="words of another number", overrides=[*CLASSIFIES, "--data.labels=[a, b, c]"], says=["data.labels has 3 words and model.num_labels is 2"]),
    Case(name="words twice", overrides=[*CLASSIFIES, "--data.labels=[a, a]"], says=["data.labels is a, a: name every class once"]),
    Case(name="score of nothing", overrides=["--selection.regions.0.pick=min", "--selection.regions.0.kind=whole", "--selection.regions.0.block_size=null"], says=["selection.regions.pick is 'min' for kind 'whole'"]),
    Case(name="groups that do not add up", overrides=["--selection.budget.groups=[{modules: ['*.q_proj'], share: 0.5}]"], says=["selection.budget.groups", "add up to 0.5"]),
    Case(name="floor above the cap", overrides=["--selection.budget.min_share_per_layer=0.5", "--selection.budget.max_share_per_layer=0.2"], says=["min_share_per_layer is 0.5", "max_share_per_layer 0.2"]),
    Case(name="accumulate of another kind", overrides=["--selection.accumulate=steps"], says=["selection.accumulate is 'steps'", "per_step"]),
    Case(name="no regions", overrides=["--selection.regions=[]"], says=["selection.regions is empty"]),
    Case(name="base on a disk, inplace", overrides=["--zero.stage=3", "--zero.offload_base=nvme", "--zero.nvme_path=."], says=["(zero.offload_base) is 'nvme' with placement 'inplace'", "delta"]),
    Case(name="states on a disk, re-selected", overrides=["--zero.stage=3", "--zero.offload_optimizer=nvme", "--zero.nvme_path=.", "--selection.reselect={every: 2}"], says=["zero.offload_optimizer", "is 'nvme', where selection.reselect cannot reach the states"]),
    Case(name="values on a disk, merged", overrides=["--zero.stage=3", "--zero.placement=delta", "--zero.offload_base=nvme", "--zero.nvme_path=.", "--output.merged=true"], says=["zero.offload_base", "is 'nvme', where output.merged cannot reach the values", "set output.merged to false"]),
    Case(name="muon re-selected over kinds", overrides=["--training.optimizer=muon", "--selection.reselect={every: 2}", "--selection.regions=[{kind: block, modules: ['*.q_proj'], block_size: 8}, {kind: row, modules: ['*.k_proj'], per_matrix: 1}]", "--selection.budget.fraction=0.01"], says=["the optimizer muon keeps another state for blocks"]),
    Case(name="quantized base inplace", overrides=["--model.quantization=nf4"], says=["model.quantization is 'nf4'", "zero.placement 'inplace'", "delta"]),
    Case(name="quantized base trained whole", overrides=["--model.quantization=int8", "--zero.placement=delta", "--selection.calibration_weights=full"], says=["model.quantization is 'int8'", "selection.calibration_weights 'full'", "'frozen'"]),
    Case(name="constants of int8 quantized", overrides=["--model.quantization=int8", "--model.double_quantization=true"], says=["model.double_quantization is true", "use nf4"]),
    Case(name="quantized GGUF", overrides=["--model.quantization=nf4", "--model.gguf_file=a.gguf"], says=["model.quantization is 'nf4'", "model.gguf_file 'a.gguf'"]),
    Case(name="unknown quantization", overrides=["--model.quantization=nf3"], says=["model.quantization is 'nf3'", "did you mean nf4?"]),
    Case(name="stage 4", overrides=["--zero.stage=4"], says=["zero.stage is 4", "0, 1, 2, 3"]),
    Case(name="max_length of one", overrides=["--data.max_length=1"], says=["data.max_length is 1"]),
    Case(name="empty output folder", overrides=["--output.folder=''"], says=["output.folder is empty"]),
    Case(name="evaluation without data", overrides=["--output.evaluate=true"], says=["output.evaluate is true", "data.test is missing"]),
    Case(name="validation without data", overrides=["--training.validation_every=5"], says=["training.validation_every is 5", "data.validation is missing"]),
    Case(name="best without data", overrides=["--checkpoint.keep_best=validation_loss"], says=["checkpoint.keep_best is 'validation_loss'", "data.validation is missing"]),
    Case(name="prefix cache with re-selection", overrides=["--training.prefix_cache={}", "--selection.reselect={every: 2}"], says=["training.prefix_cache is set with selection.reselect", "leave one of them out"]),
    Case(name="prefix cache of nothing", overrides=["--training.prefix_cache={max_gib: 0}"], says=["training.prefix_cache.max_gib is 0", "positive"]),
    Case(name="prefix cache nowhere", overrides=["--training.prefix_cache={folder: ' '}"], says=["training.prefix_cache.folder is empty"]),
    Case(name="prefix cache in another dtype", overrides=["--training.prefix_cache={dtype: fp8}"], says=["training.prefix_cache.dtype is 'fp8'", "float8"]),
    Case(name="pdsh without hostfile", overrides=["--cluster.launcher=pdsh"], says=["cluster.hostfile is missing"]),
    Case(name="missing hostfile", command="launch", overrides=["--cluster.launcher=pdsh", "--cluster.hostfile=hosts"], says=["cluster.hostfile is hosts", "no file"]),
    Case(name="several nodes locally", overrides=["--cluster.num_nodes=2"], says=["cluster.num_nodes is 2", "use pdsh, openmpi, mpich, slurm or torchrun"]),
    # batch systems
    Case(name="emitted for nobody", command="launch", overrides=["--emit", "pbs"], says=["--emit", "'pbs'", "slurm"]),
    Case(name="out without emit", command="launch", overrides=["--out", "job.sh"], says=["--out is job.sh", "add --emit"]),
    Case(name="emitted over a file", command="launch", files={"job.sh": "mine"}, overrides=["--emit", "slurm", "--out", "job.sh"], says=["--out is job.sh", "there already"]),
    Case(name="emitted into a file's place", command="launch", files={"a": ""}, overrides=["--emit", "slurm", "--out", "a/job.sh"], says=["--out is a/job.sh", "a is a file"]),
    Case(name="ranks of other machines", command="launch", overrides=["--emit", "slurm", "--cluster.launcher=slurm"], says=["cluster.ranks_per_node is missing"]),
    Case(name="slurm job through pdsh", command="launch", overrides=["--emit", "slurm", "--cluster.ranks_per_node=2"], says=["cluster.launcher is local", "set it to slurm"]),
    Case(name="job name of two lines", command="launch", overrides=["--emit", "slurm", "--cluster.launcher=slurm", "--cluster.ranks_per_node=2", '--batch.name="a\\nb"'], says=["batch.name is 'a\\nb'", "line of a batch script"]),
    Case(name="constraint of two lines", command="launch", overrides=["--emit", "slurm", "--cluster.launcher=slurm", "--cluster.ranks_per_node=2", '--batch.slurm.constraint="a\\nb"'], says=["batch.slurm.constraint is 'a\\nb'"]),
    Case(name="signal at the start", command="launch", overrides=["--emit", "slurm", "--cluster.launcher=slurm", "--cluster.ranks_per_node=2", "--batch.time_limit_minutes=5"], says=["batch.slurm.signal_seconds is 300", "batch.time_limit_minutes is 5"]),
    Case(name="kubernetes through pdsh", command="launch", overrides=["--emit", "kubernetes", "--cluster.ranks_per_node=2"], says=["cluster.launcher is local", "torchrun (PyTorchJob)"]),
    Case(name="pods without an image", command="launch", overrides=["--emit", "kubernetes", "--cluster.ranks_per_node=2", "--cluster.launcher=torchrun"], says=["batch.image is missing"]),
    Case(name="run folder in a pod", command="launch", overrides=["--emit", "kubernetes", "--cluster.ranks_per_node=2", "--cluster.launcher=torchrun", "--batch.image=a", "--batch.kubernetes.volumes=[{claim: a, path: /data}]", "--output.folder=/data/../out"], says=["output.folder is /data/../out", "lost with the pods"]),
    Case(name="hostfile of an MPIJob", command="launch", overrides=["--emit", "kubernetes", "--cluster.ranks_per_node=2", "--cluster.launcher=openmpi", "--cluster.hostfile=hosts", "--batch.image=a", "--batch.kubernetes.volumes=[{claim: a, path: /data}]", "--output.folder=/data/out"], says=["cluster.hostfile is hosts", "/etc/mpi/hostfile"]),
    Case(name="variable of this machine", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--batch.gpu_type=A100", "--cluster.export=[HOME]"], says=["cluster.export names HOME", "batch.skypilot.secrets"]),
    Case(name="variables' file of this machine", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--batch.gpu_type=A100", "--cluster.export_file=variables"], says=["cluster.export_file is variables"]),
    Case(name="secret in what is emitted", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--batch.gpu_type=A100", "--cluster.export=[HF_TOKEN=abc]"], says=["cluster.export has HF_TOKEN with its value", "write HF_TOKEN alone"]),
    Case(name="secret of a launch", command="launch", overrides=["--cluster.export=[API_TOKEN=abc]"], says=["cluster.export has API_TOKEN with its value", "write API_TOKEN alone", "cluster.export_file"]),
    Case(name="exported name of two words", overrides=["--cluster.export=['A B=c']"], says=["cluster.export has 'A B' with a value", "write NAME, or NAME=value"]),
    Case(name="exported rank", command="launch", overrides=["--emit", "slurm", "--cluster.ranks_per_node=2", "--cluster.export=[RANK=3]"], says=["cluster.export has RANK", "take it out"]),
    Case(name="exported and not set", command="sweep", files=sweep_file(), overrides=["--cluster.export=[NOT_SET_HERE]"], says=["cluster.export names NOT_SET_HERE, which is not set here"]),
    Case(name="empty partition", command="launch", overrides=[*EMITS, "--batch.slurm.partition=''"], says=["batch.slurm.partition is ''", "leave it out"]),
    Case(name="blank constraint", overrides=["--batch.slurm.constraint=' '"], says=["batch.slurm.constraint is ' '", "leave it out"]),
    Case(name="task that its own start refuses", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--batch.gpu_type=A100", "--cluster.bind_to_core=true"], says=["started with cluster.launcher torchrun", "cluster.bind_to_core is true"]),
    # seeds and numbers that do not fit
    Case(name="negative seed of the selection", overrides=["--selection.seed=-1"], says=["selection.seed is -1", "0 to 2^63 - 1"]),
    Case(name="negative seed of training", overrides=["--training.seed=-1"], says=["training.seed is -1", "0 to 2^63 - 1"]),
    Case(name="seed of 77 bits", overrides=["--training.seed=99999999999999999999999"], says=["training.seed is 99999999999999999999999", "63 bits"]),
    Case(name="seed of 64 bits", overrides=["--selection.seed=9223372036854775808"], says=["selection.seed is 9223372036854775808", "63 bits"]),
    Case(name="number of 64 bits in the file", files={"run.yaml": dump_yaml({**run_mapping(), "training": {"steps": 2**63}})}, says=["training.steps is 9223372036854775808", "63 bits"]),
    # what is read is never written over, by whatever name
    Case(name="selection over its scores", command="select", files={"a.scores": "x"}, overrides=["--from-scores", "a.scores", "--out", "./a.scores"], says=["--out is a.scores", "--from-scores names", "name another file"]),
    Case(name="selection over the config", command="select", overrides=["--out", "run.yaml"], says=["--out is run.yaml", "--config names"]),
    Case(name="scores over the data", command="select", files={"train.json": "[]"}, overrides=["--out", "a.safetensors", "--scores", "train.json"], says=["--scores is train.json", "data.train names"]),
    Case(name="plan over the config", command="plan", overrides=["--ranks", "1", "--json", "run.yaml"], says=["--json is run.yaml", "--config names"]),
    Case(name="answers over the problems", command="evaluate", files={"test.json": "[]"}, overrides=["--data.test=test.json", "--out", "test.json"], says=["--out is test.json", "data.test names"]),
    Case(name="page over the selection", arguments=["inspect", "a.safetensors", "--html", "a.safetensors"], files={"a.safetensors": NO_HEADER}, says=["--html is a.safetensors", "PATH names"]),
    # what the ranks would find: said by commands that start none
    Case(name="emitted with another precision", command="launch", overrides=[*EMITS, "--training.precision=bf16"], says=["training.precision is bf16", "model.dtype is float32"]),
    Case(name="emitted with an unknown score", command="launch", overrides=[*EMITS, "--selection.score=foo"], says=["selection.score is 'foo'", "choose one of"]),
    Case(name="emitted with rounding of nothing", command="launch", overrides=[*EMITS, "--zero.rounding=stochastic"], says=["zero.rounding is 'stochastic'", "use zero.rounding nearest"]),
    Case(name="emitted with a quantized base inplace", command="launch", overrides=[*EMITS, "--model.quantization=nf4"], says=["model.quantization is 'nf4'", "set zero.placement to delta"]),
    Case(name="emitted with muon and no blocks", command="launch", overrides=[*EMITS, "--training.optimizer=muon", "--selection.regions=[{kind: row, modules: [q_proj], per_matrix: 1}]", "--selection.budget=null"], says=["the optimizer muon is for matrices", "select blocks"]),
    Case(name="doctor of another precision", command="doctor", overrides=["--training.precision=bf16"], says=["training.precision is bf16", "model.dtype is float32"]),
    Case(name="point of another precision", command="sweep", files=sweep_file(), overrides=["--training.precision=bf16", "--dry-run"], says=["the point seed=0 of the sweep: training.precision is bf16"]),
    Case(name="planned for a stage that offloads nothing", arguments=["plan", "--model", "llama-2-7b", "--zero.stage=0", "--zero.offload_optimizer=cpu"], says=["zero.offload_optimizer", "stage"]),
    Case(name="shared memory beyond memory", command="launch", overrides=["--emit", "kubernetes", "--cluster.ranks_per_node=2", "--cluster.launcher=torchrun", "--batch.image=a", "--batch.memory_gib=8", "--batch.kubernetes.volumes=[{claim: a, path: /data}]", "--output.folder=/data/out"], says=["batch.kubernetes.shared_memory_gib is 16", "batch.memory_gib is 8"]),
    Case(name="label that is none", command="launch", overrides=["--emit", "kubernetes", "--cluster.ranks_per_node=2", "--cluster.launcher=torchrun", "--batch.image=a", "--batch.gpu_type=a b", "--batch.kubernetes.volumes=[{claim: a, path: /data}]", "--output.folder=/data/out"], says=["batch.gpu_type is 'a b'", "nvidia.com/gpu.product"]),
    Case(name="host name that is none", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--batch.gpu_type=A100", "--batch.name=My_run"], says=["batch.name is 'My_run'", "lower case"]),
    Case(name="skypilot through pdsh", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--cluster.launcher=slurm"], says=["cluster.launcher is slurm", "use torchrun"]),
    Case(name="skypilot without a GPU's kind", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2"], says=["batch.gpu_type is missing"]),
    Case(name="spot machines without a bucket", command="launch", overrides=["--emit", "skypilot", "--cluster.ranks_per_node=2", "--batch.gpu_type=A100", "--batch.skypilot.spot=true"], says=["output.folder is out", "mode: mount"]),
    Case(name="no time", overrides=["--batch.time_limit_minutes=0"], says=["batch.time_limit_minutes is 0"]),
    Case(name="GPUs of a rank", overrides=["--batch.gpus_per_rank=2"], says=["batch.gpus_per_rank is 2"]),
    Case(name="empty job name", overrides=["--batch.name=''"], says=["batch.name is empty"]),
    Case(name="image with a space", overrides=["--batch.image=a b"], says=["batch.image is 'a b'"]),
    Case(name="late signal", overrides=["--batch.slurm.signal_seconds=70000"], says=["batch.slurm.signal_seconds is 70000", "65535"]),
    Case(name="negative requeues", overrides=["--batch.slurm.max_requeues=-1"], says=["batch.slurm.max_requeues is -1"]),
    Case(name="claim that is no name", overrides=["--batch.kubernetes.volumes=[{claim: 'a b', path: /a}]"], says=["batch.kubernetes.volumes.claim is 'a b'"]),
    Case(name="relative mount", overrides=["--batch.kubernetes.volumes=[{claim: a, path: data}]"], says=["batch.kubernetes.volumes.path is 'data'", "absolute"]),
    Case(name="two volumes in one place", overrides=["--batch.kubernetes.volumes=[{claim: a, path: /a}, {claim: b, path: /a}]"], says=["batch.kubernetes.volumes.path is '/a' twice"]),
    Case(name="value for a secret's name", overrides=["--batch.kubernetes.secrets=[{variable: A, secret: 'My Secret', key: a}]"], says=["batch.kubernetes.secrets.secret is 'My Secret'"]),
    Case(name="namespace in capitals", overrides=["--batch.kubernetes.namespace=Team"], says=["batch.kubernetes.namespace is 'Team'"]),
    Case(name="no shared memory", overrides=["--batch.kubernetes.shared_memory_gib=0"], says=["batch.kubernetes.shared_memory_gib is 0"]),
    Case(name="folder as a bucket", overrides=["--batch.skypilot.file_mounts=[{source: data, path: /a, mode: mount}]"], says=["batch.skypilot.file_mounts.source is 'data'", "s3://runs"]),
    Case(name="secret with its value", overrides=["--batch.skypilot.secrets=['A=b']"], says=["batch.skypilot.secrets", "no name of a variable"]),
    # an own DeepSpeed config
    Case(name="missing DeepSpeed config", overrides=["--zero.config=ds.json"], says=["zero.config ds.json does not exist"]),
    Case(name="DeepSpeed config not JSON", overrides=["--zero.config=ds.json"], files={"ds.json": "{,}"}, says=["zero.config ds.json is not valid JSON"]),
    Case(name="conflicting stage", overrides=["--zero.config=ds.json"], files={"ds.json": json.dumps({"zero_optimization": {"stage": 3}})}, says=["zero_optimization.stage is 3", "2 by zero.stage"]),
    Case(name="conflicting batch", command="launch", overrides=["--zero.config={train_batch_size: 7}", "--cluster.ranks_per_node=2"], says=["train_batch_size is 7", "16 by training.global_batch_size"]),
    Case(name="conflicting accumulation", command="launch", overrides=["--zero.config={gradient_accumulation_steps: 3}", "--cluster.ranks_per_node=2"], says=["gradient_accumulation_steps is 3", "2 by training.global_batch_size"]),
    Case(name="secret in the DeepSpeed config", overrides=["--zero.config={wandb: {api_key: abc}}"], says=["wandb.api_key is a secret", "environment variable"]),
    Case(name="own optimizer", overrides=["--zero.config={optimizer: {type: Adam}}"], says=["optimizer is set", "remove it"]),
    # files that the commands take
    Case(name="run folder missing", arguments=["report", "runs/gone"], says=["RUN is runs/gone"]),
    Case(name="selection missing", arguments=["inspect", "gone.safetensors"], says=["PATH is gone.safetensors", "does not exist"]),
    Case(name="folder without selection", arguments=["inspect", "."], says=["PATH is .", "without selection.safetensors"]),
    Case(name="selection cut off", arguments=["inspect", "cut.safetensors"], files={"cut.safetensors": b"\x10\x00"}, says=["cut.safetensors is ", "safetensors file", "again"]),
    Case(name="selection to a folder", command="select", overrides=["--out=there"], files={"there/x": ""}, says=["--out is there", "is a folder"]),
    Case(name="selection below a file", command="select", overrides=["--out=there/x"], files={"there": ""}, says=["--out is there/x", "there is a file"]),
    Case(name="evaluation to a folder", command="evaluate", overrides=["--data.test=t.json", "--out=there"], files={"there/x": ""}, says=["--out is there", "is a folder"]),
    Case(name="evaluation below a file", command="evaluate", overrides=["--data.test=t.json", "--out=there/x/y"], files={"there": ""}, says=["--out is there/x/y", "there is a file"]),
    Case(name="export below a file", command="export", overrides=["--adapter=adapter", "--out=there/x"], files={"there": "", "adapter/x": ""}, says=["--out is there/x", "there is a file"]),
    Case(name="no tokens of other text", overrides=["--data.forgetting=t.txt", "--data.forgetting_tokens=0"], says=["data.forgetting_tokens is 0"]),
    Case(name="format text with test data", overrides=["--data.format=text", "--data.test=t.json"], says=["data.test is 't.json'", "data.format is 'text'"]),
    Case(name="plain text with test data", overrides=["--data.fields.text=body", "--data.test=t.json"], says=["data.test is 't.json'", "data.fields.text is 'body'", "leave data.test out"]),
    Case(name="port out of range", overrides=["--cluster.master_port=70000"], says=["cluster.master_port is 70000", "1 to 65535"]),
    Case(name="evaluate without test data", command="evaluate", says=["data.test is missing"]),
    Case(name="adapter missing", command="evaluate", overrides=["--data.test=t.json", "--adapter=gone"], says=["--adapter is gone"]),
    # sweeps; tests/launcher/test_sweep_points.py has the grids
    Case(name="sweep without a section", command="sweep", says=["run.yaml has no section sweep", "sparse-zero launch"]),
    Case(name="launch of a sweep", command="launch", files=sweep_file(), says=["run.yaml has a section sweep", "sparse-zero sweep --config FILE"]),
    Case(name="worker of a sweep", files=sweep_file(), says=["run.yaml has a section sweep"]),
    Case(name="sweep without a folder", command="sweep", files=sweep_file(folder=" "), says=["sweep.folder is empty"]),
    Case(name="unknown key of a sweep", command="sweep", files=sweep_file(gird={}), says=["unknown key sweep.gird", "did you mean sweep.grid?"]),
    Case(name="grid that is a list", command="sweep", files=sweep_file(grid=[]), says=["sweep.grid is []: expected a mapping"]),
    Case(name="a point that does not hold", command="sweep", files=sweep_file(grid={"training.steps": [3, 0]}), says=["the point steps=0 of the sweep", "training.steps is 0"]),
    Case(name="sweep below a file", command="sweep", files={**sweep_file(folder="there/x"), "there": ""}, says=["sweep.folder is there/x", "there is a file"]),
    Case(name="override of what a sweep varies", command="sweep", files=sweep_file(), overrides=["--training.seed=3"], says=["--training.seed is given", "sweep.grid"]),
    Case(name="no point chosen", command="sweep", files=sweep_file(), overrides=["--only=seed=7", "--dry-run"], says=["--only seed=7", "--dry-run lists them"]),
    Case(name="points that are no numbers", command="sweep", files=sweep_file(), overrides=["--points=1-"], says=["--points is '1-'", "0-3,7"]),
    Case(name="point before there is a list", command="sweep", files=sweep_file(), overrides=["--point=0"], says=["--point is 0", "points.json"]),
    Case(name="some of a whole table", command="sweep", files=sweep_file(), overrides=["--collect", "--only=x"], says=["--only is x beside --collect"]),
    Case(name="some of one point", command="sweep", files=sweep_file(), overrides=["--point=0", "--points=1"], says=["--points is 1 beside --point"]),
    Case(name="script without a place", command="sweep", files=sweep_file(), overrides=["--out=x"], says=["--out is x", "--emit slurm"]),
    Case(name="script that runs nothing", command="sweep", files=sweep_file(), overrides=["--emit=slurm", "--at-once=0"], says=["--at-once is 0"]),
    Case(name="script to a folder", command="sweep", files={**sweep_file(), "there/x": ""}, overrides=["--emit=slurm", "--out=there"], says=["--out is there", "is a folder"]),
    Case(name="script over the config", command="sweep", files=sweep_file(), overrides=["--emit=slurm", "--out=run.yaml"], says=["--out is run.yaml", "there already"]),
    Case(name="logs of a sweep below a file", command="sweep", files={**sweep_file(), "sweeps/logs": ""}, says=["sweep.folder is sweeps", "sweeps/logs is a file"]),
    Case(name="sweep of nothing", arguments=["sweep"], says=["--config is missing"]),
    Case(name="folder of a sweep without a point", arguments=["sweep", "--folder", "sweeps"], says=["--folder is sweeps without --point"]),
    Case(name="folder and config of a sweep", command="sweep", files=sweep_file(), overrides=["--folder=sweeps", "--point=0"], says=["--folder is sweeps beside --config run.yaml"]),
    Case(name="folder of a sweep that changes", arguments=["sweep", "--folder", "sweeps", "--point=0", "--training.steps=2"], says=["--folder is sweeps beside --training.steps=2"]),
    Case(name="override of what a choice sets", command="sweep", files=sweep_file(grid={"a": {"x": {"training.steps": 2}, "y": {}}}), overrides=["--training.steps=3"], says=["--training.steps is given", "the choice x of sweep.grid.a"]),
    Case(name="folder of all points", command="sweep", files=sweep_file(), overrides=["--output.folder=x"], says=["--output.folder is given", "--sweep.folder"]),
    Case(name="array across nodes", command="sweep", files=sweep_file(), overrides=["--emit=slurm", "--cluster.launcher=torchrun", "--cluster.num_nodes=2", "--cluster.master_address=a", "--cluster.ranks_per_node=2"], says=["cluster.launcher is torchrun", "set it to slurm"]),
    Case(name="two things at once", command="sweep", files=sweep_file(), overrides=["--collect", "--dry-run"], says=["--dry-run", "--collect"]),
    Case(name="list of points damaged", command="sweep", files={**sweep_file(), "sweeps/points.json": "{}"}, says=["sweeps/points.json is no list of points"]),
    Case(name="adapter to export missing", command="export", says=["--adapter is out/adapter"]),
]  # fmt: skip

RECORDS = json.dumps([{"instruction": f"Add {i} and 3.", "output": str(i + 3), "answer": str(i + 3)} for i in range(8)])
_MODULES = "--selection.regions.0.modules="
# Test data that is asked after training alone.
TESTED = ["--data.test=train.json", "--output.evaluate=true", "--output.evaluate_base=false"]

# What only the model, the tokenizer, the data or a file on disk can tell: the folder has two models (another has
# other weights), data, and adapters.
RUN_CASES = [
    # the model
    Case(name="model missing", overrides=["--model.name_or_path=./gone"], says=["model.name_or_path is './gone'"]),
    Case(name="model folder without a model", overrides=["--model.name_or_path=empty"], files={"empty/x.txt": ""}, says=["empty", "config.json"]),
    Case(name="weights cut off", overrides=["--model.name_or_path=cut"], says=["cut", "model.safetensors"]),
    Case(name="GGUF file missing", overrides=["--model.gguf_file=gone.gguf"], says=["gone.gguf"]),
    Case(name="precision against dtype", overrides=["--training.precision=bf16"], says=["training.precision is bf16", "model.dtype is float32"]),
    Case(name="packed samples of a family that mixes them", overrides=["--model.name_or_path=bloom", "--model.attention=eager", "--data.batching=pack"], says=["data.batching is 'pack'", "bloom models", "set data.batching to pad"]),
    # classes
    Case(name="head left untrained", overrides=CLASSES, files={"classes.tsv": "sentence\tlabel\na\t1\nb\t0\n"}, says=["selection.regions leaves score.weight untrained", 'modules: ["score.*"]']),
    Case(name="head trained twice", overrides=[*CLASSES, "--selection.regions=[{kind: whole, modules: ['score.*']}, {kind: row, modules: [score], per_matrix: 1}]"], files={"classes.tsv": "sentence\tlabel\na\t1\nb\t0\n"}, says=["trains score.weight entirely", "names its rows too"]),
    Case(name="class beyond the last", overrides=CLASSES, files={"classes.tsv": "sentence\tlabel\na\t1\nb\t2\n"}, says=["record 2 of data.train has the label '2'", "classes 0 to 1"]),
    Case(name="number that is none", overrides=[*CLASSES, "--model.num_labels=1"], files={"classes.tsv": "sentence\tlabel\na\t1.5\nb\tmuch\n"}, says=["record 2 of data.train has the label 'much'", "model.num_labels is 1"]),
    Case(name="words of one class too many", overrides=CLASSES, files={"classes.tsv": "sentence\tlabel\na\tno\nb\tyes\nc\tmaybe\n"}, says=["model.num_labels is 2", "3 different labels", "'maybe', 'no', 'yes'"]),
    Case(name="hidden labels", overrides=[*CLASSES, "--data.validation=dev.tsv"], files={"classes.tsv": "sentence\tlabel\na\t1\nb\t0\n", "dev.tsv": "sentence\tlabel\na\t-1\n"}, says=["record 1 of data.validation has the label '-1'", "hidden"]),
    Case(name="text to classify beyond the context", overrides=[*CLASSES, "--data.test=dev.tsv", "--data.max_length=9999", "--output.evaluate=true", "--output.evaluate_base=false"], files={"classes.tsv": "sentence\tlabel\na\t1\nb\t0\n", "dev.tsv": "sentence\tlabel\n" + "a b " * 2000 + "\t1\n"}, says=["data.max_length lets samples have up to", "lower data.max_length"]),
    Case(name="ragged tsv", overrides=CLASSES, files={"classes.tsv": "sentence\tlabel\na\tb\t1\n"}, says=["classes.tsv", "line 2 has 3 values for 2 columns"]),
    # the data
    Case(name="data missing", overrides=["--data.train=./gone.json"], says=["data.train is './gone.json'"]),
    Case(name="data empty", files={"train.json": "[]"}, says=["train.json", "no records"]),
    Case(name="data not JSON", files={"train.json": "{"}, says=["train.json"]),
    Case(name="record without a field", files={"train.json": '[{"instruction": "a"}]'}, says=["train.json", "output"]),
    Case(name="nothing fits the length", overrides=["--data.max_length=3"], says=["data.max_length is 3"]),
    Case(name="text that is empty", overrides=["--data.train=train.txt"], files={"train.txt": " \n"}, says=["data.train is 'train.txt'", "holds no text"]),
    Case(name="other text missing", overrides=["--data.forgetting=./gone.txt"], says=["data.forgetting is './gone.txt'"]),
    Case(name="plain text to answer", command="evaluate", overrides=["--data.test=t.txt"], files={"t.txt": "a b"}, says=["t.txt", "plain text has no records"]),
    Case(name="unknown suffix", overrides=["--data.train=train.xml"], files={"train.xml": "<a/>"}, says=["train.xml"]),
    Case(name="test records without answer", command="evaluate", overrides=["--data.test=t.json"], files={"t.json": '[{"instruction": "a", "output": "b"}]'}, says=["t.json", "answer"]),
    Case(name="test problems without options", overrides=[*TESTED, "--data.evaluation.kind=choice"], says=["record 1 of data.test offers no options", "set data.evaluation.options"]),
    Case(name="right answer that is no option", overrides=[*TESTED, "--data.evaluation={kind: choice, options: [a, b], limit: 1}"], says=["record 1 of data.test has the answer '3'", "none of its options (a, b)"]),
    Case(name="test problem beyond the context", overrides=[*TESTED, "--data.evaluation.max_new_tokens=1020"], says=["a problem of data.test needs", "room for 1024", "lower that setting"]),
    # the selection
    Case(name="pattern without match", overrides=["--selection.regions.0.modules=['*.query_proj']"], says=["'*.query_proj'", "did you mean '*.q_proj'?"]),
    Case(name="budget larger than the model", overrides=["--selection.budget={parameters: 1000000000}"], says=["selection.budget.parameters is 1,000,000,000"]),
    Case(name="block larger than the matrix", overrides=["--selection.regions.0.block_size=4096"], says=["selection.regions.block_size is 4096", "64x64"]),
    Case(name="modules of a rate without match", overrides=["--training.per_module=[{modules: ['*.query_proj'], learning_rate: 1.0}]"], says=["per_module.0.modules", "'*.query_proj'", "did you mean '*.q_proj'?"]),
    Case(name="more rows than there are", overrides=["--selection.regions=[{kind: row, modules: ['*.q_proj'], per_matrix: 65}]"], says=["per_matrix is 65", "64"]),
    Case(name="layer that does not exist", overrides=["--selection.regions.0.min_layer=99"], says=["min_layer", "99"]),
    Case(name="depth that leaves a pattern nothing", overrides=["--selection.min_depth=0.9", "--selection.regions.0.modules=['*.layers.0.*.q_proj']"], says=["selection.min_depth is 0.9", "'*.layers.0.*.q_proj'", "lower it"]),
    Case(name="no linear", overrides=[f"{_MODULES}['model.norm']"], says=["'model.norm'"]),
    # the run folder
    Case(name="output folder is a file", files={"out": "x"}, says=["output.folder is out", "is a file"]),
    Case(name="checkpoint missing", overrides=["--checkpoint.resume=gone"], says=["checkpoint.resume is gone"]),
    Case(name="checkpoint in the way", overrides=["--checkpoint.resume=never"], files={f"out/checkpoints/step-000001/{MANIFEST}": "{}"}, says=["checkpoint.resume is 'never'", "out has checkpoints"]),
    Case(name="older checkpoint of the same folder", overrides=["--checkpoint.resume=out/checkpoints/step-000001"], files={f"out/checkpoints/step-00000{step}/{MANIFEST}": "{}" for step in (1, 2)}, says=["checkpoint.resume is out/checkpoints/step-000001", "step-000002", "another output.folder"]),
    Case(name="run config cut off", files={f"out/checkpoints/step-000001/{MANIFEST}": "{}", "out/config.yaml": "training: {st"}, says=["out/config.yaml, line 1", "restore it"]),
    Case(name="another run's folder", files={f"out/checkpoints/step-000001/{MANIFEST}": "{}", "out/config.yaml": dump_yaml({"training": {"steps": 9}})}, says=["output.folder out holds another run"]),
    # adapters
    Case(name="no adapter in the folder", command="export", overrides=["--adapter=empty"], files={"empty/x.txt": ""}, says=["empty"]),
    Case(name="foreign adapter", command="export", overrides=["--adapter=adapter", "--model.name_or_path=other"], says=["adapter was trained on the base", "other"]),
    Case(name="foreign adapter to evaluate", command="evaluate", overrides=["--adapter=adapter", "--model.name_or_path=other", "--data.test=train.json"], says=["adapter was trained on the base", "other"]),
    Case(name="adapter cut off", command="export", overrides=["--adapter=cut-adapter"], says=["cut-adapter", "safetensors"]),
    Case(name="export in the way", command="export", overrides=["--adapter=adapter", "--out=empty"], files={"empty/x.txt": ""}, says=["--out is empty", "exists already"]),
    Case(name="report without metrics", arguments=["report", "empty"], files={"empty/x.txt": ""}, says=["empty", "metrics"]),
    # the launcher's variables
    Case(name="world of nobody", environment={"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, says=["WORLD_SIZE is 0", "at least one rank"]),
    Case(name="rank outside the world", environment={"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, says=["RANK is 3"]),
    Case(name="world size not a number", environment={"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, says=["WORLD_SIZE is 'two'"]),
]  # fmt: skip


def write_case(folder: Path, case: Case, mapping: dict[str, Any]) -> list[str]:
    """Lay the case's files out in ``folder``; returns its command line."""
    for dotted in case.remove:
        *above, last = dotted.split(".")
        target: Any = mapping
        for key in above:
            target = target[int(key)] if isinstance(target, list) else target[key]
        del target[last]
    files = {"run.yaml": dump_yaml(mapping), **case.files}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.arguments is not None:
        return list(case.arguments)
    return [case.command, "--config", "run.yaml", *case.overrides]


def assert_refused(code: int, out: str, err: str, case: Case) -> None:
    assert code == 2, err
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("sparse-zero: error: ")
    assert "Traceback" not in err
    for part in case.says:
        assert part in lines[0]


@pytest.mark.parametrize("case", CONFIG_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_invariant_7_a_wrong_config_is_never_silent(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = write_case(tmp_path, case, run_mapping())
    before = listing(tmp_path)
    code = main(arguments)
    captured = capfd.readouterr()
    assert_refused(code, captured.out, captured.err, case)
    assert listing(tmp_path) == before


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data and adapters, whole ones and broken ones."""
    from launcher.world import join_world
    from sparse_zero.collectives import leave_process_group

    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed probes for libaio when a process first joins a world. The linker's complaint, which it hides
        # from a terminal, is not hidden from pytest's capture: it is let out here, before the tests.
        clear_ranks(patch)
        join_world()
        leave_process_group()

    from models.base_identity import base_identity
    from models.loading import load_model
    from sparse_zero import Selection, WeightSelection, save_adapter, sparsify

    folder = tmp_path_factory.mktemp("prepared")
    write_tiny_llama(folder / "model-folder")
    write_tiny_llama(folder / "other", seed=1)
    FAMILIES["bloom"].make(vocab_size=384).save_pretrained(folder / "bloom")
    tiny_tokenizer().save_pretrained(folder / "bloom")
    shutil.copytree(folder / "model-folder", folder / "cut")
    cut(folder / "cut" / "model.safetensors")
    (folder / "train.json").write_text(RECORDS, encoding="utf-8")

    model = load_model(ModelConfig(name_or_path=str(folder / "model-folder")))
    rows = WeightSelection(shape=(64, 64), rows=torch.tensor([1, 5]))
    sparsify(model, Selection({"model.layers.0.self_attn.q_proj.weight": rows}))
    save_adapter(model, folder / "adapter", base=base_identity(folder / "model-folder"))
    shutil.copytree(folder / "adapter", folder / "cut-adapter")
    for file in (folder / "cut-adapter").glob("*.safetensors"):
        cut(file)
    return folder


def clear_ranks(patch: pytest.MonkeyPatch) -> None:
    """Take out what names a rank; what a worker sets in this process is undone with ``patch``."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        patch.setenv(variable, "")
        patch.delenv(variable)


def cut(file: Path) -> None:
    """Leave the first half, as a full disk or a broken copy would."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("case", RUN_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_invariant_7_a_wrong_run_is_never_silent(
    case: Case,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    clear_ranks(monkeypatch)
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    arguments = write_case(folder, case, run_mapping())
    for variable, value in case.environment.items():
        monkeypatch.setenv(variable, value)
    before = listing(folder)
    code = main(arguments)
    captured = capfd.readouterr()
    # Standard output may have DeepSpeed's own words.
    assert_refused(code, "", captured.err, case)
    assert listing(folder) == before


def test_names_are_unique() -> None:
    names = [case.name for case in (*CONFIG_CASES, *RUN_CASES)]
    assert len(set(names)) == len(names)


def test_as_a_process(tmp_path: Path) -> None:
    """What main returns is what the shell sees, and nothing else is printed on the way."""
    case = Case(name="", overrides=["--training.steps=many"], says=["training.steps is 'many'"])
    arguments = write_case(tmp_path, case, run_mapping())
    before = listing(tmp_path)
    result = subprocess.run(
        [sys.executable, "-B", "-m", "launcher", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert_refused(result.returncode, result.stdout, result.stderr, case)
    assert listing(tmp_path) == before


def test_worker_as_a_process(prepared: Path, tmp_path: Path) -> None:
    """The same of the script that launchers start, which needs torch and DeepSpeed to find the mistake."""
    case = Case(name="", overrides=["--selection.regions.0.block_size=4096"], says=["block_size is 4096"])
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    arguments = write_case(folder, case, run_mapping())
    before = listing(folder)
    result = subprocess.run(
        [sys.executable, "-B", str(ROOT / "launcher" / "train.py"), *arguments[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert_refused(result.returncode, "", result.stderr, case)
    assert listing(folder) == before


def test_interrupt_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.commands.report.Path", interrupted)
    assert main(["report", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_no_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the program must not be told as one of the user."""

    def broken(*_: object) -> None:
        raise ValueError("bug")

    monkeypatch.setattr("launcher.commands.report.Path", broken)
    with pytest.raises(ValueError, match="bug"):
        main(["report", str(tmp_path)])
