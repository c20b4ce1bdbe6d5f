"""Does `sparse-zero doctor` on this one machine, and the look before a launch, say what is wrong, and leave nothing?"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.__main__ import main
from launcher.config import load_config
from launcher.preflight import node_probe, rendezvous_probe
from launcher.preflight.asking import Talks
from launcher.preflight.examining import ask
from launcher.preflight.forecast_beside import ForecastBeside
from launcher.preflight.wanted import wanted_of
from launcher.process_ranks import free_port
from launcher.starting.nodes import Node
from tests.launcher.test_train import environment, write_config

HERE = Node("this machine", 1)


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """(exit code, standard output) of the command, in the folder of the test."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def ask(*options: str) -> tuple[int, str]:
        code = main(["doctor", "--config", "run.yaml", "--no-build", *options])
        return code, capfd.readouterr().out

    return ask


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_all_is_well(base: Path, tmp_path: Path) -> None:
    """The command as a user types it."""
    write_config(base, tmp_path)
    before = listing(tmp_path)
    command = [sys.executable, "-m", "launcher", "doctor", "--config", "run.yaml", "--no-build"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    code, output = done.returncode, done.stdout
    assert code == 0, output + done.stderr
    table = output.partition("\nwarn ")[0]  # This machine may have little of something.
    assert max(map(len, table.splitlines())) <= 80
    for check in ("reachable", "versions", "code", "model", "data", "output", "disk", "open files", "port", "memory"):
        assert any(line.split("  ")[0].strip() == check for line in output.splitlines()), check
    assert "FAIL" not in output
    assert listing(tmp_path) == before


def test_what_is_wrong_is_named_with_its_remedy(
    base: Path, tmp_path: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache $(touch hacked)"
    (cache / "cpu_adam").mkdir(parents=True)
    lock = cache / "cpu_adam" / "lock"
    lock.touch()
    config = write_config(
        base, tmp_path, data__train=str(tmp_path / "none.json"), output__folder=str(base / "model" / "config.json")
    )
    assert config.is_file()
    before = listing(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    code, output = doctor("--json")
    assert listing(tmp_path) == before
    told = json.loads(output)
    assert (code, told["ok"]) == (2, False)
    failed = {each["check"]: each for each in told["findings"] if each["status"] == "fail"}
    assert set(failed) == {"data", "output", "build cache"}
    assert "none.json is not there" in failed["data"]["what"]
    assert f"rm '{lock}'" in failed["build cache"]["remedy"]
    # A build that goes on is no reason to fail.
    with lock.open():
        code, output = doctor(
            "--json", f"--data.train={base / 'data' / 'train.json'}", f"--output.folder={tmp_path / 'run'}"
        )
    assert code == 0
    held = [each["what"] for each in json.loads(output)["findings"] if each["check"] == "build cache"]
    assert f"is held by {Path(sys.executable).resolve().name}" in held[0] or "is held by py" in held[0]


def test_a_run_that_cannot_fit(base: Path, tmp_path: Path, doctor: Any) -> None:
    write_config(base, tmp_path)
    code, output = doctor( "--training.micro_batch_size=100000", "--training.global_batch_size=200000", "--data.max_length=2048", "--data.batching=pad")  # fmt: skip
    assert code == 2
    assert "FAIL this machine: memory: 2 ranks take about" in output
    assert "sparse-zero plan" in output


def test_a_launch_looks_first(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(base, tmp_path, data__train=str(tmp_path / "none.json"))
    before = listing(tmp_path)
    since = time.monotonic()
    assert main(["launch", "--config", str(config)]) == 2
    assert time.monotonic() - since < 30.0
    *lines, last = capfd.readouterr().err.splitlines()
    assert "sparse-zero: FAIL this machine: data: data.train" in "\n".join(lines)
    assert last.startswith("sparse-zero: error: before the start, data failed on this machine (data.train ")
    assert "cluster.preflight" in last
    # A dry run starts nothing, so it looks at nothing.
    assert main(["launch", "--config", str(config), "--dry-run"]) == 0
    assert "none.json" not in "".join(capfd.readouterr())
    assert listing(tmp_path) == before


def test_a_launch_warns_of_what_cannot_fit(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """While the ranks start; nothing of it is left when the launch ends."""
    config = load_config(
        write_config(base, tmp_path), ["--training.micro_batch_size=20000", "--training.global_batch_size=40000"]
    )
    wanted = wanted_of(config, [HERE], ranks_here=2, world_size=2, master_port=1, environment={})
    answers = ask(wanted, seconds=30.0, waits_for_all=True)
    with ForecastBeside(wanted, answers):
        said, deadline = "", time.monotonic() + 60
        while "\n" not in said and time.monotonic() < deadline:
            said += capfd.readouterr().err
            time.sleep(0.05)
    assert "warn this machine: memory: 1 rank takes about" in said
    # A launch that ends before does not wait for it.
    since = time.monotonic()
    with ForecastBeside(wanted, answers):
        (child,) = [each for each in psutil.Process().children() if "forecast_beside" in " ".join(each.cmdline())]
    assert time.monotonic() - since < 1.0
    assert not child.is_running()


def question(folder: Path, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "python_path": [], "environment": {}, "names": [], "port": None, "output": str(folder / "run"), "mark": ".mark",
        "model": {"name": str(folder), "gguf_file": None, "tokenizer": None}, "files": {}, "operators": [], "seconds": 5.0,
    }  # fmt: skip
    return {**usual, **changes}


@pytest.mark.parametrize("way", ["end", "end of input", "killed by SIGTERM"])
def test_the_mark_is_gone_whatever_ends_the_probe(way: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(Path(node_probe.__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question(tmp_path)).encode() + b"\n")
        process.stdin.flush()
        facts = json.loads(process.stdout.readline())
        assert facts["output"]["existing"] == str(tmp_path)
        assert os.listdir(tmp_path) == [".mark"]
        if way == "end":
            process.stdin.write(b'{"do": "end"}\n')
        elif way == "killed by SIGTERM":
            process.terminate()
        process.stdin.close()
        process.wait(10)
    assert os.listdir(tmp_path) == []


def test_the_probe_imports_nothing_heavy(tmp_path: Path) -> None:
    """A node without torch is told of, and a look takes no longer than it must."""
    code = (
        f"import runpy, sys; sys.argv[0] = 'x'; runpy.run_path({str(Path(node_probe.__file__))!r}); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"torch", "numpy", "launcher", "sparse_zero", "deepspeed"} & set(loaded.stdout.split())


def test_a_section_that_hangs_is_told_by_name(tmp_path: Path) -> None:
    """A pipe that nobody writes to, in place of a network file system that does not answer."""
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "train.json")
    files = {"data.train": {"path": str(tmp_path / "train.json"), "split": "train"}}
    with Talks() as talks:
        since = time.monotonic()
        talk = talks.start(HERE, None, Path(node_probe.__file__), question(tmp_path, files=files, seconds=1.0))
        facts = talk.answer(since + 10.0)
    assert facts is not None
    assert time.monotonic() - since < 5.0
    assert facts["data.train"] == {"error": "no answer within 1 seconds"}
    assert facts["versions"]["python"]
    assert not list(tmp_path.glob(".mark"))


@pytest.mark.parametrize("missing", [False, True])
def test_ranks_meet_or_say_who_is_missing(missing: bool, tmp_path: Path) -> None:
    names = ["first", "second"]
    asked = {
        "names": names, "address": "127.0.0.1", "port": free_port(), "backend": "gloo", "num_bytes": 2**20,
        "environment": {"GLOO_SOCKET_IFNAME": "lo"}, "python_path": [], "seconds": 8.0 if missing else 40.0,
    }  # fmt: skip
    script = Path(rendezvous_probe.__file__)
    deadline = time.monotonic() + 45.0
    with Talks() as talks:
        for rank in range(1 if missing else 2):
            talks.start(HERE, None, script, {**asked, "rank": rank})
        told: list[list[dict[str, Any]]] = []
        for talk in talks.all:
            told.append([])
            while (line := talk.answer(deadline)) is not None:
                told[-1].append(line)
    if missing:
        assert [line["stage"] for line in told[0]] == ["started", "connected", "met"]
        assert told[0][-1]["missing"] == ["second"]
        return
    for lines in told:
        assert [line["stage"] for line in lines] == ["started", "connected", "met", "joined", "done"]
        assert lines[-2]["num_ranks"] == 2
        assert lines[-1]["bus_bytes_per_second"] > 1e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_operators_are_built_once_and_an_interrupted_build_leaves_no_lock(base: Path, tmp_path: Path) -> None:
    write_config(base, tmp_path)
    cache = tmp_path / "cache"
    variables = {**environment(), "TORCH_EXTENSIONS_DIR": str(cache)}
    command = [sys.executable, "-m", "launcher", "doctor", "--config", "run.yaml", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL) as process:
        lock, deadline = cache / "deepspeed_shm_comm" / "lock", time.monotonic() + 100
        while not lock.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lock.exists()
        time.sleep(1.0)  # The compilers run.
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not lock.exists()
    assert not psutil.wait_procs(started, timeout=10)[1]

    def cache_of(*options: str) -> dict[str, Any]:
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=700, check=True
        )
        (found,) = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "build cache"]
        return dict(found)

    assert cache_of("--no-build")["status"] == "warn"
    assert cache_of()["what"].startswith("built deepspeed_shm_comm in ")
    assert cache_of()["what"].startswith("nothing is to be built")
