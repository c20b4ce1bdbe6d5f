"""Are snapshots written beside training without losing a checkpoint, an error, or the old one?"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from sparse_zero.checkpoint import checkpoint as checkpoint_module
from sparse_zero.checkpoint.checkpoint import Snapshot, read_checkpoint, take_snapshot, write_snapshot
from sparse_zero.checkpoint.folders import MANIFEST, clear_leftovers, new_folder, remove_folder
from sparse_zero.checkpoint.random_states import gather_random_states, states_of_rank
from sparse_zero.checkpoint.writer import CheckpointWriter
from sparse_zero.errors import InputError
from sparse_zero.integrations.loop_state import PlainEngine
from sparse_zero.layers.retired import Retired
from sparse_zero.zero.state import TrainingState

ROWS = 3


def snapshot(taken: int = 1, fill: float = 1.0, **extra: Any) -> Snapshot:
    """Of three rows of one weight, AdamW, after steps that are ``taken``."""
    selection = sz.Selection({"layer.weight": sz.WeightSelection(shape=(8, 16), rows=range(ROWS))})
    name, numbers = "layer.values_row", torch.full((ROWS * 16,), fill)
    moments = {"exp_avg": {name: numbers / 2}, "exp_avg_sq": {name: numbers / 4}}
    return Snapshot(
        selection=selection,
        retired=Retired(placement="inplace"),
        state=TrainingState(masters={name: numbers}, moments=moments, step=taken),
        random_states={},
        base_entries={"layer.weight": {"row": torch.zeros(ROWS * 16)}},
        fields={
            "optimizer": {"name": "adamw", "states": sorted(moments)},
            "placement": "inplace",
            "base": None,
            "config": None,
            "extra": {"step": taken, **extra},
        },
    )


def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes wait until it is set."""
    opened, real = threading.Event(), write_snapshot

    def waiting(*arguments: Any) -> None:
        assert opened.wait(30)
        real(*arguments)

    monkeypatch.setattr("sparse_zero.checkpoint.writer.write_snapshot", waiting)
    return opened


def test_a_write_goes_on_in_the_background_and_the_next_one_waits(tmp_path, monkeypatch):
    opened, told = gate(monkeypatch), []
    writer = CheckpointWriter()
    writer.submit(snapshot(1), tmp_path / "one", lambda: told.append((tmp_path / "one" / MANIFEST).is_file()))
    assert writer.is_writing
    assert not (tmp_path / "one").exists()
    threading.Timer(0.2, opened.set).start()
    started = time.monotonic()
    writer.submit(snapshot(2), tmp_path / "two")
    assert time.monotonic() - started > 0.15
    assert told == [True]
    assert read_checkpoint(tmp_path / "one").optimizer_step == 1
    writer.wait()
    assert not writer.is_writing
    assert read_checkpoint(tmp_path / "two").extra == {"step": 2}
    assert not list(tmp_path.glob(".*"))


def test_the_foreground_writes_before_it_returns(tmp_path):
    CheckpointWriter(background=False).submit(snapshot(), tmp_path / "one")
    assert read_checkpoint(tmp_path / "one").optimizer_step == 1


@pytest.mark.parametrize("asks", ["submit", "wait", "check", "with"])
def test_an_error_of_the_thread_is_raised_once_by_whoever_asks(tmp_path, asks):
    (tmp_path / "one").write_text("no folder")
    writer, told = CheckpointWriter(), []
    writer.submit(snapshot(), tmp_path / "one", lambda: told.append(1))
    while writer.is_writing:
        time.sleep(0.01)
    assert writer.has_failed
    assert not told
    with pytest.raises(InputError, match="was not written by this program"):
        if asks == "submit":
            writer.submit(snapshot(), tmp_path / "two")
        elif asks == "with":
            with writer:
                pass
        else:
            getattr(writer, asks)()
    assert not (tmp_path / "two").exists()
    assert not writer.has_failed
    writer.wait()


def test_an_error_of_the_block_is_not_hidden(tmp_path):
    (tmp_path / "one").write_text("no folder")
    with pytest.raises(KeyError, match="the block") as raised, CheckpointWriter() as writer:
        writer.submit(snapshot(), tmp_path / "one")
        raise KeyError("the block")
    (note,) = raised.value.__notes__
    assert "could not be written either: " in note
    assert "was not written by this program" in note


EXITS = """
import sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
from sparse_zero.checkpoint import writer as module
from tests.sparse_zero.test_checkpoint_writer import snapshot
real = module.write_snapshot
def slowly(*arguments):
    time.sleep(1.0)
    real(*arguments)
module.write_snapshot = slowly
module.CheckpointWriter().submit(snapshot(), Path({folder!r}), lambda: print("complete"))
raise RuntimeError("training failed")
"""


def test_a_process_that_ends_waits_for_the_write(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    code = EXITS.format(root=root, folder=str(tmp_path / "one"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "training failed" in done.stderr
    assert done.stdout.endswith("complete\n")
    assert read_checkpoint(tmp_path / "one").optimizer_step == 1


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    write_snapshot(snapshot(1), tmp_path / "one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(checkpoint_module, "write_retired", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(snapshot(2), tmp_path / "one")
    assert read_checkpoint(tmp_path / "one").optimizer_step == 1
    assert not list(tmp_path.glob(".*"))


# --- what a checkpoint is -----------------------------------------------------------------------------------


def test_the_size_is_twelve_bytes_a_value_and_little_more(tmp_path):
    values = 2**18
    chosen = sz.WeightSelection(shape=(1024, 1024), block_size=256, blocks=[[0, 0], [1, 1], [2, 2], [3, 3]])
    numbers = {"m.values_block": torch.zeros(values)}
    moments = {state: {"m.values_block": torch.zeros(values)} for state in ("exp_avg", "exp_avg_sq")}
    whole = snapshot()
    large = Snapshot(
        selection=sz.Selection({"m.weight": chosen}),
        retired=whole.retired,
        state=TrainingState(masters=numbers, moments=moments, step=1),
        random_states=gather_random_states(keep=True),
        base_entries={"m.weight": {"block": torch.zeros(values)}},
        fields=whole.fields,
    )
    assert large.num_bytes == 12 * values
    write_snapshot(large, tmp_path / "one")
    assert 12 * values < sum(path.stat().st_size for path in (tmp_path / "one").iterdir()) < 1.02 * 12 * values


# Fields of the formats before.
FIELDS_OF_3 = ("format", "optimizer_step", "optimizer", "loss_scale", "placement", "base", "base_fingerprints", "extra")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_formats_are_read(tmp_path, version):
    folder = tmp_path / "one"
    write_snapshot(snapshot(7), folder)
    header = json.loads((folder / "checkpoint.json").read_text())
    older = {name: header[name] for name in FIELDS_OF_3 if version > 2 or name != "optimizer"}
    with new_folder(folder) as temporary:
        for name in ("selection", "masters", "moments"):
            shutil.copy(folder / f"{name}.safetensors", temporary)
        (temporary / "checkpoint.json").write_text(json.dumps({**older, "version": version}))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.optimizer_step == 7
    assert checkpoint.optimizers == (("adamw",) if version > 2 else ("adamw", "adam"))
    assert checkpoint.config is None
    assert checkpoint.read_random_states() == {}
    state = checkpoint.read_state()
    assert state.schedule is None
    torch.testing.assert_close(state.masters, snapshot().state.masters, rtol=0, atol=0)
    torch.testing.assert_close(state.moments, snapshot().state.moments, rtol=0, atol=0)


def test_a_file_of_another_checkpoint_is_found_out(tmp_path):
    for number in (1, 2):
        write_snapshot(snapshot(1, fill=float(number)), tmp_path / str(number))
    for name in ("masters.safetensors", "moments.safetensors"):
        shutil.copytree(tmp_path / "1", tmp_path / "mixed")
        shutil.copy(tmp_path / "2" / name, tmp_path / "mixed" / name)
        with pytest.raises(InputError, match=rf"{name} does not have the content"):
            read_checkpoint(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")
    (tmp_path / "1" / "retired.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"does not list retired\.safetensors"):
        read_checkpoint(tmp_path / "1")


def test_random_states_of_others_are_refused():
    states = gather_random_states(keep=True)
    assert states_of_rank(states, "file") is not None
    assert states_of_rank({}, "file") is None
    place = states["numpy"].clone()
    place[0, 624 * 4 : 624 * 4 + 4] = 255
    for changed in (
        {"torch": states["torch"][:, :-1]},
        {"torch": torch.zeros_like(states["torch"])},
        {"numpy": place},
        {"python": torch.full_like(states["python"], 255)},
        {"python": states["python"].float()},
        {"dice": states["python"]},
    ):
        with pytest.raises(InputError, match="use another copy"):
            states_of_rank({**states, **changed}, "file")
    with pytest.raises(InputError, match="no states of numpy"):
        states_of_rank({name: state for name, state in states.items() if name != "numpy"}, "file")


# --- what interruptions leave -------------------------------------------------------------------------------


def test_a_deletion_cut_short_does_not_look_like_a_checkpoint(tmp_path, monkeypatch):
    write_snapshot(snapshot(), tmp_path / "step-000001")
    monkeypatch.setattr("sparse_zero.checkpoint.folders.shutil.rmtree", lambda *_, **__: None)
    remove_folder(tmp_path / "step-000001")
    assert not (tmp_path / "step-000001").exists()
    monkeypatch.undo()
    assert clear_leftovers(tmp_path, r"step-\d+") == []
    assert not list(tmp_path.iterdir())


def test_leftovers_are_cleared_and_old_folders_put_back(tmp_path):
    write_snapshot(snapshot(1), tmp_path / "step-000001")
    os.replace(tmp_path / "step-000001", tmp_path / ".step-000001.77.old")
    for name in (".step-000001.77.tmp", ".step-000002.5.tmp", ".other.5.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half")
    (tmp_path / ".latest.5.tmp").write_text("step")
    assert clear_leftovers(tmp_path, r"step-\d+|latest") == ["step-000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.5.tmp", "step-000001"]
    assert read_checkpoint(tmp_path / "step-000001").optimizer_step == 1


def test_a_snapshot_keeps_what_the_caller_said_when_it_was_taken(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    sz.sparsify(model, sz.Selection({"0.weight": sz.WeightSelection(shape=(8, 16), rows=range(ROWS))}))
    optimizer = torch.optim.AdamW(sz.parameter_groups(model), lr=1e-3)
    progress, config = {"step": 1, "best": {"loss": 2.0}}, {"training": {"steps": 5}}
    taken = take_snapshot(PlainEngine(module=model, optimizer=optimizer), extra=progress, config=config)
    assert taken is not None
    # Training goes on before it is written.
    progress.update(step=2)
    progress["best"]["loss"] = 1.0
    config["training"]["steps"] = 6
    with CheckpointWriter() as writer:
        writer.submit(taken, tmp_path / "step")
    found = read_checkpoint(tmp_path / "step")
    assert found.extra == {"step": 1, "best": {"loss": 2.0}}
    assert found.config == {"training": {"steps": 5}}
