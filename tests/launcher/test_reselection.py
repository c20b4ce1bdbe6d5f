"""A run that selects anew while it trains: what it tells and writes, at stage 3 too, and how it continues."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparse_zero as sz
from launcher.metrics import MetricsLog, read_metrics
from launcher.process_ranks import free_port
from launcher.reselecting import describe_check
from models.loading import ModelConfig, load_model
from tests.launcher.test_train import cli, rows, run, worker, write_config

STEPS, EVERY = 12, 4


def write_run(base: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(
        base,
        folder,
        **{
            "training__steps": STEPS,
            "training__validation_every": None,
            "selection__reselect": {"every": EVERY, "calibration_batches": 2},
            # Whose groups gain and lose values, and may come and go.
            "training__per_module": [{"modules": ["*.layers.1.*.{q,k}_proj"], "learning_rate_factor": 0.5}],
            "checkpoint": {"every": 2, "keep": 10},
            "output__evaluate": False,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The run on one process, without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(worker(write_run(base, folder)), folder)


def told(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses, and the rows of the checks without their times."""
    found = [row["loss"] for row in rows(folder)]
    assert len(found) == STEPS
    return found, [{**row, "seconds": None} for row in rows(folder, "reselection")]


def test_a_run_with_two_reselections_tells_and_keeps_all_of_them(whole):
    folder, output = whole
    run_folder = folder / "run"
    _, checks = told(folder)
    assert [row["step"] for row in checks] == [4, 8]
    summary = json.loads((run_folder / "summary.json").read_text())
    for row in checks:
        assert row["changed"]
        assert 0.0 < row["captured_before"] < row["captured_after"] <= 1.0
        assert min(row["kept"], row["new"], row["dropped"], row["retired"]) > 0
    assert summary["parameters"]["trained"] == checks[-1]["kept"] + checks[-1]["new"]
    assert summary["parameters"]["retired"] == checks[-1]["retired"]
    assert "step 4: selected anew" in output
    header = json.loads((run_folder / "adapter" / "adapter.json").read_text())
    assert header["num_retired"] == checks[-1]["retired"]
    # The run folder's selection is the last one; the checkpoint before a check has the one before.
    last = sz.Selection.load(run_folder / "selection.safetensors")
    assert last.digest() == header["selection_digest"]
    assert last.metadata["reselected_after_step"] == 8
    stored = {step: sz.read_checkpoint(run_folder / f"checkpoints/step-{step:06d}") for step in (4, 6, 8, 10)}
    assert stored[6].selection == stored[8].selection != stored[4].selection
    assert stored[10].selection == last
    assert [stored[step].retired.num_entries for step in (4, 8, 10)] == [0, *(row["retired"] for row in checks)]


def test_the_merged_model_has_the_retired_numbers_and_export_writes_the_same(whole, base, tmp_path):
    folder, _ = whole
    run_folder = folder / "run"
    model = load_model(ModelConfig(name_or_path=str(base / "model")))
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    merged = load_file(run_folder / "merged" / "model.safetensors")
    retired = sz.read_checkpoint(run_folder / f"checkpoints/step-{STEPS:06d}").retired
    moved = 0
    for name, entries in retired.entries.items():
        found = merged[name].view(-1)[entries.positions]
        assert torch.equal(found, entries.numbers)
        moved += int((found != dense[name].view(-1)[entries.positions]).sum())
    assert moved > 0.5 * retired.num_entries
    run(cli("export", "--config", str(folder / "run.yaml"), "--out", str(tmp_path / "again")), folder)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (run_folder / "merged/model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_interrupted_after_a_reselection_continues_bit_for_bit(step, whole, base, tmp_path):
    # As a kill between two checkpoints leaves it: rows of later steps, and no summary.
    folder = whole[0]
    shutil.copytree(folder / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("summary.json", "adapter", "merged"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = run(worker(write_run(base, tmp_path)), tmp_path)
    assert f"after step {step}" in output
    assert told(tmp_path) == told(folder)
    for name in ("adapter/adapter_model.safetensors", "adapter/retired.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    assert sz.Selection.load(tmp_path / "run/selection.safetensors") == sz.Selection.load(
        folder / "run/selection.safetensors"
    )


@pytest.mark.slow
def test_stage_3_on_two_ranks_selects_and_trains_the_same(whole, base, tmp_path):
    config = write_run(base, tmp_path, zero={"stage": 3, "placement": "delta"}, training__gradient_checkpointing=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    run([*launcher, "--master_port", str(free_port()), *worker(config)[1:]], tmp_path)
    (found, checks), (expected, expected_checks) = told(tmp_path), told(whole[0])
    assert found == pytest.approx(expected, rel=1e-5)
    for row, wanted in zip(checks, expected_checks, strict=True):
        for name in ("captured_before", "captured_after"):
            assert row.pop(name) == pytest.approx(wanted.pop(name), rel=1e-5)
        assert row == wanted
    a, b = (load_file(folder / "run" / "merged" / "model.safetensors") for folder in (tmp_path, whole[0]))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    adapters = [json.loads((folder / "run/adapter/adapter.json").read_text()) for folder in (tmp_path, whole[0])]
    assert adapters[0]["selection_digest"] == adapters[1]["selection_digest"]
    assert adapters[0]["base_fingerprints"] == adapters[1]["base_fingerprints"]


def test_a_check_is_told_again_by_the_run_that_makes_it_again(tmp_path):
    check = {"kind": "reselection", "step": 4, "changed": True, "kept": 3}
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"kind": "train", "step": step, "loss": 1.0})
            if step == 4:
                log.write(check)
    # It comes after the checkpoint of its step.
    with MetricsLog(tmp_path, resumed_step=4) as log:
        assert [row["kind"] for row in read_metrics(log.path)] == ["train"] * 4
        log.write(check)
    with MetricsLog(tmp_path, resumed_step=5) as log:
        assert read_metrics(log.path)[-1] == check


def test_checks_in_words():
    row = {
        "step": 4, "changed": True, "kept": 1200, "new": 300, "returned": 0, "dropped": 300, "retired": 300,
        "captured_before": 0.5, "captured_after": 0.75,
    }  # fmt: skip
    assert describe_check(row) == (
        "step 4: selected anew, 50.0 % -> 75.0 % of the score captured; 1,200 entries kept, 300 new, 300 retired"
    )
    assert "300 new (20 of them back), " in describe_check({**row, "returned": 20})
    assert describe_check({**row, "changed": False}) == "step 4: the selection captures 50.0 % of the score and stays"
    assert "captures – of the score" in describe_check({**row, "changed": False, "captured_before": None})
    told = describe_check({**row, "changed": False, "problem": "no gradient reached 'a.b'"})
    assert told == "step 4: the selection could not be checked, and stays: no gradient reached 'a.b'"
