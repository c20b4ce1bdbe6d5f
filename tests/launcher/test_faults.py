"""One rank raises, is killed or gets a signal: all end soon, the cause is shown, and the last checkpoint is whole."""

import signal
import subprocess
import sys
import time

import pytest

import sparse_zero as sz
from scripts import tiny_run as tiny
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
        pytest.param("write_back", "deepspeed", marks=pytest.mark.slow),
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


# --- signals to some of the ranks ------------------------------------------------------------------------------


def wait(start, until, seconds=240.0):
    """Wait until something holds; fails where a rank ends before."""
    deadline = time.monotonic() + seconds
    while not until():
        assert start.codes() == [None, None], start.output()
        assert time.monotonic() < deadline, start.output()
        time.sleep(0.005)


def codes_at_the_end(start, seconds=240.0):
    """Exit codes, when both have ended by themselves."""
    deadline = time.monotonic() + seconds
    while None in start.codes() and time.monotonic() < deadline:
        time.sleep(0.01)
    start.kill([rank for rank, code in enumerate(start.codes()) if code is None])
    return start.codes()


def test_a_signal_to_one_rank_stops_all_and_the_run_continues_to_the_same_end(tmp_path):
    settings = tiny.RunSettings(steps=12, every=100, hidden=64)
    tiny.write_base(tmp_path / "base", settings)
    kind = tiny.Kind(stage=1, placement="inplace", reselects=False, reports=False)
    config = tiny.write_config(tmp_path / "base", tmp_path, kind, settings)
    run_folder = tmp_path / "run"
    stopped_after = 0
    for number, ranks in ((signal.SIGUSR1, [1]), (signal.SIGHUP, [0])):
        started = tiny.Start(config, tmp_path)
        wait(started, lambda started=started, last=stopped_after: started.trains and tiny.steps_done(run_folder) > last)
        started.send(number, ranks)
        assert codes_at_the_end(started) == [128 + number] * 2, started.output()
        # What was done was saved, by the one that has not heard the signal, too, and nothing is left half written.
        stopped_after = tiny.newest_checkpoint(run_folder)
        assert stopped_after == tiny.steps_done(run_folder) == tiny.pointer(run_folder)
        assert 0 < stopped_after < settings.steps
        assert not tiny.leftovers(run_folder)
        assert f"stopped by signal {int(number)} after step {stopped_after}" in started.output()
        assert "Traceback" not in started.output()
    # While it ends: nothing is left to be saved, and it ends at once.
    started = tiny.Start(config, tmp_path)
    wait(started, lambda: started.trains and tiny.newest_checkpoint(run_folder) == settings.steps)
    wait(started, lambda: (run_folder / "adapter").is_dir() or any(run_folder.glob(".*.tmp")))
    started.send(signal.SIGTERM, [0, 1])
    assert set(codes_at_the_end(started)) <= {128 + signal.SIGTERM, 75}, started.output()
    assert started.codes()[0] == 128 + signal.SIGTERM
    assert "Traceback" not in started.output()
    assert not (run_folder / "summary.json").exists()
    started = tiny.Start(config, tmp_path)
    assert codes_at_the_end(started) == [0, 0], started.output()
    assert started.continued_after == settings.steps
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, settings.steps + 1))
    assert not tiny.leftovers(run_folder)


@pytest.mark.slow
def test_a_rank_whose_peer_is_killed_says_so_in_one_line_and_gives_its_launcher_time_to_see_the_cause(tmp_path):
    settings = tiny.RunSettings(steps=2000, every=100, hidden=64)
    tiny.write_base(tmp_path / "base", settings)
    kind = tiny.Kind(stage=2, placement="inplace", reselects=False, reports=False)
    config = tiny.write_config(tmp_path / "base", tmp_path, kind, settings)
    started = tiny.Start(config, tmp_path)
    wait(started, lambda: started.trains and tiny.steps_done(tmp_path / "run") > 1)
    began = time.monotonic()
    started.kill([1])
    assert codes_at_the_end(started) == [75, -9], started.output()
    assert time.monotonic() - began >= 2.5
    said = started.logs[0].read_text()
    assert "rank 0 has lost the connection to another rank" in said
    assert "Traceback" not in said
