"""Does `sparse-zero doctor` on this one machine, and the look before a launch, say what is wrong, and leave nothing?"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.__main__ import main
from launcher.commands.doctor import _wanted
from launcher.config import load_config, resolved_yaml
from launcher.preflight import node_probe, rendezvous_probe
from launcher.preflight.asking import Talks, ask_nodes
from launcher.preflight.before_launch import check_before_launch
from launcher.preflight.examining import ask, findings_of
from launcher.preflight.forecast_beside import ForecastBeside
from launcher.preflight.reach_checks import check_names
from launcher.preflight.wanted import Wanted, wanted_of
from launcher.process_ranks import free_port
from launcher.run_folder import RunFolder, RunLock
from launcher.starting.guards import Guard
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
    lock = cache / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 700.0,) * 2)  # Longer ago than any build takes.
    # Of what this run does not need, and of another project.
    for other in ("cpu_adam/lock", "py311_cpu/deepspeed_shm_comm/lock"):
        (cache / other).parent.mkdir(parents=True)
        (cache / other).touch()
        os.utime(cache / other, (0.0, 0.0))
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
    assert "cpu_adam" not in output
    assert "py311" not in output
    # A build that goes on is no reason to fail.
    with lock.open():
        code, output = doctor(
            "--json", f"--data.train={base / 'data' / 'train.json'}", f"--output.folder={tmp_path / 'run'}"
        )
    assert code == 0
    held = [each["what"] for each in json.loads(output)["findings"] if each["check"] == "build cache"]
    assert f"is held by {Path(sys.executable).resolve().name}" in held[0] or "is held by py" in held[0]


def test_nodes_that_a_launch_leaves_out_are_named(base: Path, tmp_path: Path) -> None:
    hosts = "--cluster.hosts=[a slots=2, b slots=2]"
    config = load_config(write_config(base, tmp_path), ["--cluster.launcher=pdsh", hosts])
    wanted, left = _wanted(config)
    assert wanted.world_size == 2
    assert left == "1 of 2 nodes of cluster.hosts are used (cluster.num_nodes is 1); standing by: b"


def test_a_run_that_cannot_fit(base: Path, tmp_path: Path, doctor: Any) -> None:
    write_config(base, tmp_path)
    code, output = doctor( "--training.micro_batch_size=100000", "--training.global_batch_size=200000", "--data.max_length=2048", "--data.batching=pad")  # fmt: skip
    assert code == 2
    assert "FAIL this machine: memory: 2 ranks take about" in output
    assert "sparse-zero plan" in output


@pytest.mark.parametrize("tool", ["echo '0, 550.1, 81559, 40000, H100'", "echo 'no driver' >&2; exit 9"])
def test_gpu_tools_that_no_rank_uses(
    tool: str, base: Path, tmp_path: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that CUDA_VISIBLE_DEVICES hides, a driver that is not there: ranks compute on the CPU all the same."""
    write_config(base, tmp_path)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{tool}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, output = doctor("--json")
    assert code == 0, output
    (found,) = [each for each in json.loads(output)["findings"] if each["check"] == "gpus"]
    assert (found["status"], found["what"]) == ("ok", "torch has no GPU here: ranks compute on the CPU")


def test_the_launchers_command_for_cpus_includes_no_gpus(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["launch", "--config", str(write_config(base, tmp_path)), "--dry-run"]) == 0
    output = capfd.readouterr().out
    assert "--num_gpus" in output
    assert "--include" not in output


def test_a_folder_of_another_run_or_in_use(base: Path, tmp_path: Path, doctor: Any) -> None:
    config = load_config(write_config(base, tmp_path), [])
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(resolved_yaml(config))
    folder.summary.write_text("{}")
    before = listing(tmp_path)

    def output_of(*options: str) -> tuple[int, list[str]]:
        code, output = doctor("--json", "--no-network", *options)
        found = [each for each in json.loads(output)["findings"] if each["check"] == "output"]
        return code, [each["what"] for each in found if each["status"] == "fail"]

    assert output_of() == (0, [])
    code, (what,) = output_of("--training.learning_rate=0.5")
    assert code == 2
    assert "holds another run (training.learning_rate was 0.0002 and is now 0.5)" in what
    with RunLock(folder.path) as lock:
        lock.take()
        code, (what,) = output_of()
    assert code == 2
    assert "is in use by another start" in what
    assert listing(tmp_path) == before


def test_a_launch_warns_of_a_lock(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds it may be where nobody looks."""
    lock = tmp_path / "cache" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 700.0,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    config = load_config(write_config(base, tmp_path), [])
    wanted = wanted_of(config, [HERE], ranks_here=2, world_size=2, master_port=1, environment={}, devices=())
    check_before_launch(wanted, ["this machine"])
    findings = findings_of(wanted, ask(wanted, seconds=30.0, waits_for_all=True))
    assert ("build cache", "fail") in {(each.check, each.status) for each in findings}


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
        found = psutil.process_iter(["ppid", "cmdline"])
        mine = [each for each in found if each.info["ppid"] == os.getpid()]
        (child,) = [each for each in mine if "forecast_beside" in " ".join(each.info["cmdline"] or ())]
    assert time.monotonic() - since < 1.0
    assert not child.is_running()


def question(folder: Path, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "folders": {}, "python_path": [], "environment": {}, "names": [], "port": None, "output": str(folder / "run"), "mark": ".mark",
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
        assert process.stdout.readline() == b"\n"  # Ends what a login shell may have begun.
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


def test_what_a_login_shell_prints_is_no_answer(tmp_path: Path) -> None:
    """Text without a line end right before the answer, and lines that are JSON."""

    def reach(node: str, command: Sequence[str]) -> list[str]:
        says = 'printf \'{}\\n{"gpus": 1}\\n[1]\\nWelcome to %s\' $0; exec "$@"'
        return ["/bin/sh", "-c", says, node, *command]

    answered = ask_nodes({HERE: question(tmp_path)}, reach, 20.0, waits_for_all=True)
    assert not answered.silent
    facts = answered.facts[HERE.name]
    assert facts["output"]["existing"] == str(tmp_path)
    assert set(answered.clocks) == {HERE.name}


def test_a_guard_is_heard_behind_a_login_shell(tmp_path: Path) -> None:
    def reach(node: str, command: Sequence[str]) -> list[str]:
        return ["/bin/sh", "-c", 'printf Welcome; exec "$@"', node, *command]

    setup: dict[str, Any] = {
        "record": str(tmp_path / "record"), "before": [], "checkpoints": str(tmp_path), "silence": None, "files": {},
        "logs": str(tmp_path / "logs"),
    }  # fmt: skip
    guard = Guard(HERE, reach, setup)
    try:
        deadline = time.monotonic() + 20
        while not guard.report and time.monotonic() < deadline:
            time.sleep(0.02)
        # Only the first line has them.
        own = {each.address for every in psutil.net_if_addrs().values() for each in every}
        assert guard.addresses or own <= {"127.0.0.1", "::1", "00:00:00:00:00:00"}
        assert set(guard.addresses.values()) <= own
        assert guard.report is not None
        assert guard.report["ranks"] == {}
    finally:
        guard.send_line("end")
        guard.close(time.monotonic() + 20)


def test_locks_are_those_of_this_torch_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    used = Path(_get_build_directory("cpu_adam", verbose=False))
    folders = [used, tmp_path / "torch_extensions" / "py27_cpu" / "cpu_adam", used.parent / "another_project"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    asked = question(tmp_path, operators=["cpu_adam", "cpu_lion"])
    with Talks() as talks:
        facts = talks.start(HERE, None, Path(node_probe.__file__), asked).answer(time.monotonic() + 20.0)
    assert facts is not None
    (lock,) = facts["build_cache"]["locks"]
    assert (lock["operator"], lock["path"], lock["is_sure"]) == ("cpu_adam", str(used / "lock"), True)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_holder_of_another_user_is_not_taken_for_none(tmp_path: Path) -> None:
    """Into the process of the lock's owner the asking user cannot look."""
    script = str(Path(node_probe.__file__))
    code = (
        f"import runpy, json; from pathlib import Path; m = runpy.run_path({script!r}); "
        "print(json.dumps([[each['holder'], each['is_sure']] for each in m['_locks'](Path('.'), ['theirs', 'own'])]))"
    )
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # All users may enter it, once they are let.
        os.chmod(folder, 0o755)
        for name in ("theirs", "own"):
            Path(folder, name).mkdir()
            Path(folder, name, "lock").touch()
        os.chown(Path(folder, "own", "lock"), 65534, 65534)
        with Path(folder, "theirs", "lock").open():
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if "Permission denied" in done.stderr or "ermissionError" in done.stderr:
        pytest.skip("another user cannot read this environment")
    assert json.loads(done.stdout) == [["", False], ["", True]], done.stderr


def test_what_a_run_replaces_is_counted(tmp_path: Path) -> None:
    for name, size in {"checkpoints/step-1/a": 1000, "merged/b": 200, "logs/c": 30, "d": 4}.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"x" * size)
    with Talks() as talks:
        facts = talks.start(HERE, None, Path(node_probe.__file__), question(tmp_path)).answer(time.monotonic() + 20.0)
    assert facts is not None
    assert facts["output"]["held_bytes"] == 1200


def _can_unshare() -> bool:
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return os.getuid() == 0 and tried.returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None or not _can_unshare(), reason="needs namespaces")
def test_the_limit_of_a_job_is_the_nodes_memory(tmp_path: Path) -> None:
    """As Slurm sets it, on a group above the probe's own."""
    groups, own = tmp_path / "groups", tmp_path / "own"
    (groups / "job_7" / "step_0").mkdir(parents=True)
    for name, limit in {"memory.max": "max", "job_7/memory.max": "300000000", "job_7/step_0/memory.max": "max"}.items():
        (groups / name).write_text(f"{limit}\n")
    own.write_text("0::/job_7/step_0\n")

    def reach(node: str, command: Sequence[str]) -> list[str]:
        mounts = 'mount --bind "$0" /sys/fs/cgroup && mount --bind "$1" /proc/$$/cgroup && shift && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mounts, str(groups), str(own), *command]

    answered = ask_nodes({HERE: question(tmp_path)}, reach, 20.0, waits_for_all=True)
    if HERE.name in answered.silent and "mount" in answered.silent[HERE.name].said:
        pytest.skip(f"needs mounts: {answered.silent[HERE.name].said}")
    memory = answered.facts[HERE.name]["memory"]
    assert memory["total_bytes"] == 300000000
    assert memory["available_bytes"] <= 300000000


@pytest.mark.skipif(shutil.which("unshare") is None or not _can_unshare(), reason="needs namespaces")
def test_a_hosts_file_as_debian_writes_it(tmp_path: Path) -> None:
    """The name of the machine itself is one of its loopback; the other node's is not."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 debian.example\n10.9.9.9 other.example\n")
    first, other = Node("debian.example", 1), Node("other.example", 1)

    def reach(node: str, command: Sequence[str]) -> list[str]:
        mounts = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mounts, str(hosts), *command]

    asked = question(tmp_path, names=[first.name, other.name])
    answered = ask_nodes({first: asked}, reach, 20.0, waits_for_all=True)
    wanted = Wanted(
        config=load_config(write_config(tmp_path, tmp_path), []),
        nodes=(first, other),
        world_size=2,
        master_address=first.name,
        master_port=1,
    )
    (found,) = check_names(wanted, answered)
    assert found.what == "by its own name debian.example it means 127.0.1.1, which others cannot reach"
    assert found.status == "warn"


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
