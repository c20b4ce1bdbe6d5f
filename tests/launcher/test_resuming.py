"""Does a start continue from the newest good checkpoint, say what it passes over, and keep what it should?"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.checkpointing import RunCheckpoints
from launcher.resuming import CheckpointWarning, choose_start, clear_interrupted
from launcher.run_folder import RunFolder
from models.word_problems import write_word_problems
from sparse_zero.checkpoint.checkpoint import read_checkpoint, write_snapshot
from sparse_zero.checkpoint.folders import MANIFEST
from sparse_zero.errors import InputError
from tests.launcher.test_run_folder import make, steps_in
from tests.launcher.test_train import rows, run, worker, write_config
from tests.models.tiny import write_tiny_llama
from tests.sparse_zero.test_checkpoint_writer import snapshot


def write(folder: Path, *steps: int) -> RunFolder:
    """Real checkpoints of a run."""
    run_folder = RunFolder(folder)
    for step in steps:
        write_snapshot(snapshot(step), run_folder.checkpoint(step))
    return run_folder


def start(folder: RunFolder, *overrides: str) -> int | None:
    """The step that a start continues from."""
    found = choose_start(folder, make(folder.path, *overrides))
    return None if found is None else int(found.extra["step"])


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped byte": (lambda folder: flip(folder / "masters.safetensors"), "masters.safetensors does not have"),
    "cut off": (lambda folder: truncate(folder / "moments.safetensors"), "moments.safetensors has .* is cut off"),
    "missing file": (lambda folder: (folder / "selection.safetensors").unlink(), "selection.safetensors is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    "damaged manifest": (lambda folder: (folder / MANIFEST).write_text("{"), "no valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_falls_back_and_says_it(tmp_path, damage):
    harm, says = DAMAGES[damage]
    folder = write(tmp_path, 2, 4, 6)
    assert start(folder) == 6
    harm(folder.checkpoint(6))
    with pytest.warns(CheckpointWarning, match=rf"step-000006: .*{says}.*; continuing from .*step-000004 instead"):
        assert start(folder) == 4
    harm(folder.checkpoint(4))
    with pytest.warns(CheckpointWarning) as told:
        assert start(folder) == 2
    assert ["step-00000" in str(each.message) for each in told] == [True, True]
    harm(folder.checkpoint(2))
    with pytest.raises(InputError, match=r"none of the checkpoints in .* restore one, or delete them to start anew"):
        start(folder)


def test_a_named_checkpoint_is_never_replaced(tmp_path):
    other = write(tmp_path / "other", 2, 4)
    folder = RunFolder(tmp_path / "run")
    named = f"checkpoint.resume={other.checkpoint(4)}"
    assert start(folder, named) == 4
    flip(other.checkpoint(4) / "masters.safetensors")
    with pytest.raises(InputError, match=r"step-000004.masters\.safetensors does not have the content"):
        start(folder, named)
    # Own ones continue it, and none of these is replaced by the named one.
    write(tmp_path / "run", 5)
    assert start(folder, named) == 5
    flip(folder.checkpoint(5) / "masters.safetensors")
    with pytest.raises(InputError, match="step-000005"):
        start(folder, named)


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    for extra in ({"step": "three"}, {"step": True}, {"step": -1}, {"seconds": "long"}, {"tokens": -1}):
        write_snapshot(snapshot(3, **extra), folder.checkpoint(3))
        with pytest.raises(InputError, match=r"does not tell where in a run it is .* name one that a run wrote"):
            start(folder, f"checkpoint.resume={folder.checkpoint(3)}")


def test_pointers_do_not_count(tmp_path):
    folder = write(tmp_path, 2, 4)
    (folder.checkpoints / "latest").write_text("step-000002\n")
    assert start(folder) == 4
    (folder.checkpoints / "latest").write_text("nonsense")
    assert start(folder) == 4


def test_what_a_killed_start_left_is_cleared(tmp_path):
    folder = write(tmp_path, 2, 4)
    for name in (".step-000006.9.tmp", ".step-000002.9.tmp"):
        shutil.copytree(folder.checkpoint(2), folder.checkpoints / name)
    folder.checkpoint(4).rename(folder.checkpoints / ".step-000004.9.old")
    clear_interrupted(folder)
    assert start(folder) == 4
    assert steps_in(folder) == [2, 4]
    assert not list(folder.checkpoints.glob(".*"))


def test_no_checkpoint_is_a_start_from_the_base(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(RunFolder(tmp_path)) is None
        assert start(RunFolder(tmp_path), "checkpoint.resume=never") is None


# --- what is kept -------------------------------------------------------------------------------------------


def checkpoints(folder: RunFolder, earlier: dict[str, Any] | None = None, *overrides: str) -> RunCheckpoints:
    config = make(folder.path, *overrides)
    return RunCheckpoints(config, folder, None, earlier or {}, writes=True)


@pytest.fixture
def saved(monkeypatch):
    """Snapshots without an engine: its place is taken by the number of steps."""

    def taken(engine: int, *, extra: dict[str, Any], **_: Any) -> Any:
        return snapshot(engine, **{name: value for name, value in extra.items() if name != "step"})

    monkeypatch.setattr("launcher.checkpointing.take_snapshot", taken)

    def save(saver: RunCheckpoints, *steps: int) -> None:
        for step in steps:
            saver.save(step, step, {"step": step})
        saver.wait()

    return save


def test_the_newest_and_the_best_are_kept(tmp_path, saved):
    folder, keep = RunFolder(tmp_path), ("checkpoint.keep=2", "checkpoint.keep_best=validation_loss")
    saver = checkpoints(folder, {}, *keep)
    saved(saver, 1)
    assert saver.is_best(2, 0.5)
    saved(saver, 2)
    assert not saver.is_best(3, 0.6)
    assert not saver.is_best(3, float("nan"))
    saved(saver, 3, 4, 5)
    assert steps_in(folder) == [2, 4, 5]
    assert (folder.checkpoints / "latest").read_text() == "step-000005\n"
    assert (folder.checkpoints / "best").read_text() == "step-000002\n"
    # A later start knows the best one, as long as it is there.
    told = read_checkpoint(folder.checkpoint(5)).extra
    assert told["best"] == {"step": 2, "validation_loss": 0.5}
    saver = checkpoints(folder, told, *keep)
    assert not saver.is_best(6, 0.5)
    saved(saver, 6, 7)
    assert steps_in(folder) == [2, 6, 7]
    shutil.rmtree(folder.checkpoint(2))
    saver = checkpoints(folder, told, *keep)
    assert saver.is_best(8, 0.7)
    saved(saver, 8, 9, 10)
    assert steps_in(folder) == [8, 9, 10]
    assert saver.num_saves == 3
    assert saver.stall_seconds > 0


def test_the_best_of_other_data_is_not_compared(tmp_path, saved):
    folder, keep = RunFolder(tmp_path), ("checkpoint.keep=1", "checkpoint.keep_best=validation_loss")
    saver = checkpoints(folder, {}, *keep)
    assert saver.is_best(1, 0.5)
    saved(saver, 1, 2)
    told = read_checkpoint(folder.checkpoint(2)).extra
    # Without keep_best nothing is compared, and a later start may go on.
    saver = checkpoints(folder, told, "data.validation=null")
    saved(saver, 3)
    told = read_checkpoint(folder.checkpoint(3)).extra
    assert told["best"] == {"step": 1, "validation_loss": 0.5}
    assert not checkpoints(folder, told, *keep).is_best(4, 0.6)
    with pytest.warns(UserWarning, match=r"data\.validation was .* and is 'other\.json': .*step-000001"):
        saver = checkpoints(folder, told, *keep, "data.validation=other.json")
    saved(saver, 4)
    assert steps_in(folder) == [4]
    assert not (folder.checkpoints / "best").exists()
    assert saver.is_best(5, 0.9)
    # Checkpoints of earlier versions do not say of which data.
    saved(saver, 5)
    told = {**read_checkpoint(folder.checkpoint(5)).extra, "best_of": None}
    assert not checkpoints(folder, told, *keep).is_best(6, 1.0)


def test_without_a_metric_the_newest_are_kept(tmp_path, saved):
    saver = checkpoints(RunFolder(tmp_path), {}, "checkpoint.background=false")
    assert not saver.is_best(1, 0.1)
    saved(saver, 1, 2, 3)
    assert steps_in(RunFolder(tmp_path)) == [2, 3]
    assert read_checkpoint(RunFolder(tmp_path).checkpoint(3)).extra["best"] is None
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_what_lost_its_manifest_is_set_aside_where_a_checkpoint_is_due(tmp_path, saved):
    folder = write(tmp_path, 2)
    for _ in range(2):
        (folder.checkpoint(2) / MANIFEST).unlink()
        saved(checkpoints(folder), 2)
        assert read_checkpoint(folder.checkpoint(2)).optimizer_step == 2
    assert sorted(path.name for path in folder.checkpoints.glob("damaged-*")) == [
        "damaged-step-000002.1",
        "damaged-step-000002.2",
    ]


def test_an_error_in_the_background_ends_the_next_save(tmp_path, saved, monkeypatch):
    saver = checkpoints(RunFolder(tmp_path))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_zero.checkpoint.writer.write_snapshot", full)
    saver.save(1, 1, {"step": 1})
    with pytest.raises(OSError, match="No space left"):
        saver.save(2, 2, {"step": 2})
    saver.save(3, 3, {"step": 3})
    with pytest.raises(OSError, match="No space left"), saver:
        pass


def test_the_resolved_config_goes_along(tmp_path, monkeypatch):
    given: dict[str, Any] = {}

    def taken(engine: int, **settings: Any) -> Any:
        given.update(settings)

    monkeypatch.setattr("launcher.checkpointing.take_snapshot", taken)
    checkpoints(RunFolder(tmp_path)).save(1, 1, {"step": 1})
    assert given["config"]["training"]["steps"] == 9
    assert given["random_states"] is False


# --- a whole run --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(tmp_path):
    write_tiny_llama(tmp_path / "model", tie=True)
    write_word_problems(tmp_path / "data", 40, 8, 10, seed=0)
    settings: dict[str, Any] = {"output__evaluate": False, "output__merged": False, "training__validation_every": 2}
    settings |= {"checkpoint__every": 2, "checkpoint__keep_best": "validation_loss", "training__steps": 6}
    config = write_config(tmp_path, tmp_path, **settings)
    run(worker(config), tmp_path)
    folder = RunFolder(tmp_path / "run")
    expected = read_checkpoint(folder.checkpoint(6))
    state = expected.read_state()
    assert expected.config == yaml.safe_load(folder.config.read_text())
    best = min(rows(tmp_path, "validation"), key=lambda row: row["loss"])
    assert (folder.checkpoints / "best").read_text() == f"step-{best['step']:06d}\n"
    assert expected.extra["best"] == {"step": best["step"], "validation_loss": best["loss"]}
    folder.summary.unlink()
    # Tensors that were read are maps of the file: another one takes its place.
    copied = tmp_path / "moments.safetensors"
    shutil.copy(folder.checkpoint(6) / copied.name, copied)
    flip(copied)
    copied.replace(folder.checkpoint(6) / copied.name)
    output = run(worker(config), tmp_path)
    assert "sparse-zero: warning: checkpoint step-000006: " in output
    assert f"continuing from {folder.checkpoint(4)} after step 4" in output
    again = read_checkpoint(folder.checkpoint(6)).read_state()
    assert state.masters.keys() == again.masters.keys()
    assert all(state.masters[name].equal(again.masters[name]) for name in state.masters)
    assert all(held[name].equal(again.moments[key][name]) for key, held in state.moments.items() for name in held)
