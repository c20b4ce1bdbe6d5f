"""Does the same YAML run over every launcher, on nodes that only ssh connects, with the same losses?"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from launcher.starting.find_mpirun import find_mpirun
from sparse_zero.errors import InputError
from tests.distributed.cluster import Cluster, skip_without_cluster
from tests.distributed.slurm import Slurm, skip_without_slurm
from tests.launcher.test_nodes import launch, losses_of_one_process, pythons, rows, short_run, variables
from tests.launcher.test_train import run, worker, write_config

STEPS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# A folder whose name every shell would take apart, and a variable likewise.
HOSTILE = "a b'c\"d$(touch hacked)`touch hacked`;touch hacked %h"
PACKAGES = {"openmpi": "openmpi-bin", "mpich": "mpich"}


@pytest.fixture(scope="module")
def settings():
    return short_run(STEPS)


@pytest.fixture(scope="module")
def expected(base, settings, tmp_path_factory):
    return losses_of_one_process(base, tmp_path_factory.mktemp("single"), settings)


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
    assert f"{world_size} rank{'s' * (world_size > 1)} on cpu, started by {started_by}" in output


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


def test_slurm_runs_and_requeues_a_job(base, settings, expected, tmp_path):
    """One batch script: preempted in the middle of the run, requeued, continued from the checkpoint of the signal."""
    skip_without_slurm()
    steps = 40
    section = {"launcher": "slurm", "num_nodes": 2, "ranks_per_node": 2, "export": [f"OWN={HOSTILE}"]}
    changes = {**settings, "training__steps": steps, "training__schedule": "constant", "cluster": section}
    config = write_config(base, tmp_path, **changes)
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/sh\n#SBATCH --nodes=2 --ntasks-per-node=2 --requeue --open-mode=append\n"
        f"exec {sys.executable} -m launcher launch --config {config}\n"
    )
    with Cluster(2, environment=variables()) as cluster, Slurm(cluster, tmp_path / "slurm") as slurm:
        submitted = slurm.run(
            "sbatch", "--parsable", f"--chdir={tmp_path}", f"--output={tmp_path}/job.out", str(script)
        )
        number = submitted.strip()
        output = tmp_path / "job.out"
        wait_until(lambda: len(rows(tmp_path / "run")) >= 5, output)
        slurm.run("scontrol", "requeue", number)
        slurm.wait_for(number, ["PENDING"], 120)
        at = len(rows(tmp_path / "run"))
        assert 5 <= at < steps
        # Slurm waits two minutes before a requeued job starts again, unless it is told not to.
        slurm.run("scontrol", "update", f"job={number}", "starttime=now")
        job = slurm.wait_for(number, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"], 300)
        said = output.read_text()
        assert job["JobState"] == "COMPLETED", said[-8000:]
        assert job["Restarts"] == "1"
        assert not [name for name in cluster.names if pythons(cluster, name)], said[-4000:]
    assert "4 ranks on cpu, started by slurm" in said
    assert f"continuing from {tmp_path}/run/checkpoints/step-{at:06d} after step {at}" in said
    found = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(found) == steps
    single = tmp_path / "single"
    single.mkdir()
    run(worker(write_config(base, single, **{**changes, "cluster": {}})), single)
    assert found == pytest.approx([row["loss"] for row in rows(single / "run")], rel=1e-5)


def wait_until(ready, output, timeout=240):
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, output.read_text()[-6000:] if output.is_file() else "no output"
        time.sleep(0.1)


def test_torchrun_on_every_node(base, settings, expected, tmp_path):
    need("torchrun")
    section = {"launcher": "torchrun", "num_nodes": 2, "ranks_per_node": 1, "master_address": "node0"}
    config = write_config(base, tmp_path, **settings, cluster={**section, "master_port": 29611})
    with Cluster(2, environment=variables()) as cluster:
        processes = [launch(cluster, name, config, tmp_path) for name in cluster.names]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert processes[1].returncode == 0, outputs[1][-8000:]
        check(tmp_path, processes[0], "".join(outputs), cluster, expected, world_size=2, started_by="torchrun")
