"""One rank raises in the middle of a step: all end soon, the first error is shown, and the last checkpoint is whole."""

import subprocess
import sys
import time

import pytest

import sparse_zero as sz
from tests.launcher.test_train import ROOT, environment, rows, run, worker, write_config

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2"],
}


@pytest.mark.parametrize(
    ("place", "launcher"),
    [
        pytest.param("forward", "torchrun", marks=pytest.mark.slow),
        ("collective", "torchrun"),
        ("write_back", "deepspeed"),
    ],
)
def test_a_rank_that_raises_ends_all_ranks_and_leaves_the_checkpoint(place, launcher, base, tmp_path):
    settings = {"output__evaluate": False, "output__merged": False, "training__validation_every": None}
    config = write_config(base, tmp_path, checkpoint__every=2, training__steps=5, **settings)
    mark = tmp_path / "mark"
    script = str(ROOT / "tests" / "launcher" / "fault_worker.py")
    command = [sys.executable, *LAUNCHERS[launcher], script, place, "4", str(mark), "--config", str(config)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    output = done.stdout + done.stderr
    assert mark.is_file(), output[-6000:]
    assert time.time() - mark.stat().st_mtime < 60, "a rank went on waiting"
    assert done.returncode not in (0, 2)
    assert f"planted fault during {place}" in output
    latest = sz.read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002")
    assert latest.extra["step"] == 2
    if place == "write_back":
        assert "continuing from" in run(worker(config), tmp_path)
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
