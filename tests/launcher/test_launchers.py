"""Does the same YAML run over every launcher, on nodes that only ssh connects, with the same losses?"""

import json
import os
import shutil
from pathlib import Path

import pytest

from launcher.find_mpirun import find_mpirun
from sparse_zero.errors import InputError
from tests.distributed.cluster import Cluster, skip_without_cluster
from tests.launcher.test_nodes import launch, pythons, rows, variables
from tests.launcher.test_train import run, worker, write_config

STEPS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# A folder whose name every shell would take apart, and a variable likewise.
HOSTILE = "a b'c\"d$(touch hacked)`touch hacked`;touch hacked %h"
PACKAGES = {"openmpi": "openmpi-bin", "mpich": "mpich"}


@pytest.fixture(scope="module")
def settings():
    return {
        "training__steps": STEPS,
        "training__global_batch_size": 16,
        "training__micro_batch_size": 4,
        "training__validation_every": None,
        "output__evaluate": False,
        "output__merged": False,
    }


@pytest.fixture(scope="module")
def expected(base, settings, tmp_path_factory):
    """Losses of the run in one process."""
    folder = tmp_path_factory.mktemp("single")
    run(worker(write_config(base, folder, **settings)), folder)
    return [row["loss"] for row in rows(folder / "run")]


def need(launcher):
    if launcher == "torchrun":
        skip_without_cluster()
    elif launcher == "pdsh":
        skip_without_cluster("pdsh")
    else:
        skip_without_cluster()
        try:
            find_mpirun(launcher, os.environ)
        except InputError as error:
            pytest.skip(f"{error} (apt-get install {PACKAGES[launcher]})")


def check(folder, process, output, cluster, expected, *, world_size, started_by):
    assert not [name for name in cluster.names if pythons(cluster, name)], output[-4000:]
    assert process.returncode == 0, output[-8000:]
    assert [row["loss"] for row in rows(folder / "run")] == pytest.approx(expected, rel=1e-5)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (world_size, STEPS)
    assert f"{world_size} ranks on cpu, started by {started_by}" in output


@pytest.mark.parametrize(
    ("launcher", "num_nodes", "ranks", "stage", "started_by"),
    [
        ("pdsh", 2, 1, 2, "environment"),
        ("pdsh", 4, 1, 3, "environment"),
        ("openmpi", 2, 1, 2, "openmpi"),
        ("openmpi", 2, 2, 3, "openmpi"),
        ("mpich", 2, 1, 2, "environment"),
        ("mpich", 2, 2, 3, "environment"),
    ],
)
def test_a_run_over_ssh(launcher, num_nodes, ranks, stage, started_by, base, settings, expected, tmp_path):
    need(launcher)
    hostile = tmp_path / HOSTILE
    shutil.copytree(base, hostile)
    section = {
        "launcher": launcher, "num_nodes": num_nodes, "ranks_per_node": ranks, "network_interface": "eth0",
        "hosts": [f"node{number} slots=4" for number in range(num_nodes + 1)], "exclude": ["node0"],
        "export": [f"OWN={HOSTILE}"],
    }  # fmt: skip
    changes = {**settings, "zero__stage": stage, "output__folder": str(hostile / "run"), "cluster": section}
    config = write_config(hostile, tmp_path, **changes)
    config = config.rename(hostile / "run.yaml")
    with Cluster(num_nodes + 1, environment=variables()) as cluster:
        process = launch(cluster, "node0", config, tmp_path)
        output = process.communicate(timeout=400)[0]
        check(hostile, process, output, cluster, expected, world_size=num_nodes * ranks, started_by=started_by)
    assert not list(tmp_path.rglob("hacked"))
    assert not Path("hacked").exists()


def test_torchrun_on_every_node(base, settings, expected, tmp_path):
    need("torchrun")
    section = {"launcher": "torchrun", "num_nodes": 2, "ranks_per_node": 1, "master_address": "node0"}
    config = write_config(base, tmp_path, **settings, cluster={**section, "master_port": 29611})
    with Cluster(2, environment=variables()) as cluster:
        processes = [launch(cluster, name, config, tmp_path) for name in cluster.names]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert processes[1].returncode == 0, outputs[1][-8000:]
        check(tmp_path, processes[0], "".join(outputs), cluster, expected, world_size=2, started_by="torchrun")
