"""A disk that is full or read-only, and checkpoints that are damaged: named, nothing else is lost, and the run goes on."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest
import torch
import yaml

import sparse_zero as sz
from launcher.faults import describe_disk_error, lost_a_rank
from scripts import tiny_run as tiny
from sparse_zero.checkpoint.folders import new_folder
from sparse_zero.files import write_safetensors
from tests.launcher.test_faults import codes_at_the_end

SETTINGS = tiny.RunSettings(steps=10, every=2, hidden=64)
KIND = tiny.Kind(stage=1, placement="inplace", reselects=False, reports=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.write_base(folder, SETTINGS)
    return folder


@contextmanager
def tmpfs(folder, options):
    """A small file system of its own at ``folder``, as only root can make one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_on_a_full_disk_all_ranks_end_the_checkpoints_stay_and_with_more_room_the_run_goes_on(base, tmp_path):
    run_folder = tmp_path / "run"
    config = tiny.write_config(base, tmp_path, KIND, SETTINGS)
    # Room for two or three checkpoints of 370 kilobytes, and a part of the next.
    with tmpfs(run_folder, "size=1300k"):
        started = tiny.Start(config, tmp_path, "--checkpoint.keep=10")
        # The other rank is told, or (where the row of metrics is what has no room) loses the first one.
        assert codes_at_the_end(started) in ([1, 1], [1, 75]), started.output()
        said = started.logs[0].read_text()
        assert said.count("sparse-zero: error: ") == 1
        assert f"writing to {run_folder}" in said
        assert "no space is left" in said
        assert "B free in" in said
        assert "Traceback" not in said
        newest = tiny.newest_checkpoint(run_folder)
        assert newest >= 2
        for step in range(2, newest + 1, 2):
            assert sz.read_checkpoint(run_folder / f"checkpoints/step-{step:06d}").extra["step"] == step
        assert tiny.pointer(run_folder) == newest
        assert not tiny.leftovers(run_folder)
        subprocess.run(["mount", "-o", "remount,size=64m", str(run_folder)], check=True)
        started = tiny.Start(config, tmp_path, "--checkpoint.keep=10")
        assert codes_at_the_end(started) == [0, 0], started.output()
        assert started.continued_after == newest
        lines = (run_folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, SETTINGS.steps + 1))


def test_a_read_only_place_is_refused_at_the_start_or_named_at_the_first_save(base, tmp_path):
    run_folder = tmp_path / "run"
    config = tiny.write_config(base, tmp_path, KIND, SETTINGS)
    with tmpfs(run_folder, "size=1m,ro"):
        started = tiny.Start(config, tmp_path)
        assert codes_at_the_end(started) == [2, 2], started.output()
        said = started.output()
        assert said.count("sparse-zero: error: ") == 1
        assert f"{run_folder} is not writable" in said
    (run_folder / "checkpoints").mkdir()
    with tmpfs(run_folder / "checkpoints", "size=1m,ro"):
        started = tiny.Start(config, tmp_path)
        assert codes_at_the_end(started) == [1, 1], started.output()
        said = started.output()
        assert said.count("sparse-zero: error: ") == 1
        assert f"writing to {run_folder / 'checkpoints'}" in said
        assert "the file system is read-only" in said
        assert "Traceback" not in said


@contextmanager
def largest_file(num_bytes):
    """What this process may write in one file; Python ignores the signal, and the call fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writes", ["tensors", "text"])
def test_what_cannot_be_written_whole_is_not_there_and_the_error_says_where_and_how_much_is_free(writes, tmp_path):
    """Without root: a limit of the process instead of a full disk."""
    with pytest.raises(Exception) as raised, largest_file(1 << 16), new_folder(tmp_path / "step-000002") as temporary:
        if writes == "tensors":
            write_safetensors(temporary / "masters.safetensors", {"x": torch.ones(1 << 16)}, {})
        else:
            (temporary / "notes").write_bytes(bytes(1 << 18))
    assert not list(tmp_path.iterdir())
    told = describe_disk_error(raised.value, tmp_path / "not" / "made")
    assert told is not None
    assert str(tmp_path) in told
    assert "a file would be larger than this process may write" in told
    assert f" free in {tmp_path})" in told or "iB free in " in told


def test_errors_that_are_not_the_disks_are_not_explained_as_such(tmp_path):
    assert describe_disk_error(RuntimeError("no space left in the list"), tmp_path) is None
    assert describe_disk_error(FileNotFoundError(errno.ENOENT, "No such file", "x"), tmp_path) is None
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "run" / "x"))
        except OSError as error:
            raise RuntimeError("the write failed") from error
    except RuntimeError as error:
        told = describe_disk_error(error, tmp_path)
    assert told is not None
    assert told.startswith(f"writing to {tmp_path / 'run' / 'x'} failed: the user's quota is used up (")
    assert not lost_a_rank(RuntimeError("shapes do not match"))
    assert lost_a_rank(torch.distributed.DistNetworkError("the store is gone"))


# --- damaged checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run with all its checkpoints; the folder may be copied."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.write_config(base, folder, KIND, SETTINGS)
    started = tiny.Start(config, folder, "--checkpoint.keep=10")
    assert codes_at_the_end(started) == [0, 0], started.output()
    return folder, config


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def unfinished(trained, folder):
    """The run as if it had been killed after its last checkpoint."""
    shutil.copytree(trained[0] / "run", folder / "run")
    for name in ("adapter", "merged"):
        shutil.rmtree(folder / "run" / name)
    (folder / "run" / "summary.json").unlink()
    return folder / "run"


def test_auto_passes_over_damaged_checkpoints_and_says_which_and_why(base, trained, tmp_path):
    run_folder = unfinished(trained, tmp_path)
    config = tiny.write_config(base, tmp_path, KIND, SETTINGS)
    checkpoints = run_folder / "checkpoints"
    newest = checkpoints / "step-000010"
    (newest / "moments.safetensors").write_bytes((newest / "moments.safetensors").read_bytes()[:-40])
    flip(checkpoints / "step-000008" / "masters.safetensors")
    (checkpoints / "step-000006" / "selection.safetensors").unlink()
    # A checkpoint that is named is not replaced by another.
    started = tiny.Start(config, tmp_path, f"--checkpoint.resume={newest}")
    assert codes_at_the_end(started) == [2, 2], started.output()
    assert started.output().count("sparse-zero: error: ") == 1
    assert "moments.safetensors" in started.output()
    started = tiny.Start(config, tmp_path, "--checkpoint.keep=10")
    assert codes_at_the_end(started) == [0, 0], started.output()
    said = started.logs[0].read_text()
    assert started.continued_after == 4
    for step, name, what in (
        (10, "moments.safetensors", "is cut off"),
        (8, "masters.safetensors", "is damaged"),
        (6, "selection.safetensors", "is missing"),
    ):
        line = next(line for line in said.splitlines() if f"warning: checkpoint step-{step:06d}" in line)
        assert name in line
        assert what in line
        assert "continuing from" in line
        assert "step-000004" in line
    assert "Traceback" not in started.output()
    # It comes to the same end, and what was damaged has been written anew.
    assert tiny.difference(tiny.result_of(trained[0] / "run"), run_folder) is None
    for step in (6, 8, 10):
        assert sz.read_checkpoint(checkpoints / f"step-{step:06d}").extra["step"] == step


@pytest.mark.slow
def test_another_base_and_another_selection_are_refused_by_name(base, trained, tmp_path):
    run_folder = unfinished(trained, tmp_path)
    config = tiny.write_config(base, tmp_path, KIND, SETTINGS)
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    shutil.copytree(base / "model", other / "model")
    flip(other / "model" / "model.safetensors")
    checkpoint = run_folder / "checkpoints" / "step-000010"
    selection = sz.read_checkpoint(checkpoint).selection
    weights = dict(list(selection.weights.items())[:-1])
    sz.Selection(weights=weights, metadata=selection.metadata).save(tmp_path / "fewer.safetensors")
    settings = yaml.safe_load(config.read_text())
    settings["selection"] = {"file": str(tmp_path / "fewer.safetensors")}
    selecting = tmp_path / "selecting.yaml"
    selecting.write_text(yaml.safe_dump(settings))
    for path, overrides, expected in (
        # The run's own folder, where auto finds the checkpoints, and another one that is told to continue from there.
        (config, [f"--model.name_or_path={other / 'model'}"], "model.name_or_path was"),
        (
            config,
            [
                f"--model.name_or_path={other / 'model'}",
                f"--output.folder={tmp_path / 'new'}",
                f"--checkpoint.resume={checkpoint}",
            ],
            "was trained on the base model (",
        ),
        (
            selecting,
            [f"--output.folder={tmp_path / 'new'}", f"--checkpoint.resume={checkpoint}"],
            "has another selection than selection.file",
        ),
    ):
        started = tiny.Start(path, tmp_path, *overrides)
        assert codes_at_the_end(started) == [2, 2], started.output()
        assert expected in started.output()
        assert started.output().count("sparse-zero: error: ") == 1, started.output()
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_report_gets_it_at_the_next_start(trained, tmp_path):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    config = tmp_path / "run.yaml"
    config.write_text(trained[1].read_text())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    overrides = [f"--output.folder={tmp_path / 'run'}", "--output.report=true"]
    page = tmp_path / "run" / "report" / "report.html"
    for _ in range(2):
        started = tiny.Start(config, tmp_path, *overrides)
        assert codes_at_the_end(started) == [0, 0], started.output()
        assert "complete already" in started.output()
        before.setdefault(page, page.stat().st_mtime_ns)
    changed = [path for path, changed in before.items() if path.is_file() and path.stat().st_mtime_ns != changed]
    assert not changed
