"""Do the commands that are emitted for Kubernetes and SkyPilot train, where their variables are set as these set them?

On nodes that are namespaces: no Kubernetes and no cloud runs here. What the operator and SkyPilot do besides (pods,
machines, volumes) is theirs. An MPIJob's launcher runs what ``test_launchers.py`` runs over ssh.
"""

import re
import subprocess
import sys

import pytest
import yaml

from launcher.__main__ import main
from tests.distributed.cluster import Cluster, skip_without_cluster
from tests.launcher.test_launchers import HOSTILE, check
from tests.launcher.test_nodes import losses_of_one_process, short_run, variables
from tests.launcher.test_train import write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 6


@pytest.fixture(scope="module")
def settings():
    return short_run(STEPS)


@pytest.fixture(scope="module")
def expected(base, settings, tmp_path_factory):
    return losses_of_one_process(base, tmp_path_factory.mktemp("single"), settings)


def emitted(system, base, folder, settings, capsys):
    programs = folder / "programs"
    programs.mkdir()
    (programs / "sparse-zero").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher "$@"\n')
    (programs / "sparse-zero").chmod(0o755)
    cluster = {"launcher": "torchrun", "num_nodes": 2, "ranks_per_node": 1, "export": [f"OWN={HOSTILE}\nend"]}
    volumes = [{"claim": "data", "path": str(folder)}]
    batch = {
        "gpus_per_rank": 0,
        "image": "image",
        "setup": [f"export PATH={programs}:$PATH"],
        "kubernetes": {"volumes": volumes},
    }
    config = write_config(base, folder, **settings, cluster=cluster, batch=batch)
    assert main(["launch", "--config", str(config), "--emit", system]) == 0
    config.unlink()
    return capsys.readouterr().out


def run_on_nodes(cluster, folder, command, environment):
    """The same command on both nodes, each with its variables; the last output is both."""
    processes = []
    for number, name in enumerate(cluster.names):
        told = {"PATH": f"{folder}/programs:{variables()['PATH']}", **environment(number)}
        line = ["env", *(f"{key}={value}" for key, value in told.items()), *command(told)]
        processes.append(
            subprocess.Popen(
                cluster.command(name, line, cwd=folder), env=cluster.environment(),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert processes[1].returncode == 0, outputs[1][-8000:]
    return processes[0], "".join(outputs)


def test_the_pods_of_a_pytorch_job(base, settings, expected, tmp_path, capsys):
    """The variables are those that the training operator sets, also for torchrun."""
    skip_without_cluster()
    config_map, job = yaml.safe_load_all(emitted("kubernetes", base, tmp_path, settings, capsys))
    pods = [replica["template"]["spec"]["containers"][0] for replica in job["spec"]["pytorchReplicaSpecs"].values()]
    assert pods[0]["command"] == pods[1]["command"]
    (mount,) = [mount["mountPath"] for mount in pods[0]["volumeMounts"] if mount["name"] == "run"]
    (tmp_path / "run.yaml").write_text(config_map["data"]["run.yaml"])

    def command(told):
        """As Kubernetes expands it, and with the mounted folder where the test may write."""
        words = [re.sub(r"\$\((\w+)\)", lambda match: told[match[1]], word) for word in pods[0]["command"]]
        return [word.replace(mount, str(tmp_path)) for word in words]

    def environment(number):
        told = {"MASTER_ADDR": "node0", "MASTER_PORT": "23456"}
        elastic = {**told, "NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": str(number)}
        pet = {f"PET_{name}": value for name, value in elastic.items()}
        return {**told, **pet, "WORLD_SIZE": "2", "RANK": str(number), "PYTHONUNBUFFERED": "1"}

    with Cluster(2, environment=variables()) as cluster:
        process, output = run_on_nodes(cluster, tmp_path, command, environment)
        check(tmp_path, process, output, cluster, expected, world_size=2, started_by="torchrun")
    assert not list(tmp_path.rglob("hacked"))


def test_the_machines_of_a_skypilot_task(base, settings, expected, tmp_path, capsys):
    skip_without_cluster()
    task = yaml.safe_load(emitted("skypilot", base, tmp_path, settings, capsys))
    (tmp_path / "run.sh").write_text(task["run"])

    def environment(number):
        addresses = "\n".join(f"10.77.0.{each + 1}" for each in range(2))
        return {"SKYPILOT_NODE_IPS": addresses, "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(number)}

    with Cluster(2, environment=variables()) as cluster:
        process, output = run_on_nodes(cluster, tmp_path, lambda told: ["bash", "run.sh"], environment)
        check(tmp_path, process, output, cluster, expected, world_size=2, started_by="torchrun")
    assert not list(tmp_path.rglob("hacked"))
