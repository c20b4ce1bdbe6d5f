"""Does a real sweep run its points, survive a failure and an interruption, and do nothing twice?"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from launcher.__main__ import main
from launcher.run_folder import RunLock
from launcher.stopping import SECOND_INTERRUPT_SECONDS, stop_requests
from launcher.sweep.points import expand
from launcher.sweep.progress import SweepProgress
from launcher.sweep.running import _wait, run_point, run_points
from launcher.sweep.sweep_config import SweepConfig
from launcher.sweep.sweep_folder import SweepFolder, list_points, write_list
from tests.launcher.test_bad_input import run_mapping
from tests.launcher.test_train import cli, environment, write_config


def write_sweep(base: Path, folder: Path, grid: dict[str, Any], **changes: Any) -> Path:
    """A sweep of short runs on one rank, in ``folder / sweep``."""
    quick = {
        "selection": {"regions": [{"kind": "row", "modules": ["*.up_proj"], "per_matrix": 2}], "score": "first"},
        "training__steps": 2,
        "training__validation_every": None,
        # Torch's launcher starts faster than DeepSpeed's.
        "cluster": {"ranks_per_node": 1, "launcher": "torchrun"},
        "output": {},
    }
    path = write_config(base, folder, **{**quick, **changes})
    mapping = {**yaml.safe_load(path.read_text()), "sweep": {"folder": "sweep", "grid": grid}}
    path.write_text(yaml.safe_dump(mapping, sort_keys=False))
    return path


def programs(folder: Path) -> Path:
    """A new folder with the command `sparse-zero`, which is this interpreter's, whatever is installed."""
    made = folder / "programs"
    made.mkdir()
    (made / "sparse-zero").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher "$@"\n')
    (made / "sparse-zero").chmod(0o755)
    return made


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """Runs a command in this process, in the test's folder; gives what it printed, after checking its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def call(config: Path, *arguments: str, code: int = 0) -> str:
        capfd.readouterr()
        found = main(["sweep", "--config", str(config), *arguments])
        output = "".join(capfd.readouterr())
        assert found == code, output
        return output

    return call


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep" / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_point_fails_the_others_run_and_what_is_finished_stays(base, tmp_path, here, monkeypatch, capfd):
    grid = {"length": {"good": {}, "bad": {"data.max_length": 3}}}
    config = write_sweep(base, tmp_path, grid)
    folder = tmp_path / "sweep"
    assert "length=bad" in here(config, "--dry-run")
    assert not folder.exists()
    output = here(config, code=1)
    assert "length=good: finished" in output
    # The point's own words, and where all of them are.
    assert "length=bad: failed with exit code 2" in output
    assert "data.max_length is 3" in output
    assert "sweep/logs/length=bad.log" in output
    good, bad = table(tmp_path)
    assert (good["name"], good["state"], good["exit_code"], good["steps"]) == ("length=good", "finished", "0", "2")
    assert float(good["validation_loss_best"]) > 0
    assert (bad["name"], bad["state"], bad["exit_code"], bad["final_loss"]) == ("length=bad", "failed", "2", "")
    assert "| good | 1/1 |" in (folder / "table.md").read_text()

    # Chosen, the finished one starts nothing, and the exit code is that of the chosen.
    before = times(folder / "length=good")
    output = here(config, "--only", "good")
    assert "1 of 1 points are finished already" in output
    # An array task of it neither, although the grid's order has changed meanwhile.
    write_sweep(base, tmp_path, {"length": {"bad": {"data.max_length": 3}, "good": {}}})
    script = tmp_path / "script.sh"
    arguments = ["--emit", "slurm", "--at-once", "1", "--out", str(script)]
    here(config, *arguments)
    assert "#SBATCH --array=0-1%1" in script.read_text()
    # The file of the sweep is of no matter to a task: it may be another one by now, or none.
    written = config.read_text()
    config.write_text("sweep: [")
    path = f"{programs(tmp_path)}:{os.environ['PATH']}"
    task = subprocess.run(
        ["bash", str(script)], cwd="/", env={**environment(), "PATH": path, "SLURM_ARRAY_TASK_ID": "0"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    config.write_text(written)
    assert task.returncode == 0, task.stderr
    assert "length=good is finished already" in task.stderr
    assert times(folder / "length=good") == before
    # Nothing is started from where the point's own folder would be another one.
    monkeypatch.chdir(tmp_path / "programs")
    assert main(["sweep", "--folder", str(folder), "--point", "1"]) == 2
    assert "in the directory where the sweep was listed" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    output = here(config, "--point", "length=good", "--training.steps=5")
    assert f"{config} has changed since length=good was listed" in output
    assert times(folder / "length=good") == before

    # A second sweep, and a run of another config in a point's place.
    with RunLock(folder) as lock:
        lock.take()
        output = here(config, code=2)
        assert "sweep.folder sweep is in use by another sweep" in output
    output = here(config, "--training.steps=5", "--only", "bad", code=2)
    assert "the point length=good of the sweep: output.folder sweep/length=good holds another run" in output
    assert times(folder / "length=good") == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loss_that_is_not_finite_is_a_failure_that_is_tried_again(base, tmp_path, here):
    grid = {"training.learning_rate": [1e38, 1e-3, 1e-2]}
    config = write_sweep(
        base,
        tmp_path,
        grid,
        training__steps=6,
        training__max_nonfinite_steps=1,
        training__warmup_fraction=0.0,
        training__max_gradient_norm=None,
    )
    here(config, "--stop-at-failure", code=1)
    assert [row["state"] for row in table(tmp_path)] == ["failed", "missing", "missing"]
    log = tmp_path / "sweep" / "logs" / "learning_rate=1e+38.log"
    first = log.stat().st_size
    output = here(config, "--points", "0-1", code=1)
    assert "non-finite" in output
    assert log.stat().st_size > first
    assert [row["state"] for row in table(tmp_path)] == ["failed", "finished", "missing"]
    # A task of an array runs its point, says it to its own output, and needs no lock of the sweep.
    with RunLock(tmp_path / "sweep") as lock:
        lock.take()
        output = here(config, "--point", "2")
    assert "Parameters trained" in output
    here(config, "--collect")
    assert [row["state"] for row in table(tmp_path)] == ["failed", "finished", "finished"]
    assert (tmp_path / "sweep" / "plot.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on_where_it_was(number, base, tmp_path, here):
    steps = 60
    config = write_sweep(base, tmp_path, {"training.seed": [0, 1]}, training__steps=steps)
    command = cli("sweep", "--config", str(config), "--points", "0")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "sweep" / "seed=0" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert "seed=0: stopped" in output
    assert not (tmp_path / "sweep" / "seed=0" / "summary.json").exists()
    assert (tmp_path / "sweep" / "seed=0" / "checkpoints" / "latest").is_file()
    assert not left_behind(tmp_path)
    assert "stopped" in here(config, "--dry-run", "--only", "seed=0")

    here(config, "--points", "0")
    assert "continuing from" in (tmp_path / "sweep" / "logs" / "seed=0.log").read_text()
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["state"] for row in table(tmp_path)] == ["finished", "missing"]


def test_a_user_who_cannot_wait_is_passed_on_and_then_obeyed(tmp_path):
    """A point that does not end gets the second interrupt, too, and is killed at the third."""
    heard = tmp_path / "heard"
    script = f"""
import signal, time
signal.signal(signal.SIGINT, lambda *_: open({str(heard)!r}, "a").write("x"))
open({str(heard)!r}, "a").close()
time.sleep(60)
time.sleep(60)
"""
    with stop_requests() as request:
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        while not heard.exists():
            time.sleep(0.05)
        interrupts = threading.Thread(target=interrupt, args=(3, SECOND_INTERRUPT_SECONDS + 0.3))
        interrupts.start()
        code = _wait(process, request)
        interrupts.join()
    assert code == 128 + signal.SIGKILL
    assert heard.read_text() == "xx"
    assert request.signal == signal.SIGINT


def interrupt(times: int, seconds: float) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(seconds)


def left_behind(folder: Path) -> list[str]:
    """Processes whose working directory is the test's."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                if (process / "cwd").resolve() == folder:
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def test_a_task_is_told_the_folder_and_the_number_alone(base, tmp_path, here):
    """What the file of the sweep says, and overrides, are in the configs that were written with the list."""
    config = write_sweep(base, tmp_path, {"training.seed": [0]})
    script = here(config, "--emit", "slurm", "--training.steps=9")
    assert f'run=(sparse-zero sweep --folder {tmp_path}/sweep --point "$SLURM_ARRAY_TASK_ID")\n' in script
    frozen = yaml.safe_load((tmp_path / "sweep" / "points" / "seed=0.yaml").read_text())
    assert frozen["training"]["steps"] == 9


# What a point's process does in the tests below, instead of training: it waits for the signal, and ends with a code.
WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""


@pytest.fixture
def listed(tmp_path):
    """A sweep of two points in the current folder, listed."""
    section = SweepConfig(folder=str(tmp_path / "sweep"), grid={"training.seed": [0, 1]})
    folder = SweepFolder(section.path)
    points = list_points([], expand(section, run_mapping()))
    write_list(folder, points)
    return folder, points


@pytest.mark.parametrize(("ends", "said", "code"), [(1, "failed with exit code 1", 138), (138, "stopped", 138)])
def test_a_signal_does_not_hide_how_a_point_ended(ends, said, code, listed, monkeypatch):
    folder, points = listed
    command = [sys.executable, "-c", WAITS.format(code=ends)]
    monkeypatch.setattr("launcher.sweep.running.start_command", lambda config: command)
    lines = io.StringIO()
    with SweepProgress(2, Console(file=lines, width=200)) as progress:
        assert run_points(folder, points, progress, stops_at_failure=False) == code
    assert f"seed=0: {said}" in lines.getvalue()
    assert "seed=1" not in lines.getvalue()
    # As a task of an array: the batch script queues it again only where it was stopped.
    assert main(["sweep", "--folder", str(folder.path), "--point", "0"]) == ends
    assert folder.exit_code("seed=0") == ends


def test_a_start_that_is_turned_away_does_not_say_how_the_other_ended(listed, monkeypatch):
    folder, _ = listed
    monkeypatch.setattr("launcher.sweep.running.start_command", lambda config: [sys.executable, "-c", "exit(2)"])
    folder.run("seed=0").path.mkdir()
    folder.write_outcome("seed=0", 0, 3.0)
    with stop_requests() as request, RunLock(folder.run("seed=0").path) as lock:
        lock.take()
        assert run_point(folder, "seed=0", request, None) == 2
        assert folder.exit_code("seed=0") == 0
        lock.release()
        assert run_point(folder, "seed=0", request, None) == 2
        assert folder.exit_code("seed=0") == 2
