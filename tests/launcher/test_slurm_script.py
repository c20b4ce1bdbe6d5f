"""Does the emitted batch script, under a real Slurm, end the run in time, queue it again, and lose no step?"""

from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.__main__ import main
from tests.distributed.cluster import Cluster
from tests.distributed.slurm import Slurm, skip_without_slurm
from tests.launcher.test_launchers import wait_until
from tests.launcher.test_nodes import losses_of_one_process, pythons, rows, short_run, variables
from tests.launcher.test_sweep import programs, write_sweep
from tests.launcher.test_train import write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 40
# What neither sbatch nor a shell may take for more than a name.
NAME = "a b'c\"d\\e$(touch hacked)`touch hacked`;%h #x"


@pytest.fixture(scope="module")
def settings():
    return {**short_run(STEPS), "training__schedule": "constant"}


@pytest.fixture(scope="module")
def expected(base, settings, tmp_path_factory):
    return losses_of_one_process(base, tmp_path_factory.mktemp("single"), settings)


def emitted(base, folder, monkeypatch, settings, **batch):
    """The script, written as a user would; the command it starts is this interpreter's, whatever is installed."""
    (folder / "scratch").mkdir()
    section = {"launcher": "slurm", "num_nodes": 2, "ranks_per_node": 2}
    batch = {"gpus_per_rank": 0, "setup": [f"export PATH={programs(folder)}:{variables()['PATH']}"], **batch}
    config = write_config(base, folder, **settings, cluster=section, batch=batch)
    monkeypatch.chdir(folder)
    assert main(["launch", "--config", str(config.name), "--emit", "slurm", "--out", "job.sh"]) == 0
    return folder / "job.sh"


def cluster_of(folder):
    return Cluster(2, environment={**variables(), "TMPDIR": str(folder / "scratch")})


def environments(cluster):
    """Of the Python processes on all nodes."""
    found = []
    for process in (process for name in cluster.names for process in pythons(cluster, name)):
        with suppress(psutil.Error, ProcessLookupError):  # It has just ended.
            found.append(process.environ())
    return found


def check_complete(folder, cluster, said, expected, at):
    assert not [name for name in cluster.names if pythons(cluster, name)], said[-4000:]
    assert f"continuing from {folder}/run/checkpoints/step-{at:06d} after step {at}" in said
    assert [row["loss"] for row in rows(folder / "run")] == pytest.approx(expected, rel=1e-5)
    # The copies of the extensions, of both starts.
    assert not list((folder / "scratch").glob("sparse-zero-*"))
    assert not list(folder.rglob("hacked"))


def test_a_job_whose_time_ends_queues_itself_again(base, settings, expected, tmp_path, monkeypatch):
    skip_without_slurm()
    script = emitted(base, tmp_path, monkeypatch, settings, name=NAME, time_limit_minutes=20)
    with cluster_of(tmp_path) as cluster, Slurm(cluster, tmp_path / "slurm") as slurm:
        number = slurm.run("sbatch", "--parsable", f"--chdir={tmp_path}", str(script)).strip()
        output = tmp_path / f"sparse-zero-{number}.out"
        assert slurm.run("squeue", "-h", "-j", number, "-o", "%j") == f"{NAME}\n"
        assert slurm.job(number)["TimeLimit"] == "00:20:00"
        wait_until(lambda: len(rows(tmp_path / "run")) >= 5, output)
        ranks = [each for each in environments(cluster) if each.get("RANK") or each.get("SLURM_PROCID")]
        caches = {each["TORCH_EXTENSIONS_DIR"] for each in ranks} | {each["TRITON_CACHE_DIR"] for each in ranks}
        own = f"{tmp_path}/scratch/sparse-zero-{number}-0"
        assert caches == {f"{own}/torch_extensions", f"{own}/triton"}
        # Copied, not built again: times and logs that ninja compares came along.
        shared = Path(variables().get("TORCH_EXTENSIONS_DIR", tmp_path / "none"))
        for built in shared.glob("*/*.so"):
            copied = Path(own) / "torch_extensions" / built.relative_to(shared)
            assert copied.stat().st_mtime_ns == built.stat().st_mtime_ns, built
        # What --signal does when the time is nearly over.
        slurm.run("scancel", "--batch", "--signal=USR1", number)
        slurm.wait_for(number, ["PENDING"], 120)
        at = len(rows(tmp_path / "run"))
        assert 5 <= at < STEPS
        assert f"job {number} is queued again" in output.read_text()
        # Slurm waits two minutes before a requeued job starts again, unless it is told not to.
        slurm.run("scontrol", "update", f"job={number}", "starttime=now")
        job = slurm.wait_for(number, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"], 300)
        said = output.read_text()
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said[-8000:]
        check_complete(tmp_path, cluster, said, expected, at)


@pytest.mark.parametrize(
    "section",
    [{"launcher": "slurm", "num_nodes": 2, "ranks_per_node": 1}, {"launcher": "torchrun", "ranks_per_node": 2}],
    ids=lambda section: section["launcher"],
)
def test_the_points_of_a_sweep_run_as_tasks_of_an_array(section, base, tmp_path, monkeypatch):
    """Two points at once, on the same two nodes or one; one gets the signal of its time's end, and continues."""
    skip_without_slurm()
    steps = 24
    settings = {
        **short_run(steps), "checkpoint__every": None, "output": {},
        "cluster": section,
        "batch": {"gpus_per_rank": 0, "setup": [f"export PATH={programs(tmp_path)}:{variables()['PATH']}"]},
    }  # fmt: skip
    config = write_sweep(base, tmp_path, {"training.seed": [0, 1]}, **settings)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--config", config.name, "--emit", "slurm", "--out", "array.sh"]) == 0
    (tmp_path / "scratch").mkdir()
    runs = [tmp_path / "sweep" / f"seed={seed}" for seed in range(2)]
    with cluster_of(tmp_path) as cluster, Slurm(cluster, tmp_path / "slurm") as slurm:
        array = slurm.run("sbatch", "--parsable", f"--chdir={tmp_path}", "array.sh").strip()
        outputs = [tmp_path / f"sparse-zero-{array}_{task}.out" for task in range(2)]
        wait_until(lambda: all(len(rows(run)) >= 3 for run in runs), outputs[1], 300)
        slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
        wait_until(lambda: "is queued again" in outputs[1].read_text(), outputs[1], 120)
        wait_until(lambda: slurm.run("squeue", "-h", "-j", f"{array}_1", "-o", "%T").split() == ["PENDING"], outputs[1])
        slurm.run("scontrol", "update", f"job={array}_1", "starttime=now")
        wait_until(lambda: all((run / "summary.json").is_file() for run in runs), outputs[1], 300)
        for task in range(2):
            # A task has the array's number; the others are not to be queued again with it.
            assert slurm.wait_for(f"{array}_{task}", ["COMPLETED"], 60)["Restarts"] == str(task)
        assert not [name for name in cluster.names if pythons(cluster, name)]
    for run in runs:
        assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))
    assert main(["sweep", "--config", config.name, "--collect"]) == 0
    table = (tmp_path / "sweep" / "table.csv").read_text().splitlines()
    assert [line.count(",finished,") for line in table] == [0, 1, 1], table


def test_a_job_gives_way_to_one_of_a_higher_partition(base, settings, expected, tmp_path, monkeypatch):
    """Slurm tells the job by the signal of --signal, and gives it a grace time; the urgent job gets its nodes."""
    skip_without_slurm()
    script = emitted(base, tmp_path, monkeypatch, settings, slurm={"partition": "low"})
    preemption = (
        "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nSlurmctldParameters=preempt_send_user_signal\n"
        "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=120 State=UP\n"
        "PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP\n"
    )
    with cluster_of(tmp_path) as cluster, Slurm(cluster, tmp_path / "slurm", settings=preemption) as slurm:
        number = slurm.run("sbatch", "--parsable", f"--chdir={tmp_path}", str(script)).strip()
        output = tmp_path / f"sparse-zero-{number}.out"
        assert slurm.job(number)["Partition"] == "low"
        wait_until(lambda: len(rows(tmp_path / "run")) >= 5, output)
        all_of_it = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null", "--wrap=sleep 2")
        urgent = slurm.run("sbatch", "--parsable", *all_of_it).strip()
        assert slurm.wait_for(urgent, ["COMPLETED"], 120)["JobState"] == "COMPLETED"
        at = len(rows(tmp_path / "run"))
        assert 5 <= at < STEPS
        slurm.wait_for(number, ["PENDING"], 30)
        slurm.run("scontrol", "update", f"job={number}", "starttime=now")
        job = slurm.wait_for(number, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"], 300)
        said = output.read_text()
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said[-8000:]
        check_complete(tmp_path, cluster, said, expected, at)
