"""Memory measured in real runs: every tensor is counted, by phase and kind, and no result depends on it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.config import RunConfig
from launcher.memory.measuring import PhasePeaks, RunMemory, label_positions, shape_of
from launcher.memory.memory_config import MemoryConfig
from models.collate import collate
from models.data import IGNORED, TokenizedSample
from scripts import tiny_run as tiny
from sparse_zero.errors import InputError

CPU = torch.device("cpu")
MIB = 2**20
SETTINGS = tiny.RunSettings(steps=3, every=100, hidden=64)


def measured_run(folder: Path, base: Path, kind: tiny.Kind, *overrides: str) -> tuple[dict[str, Any], list[float]]:
    """memory.json and the losses of a run of two ranks."""
    config = tiny.write_config(base, folder, kind, SETTINGS)
    started = tiny.Start(config, folder, *overrides)
    for process in started.processes:
        process.join()
    assert started.codes() == [0, 0], started.output()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return json.loads((folder / "run" / "memory.json").read_text()), losses


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.write_base(folder, SETTINGS)
    return folder


def peaks(rank: dict[str, Any]) -> dict[str, int]:
    return {name: phase["peak_bytes"] for name, phase in rank["tensors"].items()}


def test_results_are_those_without_measuring_and_every_kind_is_counted(base: Path, tmp_path: Path) -> None:
    kind = tiny.Kind(stage=2, placement="inplace", reselects=False, reports=False)
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    memory, losses = measured_run(tmp_path / "with", base, kind)
    plain, expected = measured_run(tmp_path / "without", base, kind, "--memory.measure=false")
    assert losses == expected
    found, wanted = (
        load_file(tmp_path / name / "run/adapter/adapter_model.safetensors") for name in ("with", "without")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(rank["tensors"] == {} and rank["steps"] == 0 for rank in plain["ranks"])
    assert all(rank["process"]["train"] > rank["at_start"] for rank in (*plain["ranks"], *memory["ranks"]))

    summary = json.loads((tmp_path / "with/run/summary.json").read_text())
    trained, total = summary["parameters"]["trained"], summary["parameters"]["total"]
    assert len(memory["ranks"]) == memory["world_size"] == 2
    for rank in memory["ranks"]:
        assert rank["steps"] == 2
        assert set(rank["tensors"]) == {"load", "engine", "forward", "backward", "step", "save"}
        kinds = {name: phase["by_kind"] for name, phase in rank["tensors"].items()}
        for phase in kinds:
            assert kinds[phase]["weights"] == 4 * total
            assert kinds[phase]["values"] == 4 * trained
        # Half of the masters, made by the engine; half of the moments, made by the first step.
        masters = rank["tensors"]["engine"]["end_bytes"] - rank["tensors"]["load"]["end_bytes"]
        assert masters == pytest.approx(2 * trained, rel=0.02)
        assert kinds["step"]["optimizer"] == pytest.approx(6 * trained, rel=0.02)
        assert kinds["backward"]["optimizer"] == pytest.approx(6 * trained, rel=0.02)
        assert kinds["forward"]["activations"] > 0
        assert peaks(rank)["backward"] > peaks(rank)["step"] > peaks(rank)["load"]
        assert set(rank["process"]) >= {"load", "calibration", "engine", "forward", "backward", "train", "save"}
        # Two micro-batches in the step that is described; only the second holds gradients of another.
        assert [each["accumulation"] for each in rank["micro_batches"]] == [1, 2]
    most = max(
        max(peaks(rank)[name] for name in ("load", "engine", "forward", "backward", "step")) for rank in memory["ranks"]
    )
    assert memory["comparison"]["peak"]["measured_bytes"] == most
    assert "five minutes" in memory["simulation"]["problem"]


@pytest.mark.slow
def test_a_run_with_all_else_is_measured_and_a_resumed_one_counts_its_states(base: Path, tmp_path: Path) -> None:
    kind = tiny.Kind(stage=3, placement="delta", reselects=True, reports=False)
    settings = tiny.RunSettings(steps=6, every=1, hidden=64)
    config = tiny.write_config(base, tmp_path, kind, settings)
    # A re-selection after the first step: what was measured by then stays, and no more is.
    options = ("--selection.reselect.every=1", "--training.gradient_checkpointing=true")
    started = tiny.Start(config, tmp_path, *options)
    tiny_wait(started, lambda: tiny.newest_checkpoint(tmp_path / "run") >= 2)
    started.kill([0, 1])
    memory = json.loads((tmp_path / "run/memory.json").read_text())
    assert [rank["steps"] for rank in memory["ranks"]] == [1, 1]
    assert {"forward", "backward", "step"} <= memory["ranks"][0]["tensors"].keys()
    started = tiny.Start(config, tmp_path, *options)
    for process in started.processes:
        process.join()
    assert started.codes() == [0, 0], started.output()
    assert started.continued_after >= 2
    memory = json.loads((tmp_path / "run/memory.json").read_text())
    for rank in memory["ranks"]:
        assert "resume" in rank["tensors"]
        assert rank["process"]["save"] > 0


def tiny_wait(started: tiny.Start, until: Any) -> None:
    deadline = time.monotonic() + 240
    while not until():
        assert started.codes() == [None, None], started.output()
        assert time.monotonic() < deadline, started.output()
        time.sleep(0.005)


# --- its parts -----------------------------------------------------------------------------------------------


def test_peaks_of_phases_lie_in_phases() -> None:
    memory = PhasePeaks(CPU)
    with memory.phase("train"):
        with memory.phase("forward"):
            assert memory.now == "forward"
            del_me = torch.ones(64 * MIB, dtype=torch.uint8)
            del del_me
        with memory.phase("backward"):
            pass
    assert memory.now == ""
    memory.close()
    assert memory.peaks["train"] >= memory.peaks["forward"] >= memory.peaks["backward"]
    if memory.source == "kernel":
        assert memory.peaks["forward"] > memory.peaks["backward"] + 32 * MIB
    assert memory.largest() == memory.peaks["train"]


def samples(*lengths: int) -> list[TokenizedSample]:
    """Prompts of two tokens, the rest with labels."""
    return [TokenizedSample(list(range(n)), [IGNORED] * 2 + list(range(2, n))) for n in lengths]


@pytest.mark.parametrize("batching", ["pad", "pack"])
@pytest.mark.parametrize("lengths", [(5,), (7, 4), (9, 9, 3), (2,)])
def test_label_positions_are_those_of_the_loss(batching: Any, lengths: tuple[int, ...]) -> None:
    batch = collate(samples(*lengths), batching=batching, pad_token_id=0)
    # As models.loss finds them.
    expected = int((batch["labels"][:, 1:] != IGNORED).any(0).sum())
    assert label_positions(samples(*lengths), batching) == max(1, expected)
    shape = shape_of(samples(*lengths), batching, 1)
    assert (shape["micro_batch"], shape["length"]) == tuple(batch["input_ids"].shape)
    assert shape["tokens"] == sum(lengths)


def test_of_many_micro_batches_the_first_two_and_the_last_are_measured() -> None:
    memory = RunMemory(MemoryConfig(), CPU)
    for index in range(6):
        memory.micro_batch(samples(4 + index), "pad", index, 6)
    assert [each["length"] for each in memory.micro_batches] == [4, 5, 9]
    assert not memory.end_step()
    memory.micro_batch(samples(3), "pad", 0, 1)
    assert [each["length"] for each in memory.micro_batches] == [3]
    assert memory.end_step()
    memory.micro_batch(samples(50), "pad", 0, 1)
    assert [each["length"] for each in memory.micro_batches] == [3]
    assert [each["length"] for each in memory.all_micro_batches()] == [3, 50]
    memory.peaks.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"warn_above": 0.0}, "memory.warn_above is 0.0"), ({"wait_seconds": -1.0}, "memory.wait_seconds is -1.0")],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MemoryConfig(**changes)
    assert RunConfig.__dataclass_fields__["memory"].default_factory is MemoryConfig
