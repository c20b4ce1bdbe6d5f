"""Runs that calibrate by full fine-tuning: weights restored, or kept as a new base; then resumed, evaluated, exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models.base_identity import base_identity
from sparse_zero.selection.selection import Selection
from tests.launcher.test_train import cli, rows, run, worker, write_config

SETTINGS = {"learning_rate": 1e-3, "batches_per_step": 2}
FULL: dict[str, Any] = {
    "selection__calibration_weights": "full",
    "selection__calibration_batches": 4,
    "selection__full_calibration": SETTINGS,
    "training__steps": 4,
    "training__validation_every": None,
    "checkpoint__every": 2,
    "output__evaluate": False,
    "output__merged": False,
    "output__report": False,
}


def write(base: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(base, folder, **{**FULL, **changes})


def keeping(kept: Path, **more: Any) -> dict[str, Any]:
    return {"selection__full_calibration": {**SETTINGS, "keep_weights_in": str(kept), **more}}


@pytest.fixture(scope="module")
def kept_run(base, tmp_path_factory):
    """On one process, with the trained weights kept, the base evaluated and the result merged."""
    folder = tmp_path_factory.mktemp("kept")
    config = write(base, folder, **keeping(folder / "new-base"), output__evaluate=True, output__merged=True)
    return folder, config, run(worker(config), folder)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


@pytest.mark.slow
def test_a_run_with_restored_weights_is_that_of_its_selection(base, tmp_path):
    settings = {**SETTINGS, "stage": 3, "offload": True}
    config = write(base, tmp_path / "full", selection__full_calibration=settings)
    run(cli("launch", "--config", str(config)), tmp_path)
    selection = tmp_path / "full" / "run" / "selection.safetensors"
    # The same selection from a file, without any calibration: equal losses mean equal weights to begin with.
    unchanged = {name: value for name, value in FULL.items() if not name.startswith("selection")}
    plain = write_config(base, tmp_path / "full", **unchanged)
    described = yaml.safe_load(plain.read_text())
    described["selection"] = {"file": str(selection)}
    described["output"]["folder"] = str(tmp_path / "full" / "again")
    plain.write_text(yaml.safe_dump(described))
    run(cli("launch", "--config", str(plain)), tmp_path)
    again = (tmp_path / "full" / "again" / "metrics.jsonl").read_text().splitlines()
    assert losses(tmp_path / "full") == [row["loss"] for row in map(json.loads, again) if row["kind"] == "train"]
    stored = Selection.load(selection).metadata
    assert stored["base"]["sha256"] == base_identity(base / "model").sha256
    assert stored["num_calibration_batches"] == 4


def test_kept_weights_are_a_base_that_everything_belongs_to(kept_run, base):
    folder, config, _ = kept_run
    kept = folder / "new-base"
    identity = base_identity(kept).sha256
    assert identity != base_identity(base / "model").sha256
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in kept.iterdir()}
    before, after = (load_file(where / "model.safetensors") for where in (base / "model", kept))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["base"] == {"name": "new-base", "sha256": identity}
    assert Selection.load(folder / "run" / "selection.safetensors").metadata["base"]["sha256"] == identity
    # The merged model differs from the new base in the selected entries only.
    selection = Selection.load(folder / "run" / "selection.safetensors")
    merged = load_file(folder / "run" / "merged" / "model.safetensors")
    changed = {name for name in after if not torch.equal(merged[name], after[name])}
    assert changed
    assert changed <= selection.weights.keys()
    total = sum(int((merged[name] != after[name]).sum()) for name in changed)
    assert total <= selection.num_parameters
    # Export and evaluation find the base on their own.
    run(cli("export", "--config", str(config), "--out", str(folder / "out")), folder)
    exported = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], merged[name]) for name in merged)
    out = folder / "answers.json"
    arguments = ("--adapter", str(folder / "run" / "adapter"), "--out", str(out))
    run(cli("evaluate", "--config", str(config), *arguments), folder)
    tuned = json.loads((folder / "run" / "evaluation" / "tuned.json").read_text())
    assert json.loads(out.read_text())["predictions"] == tuned["predictions"]


def test_a_resumed_run_continues_from_the_kept_base_and_does_not_calibrate_again(kept_run, tmp_path):
    folder, config, _ = kept_run
    copy = tmp_path / "copy"
    shutil.copytree(folder / "run", copy)
    for name in ("summary.json", "adapter", "merged", "checkpoints/step-000004"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stamp = (folder / "new-base" / "model.safetensors").stat().st_mtime_ns
    output = run(worker(config, f"--output.folder={copy}"), tmp_path)
    assert "after step 2" in output
    assert (folder / "new-base" / "model.safetensors").stat().st_mtime_ns == stamp
    again = [
        row for row in map(json.loads, (copy / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"
    ]
    assert [row["loss"] for row in again] == losses(folder)
    # The base answers of the first start stay; those of the new base would be others.
    first, second = (json.loads((where / "evaluation" / "base.json").read_text()) for where in (folder / "run", copy))
    assert first == second


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_reuses_base_and_selection(kept_run, tmp_path):
    folder, config, _ = kept_run
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "run" / "selection.safetensors", copy)
    shutil.copy(folder / "run" / "config.yaml", copy)
    shutil.copytree(folder / "run" / "evaluation", copy / "evaluation")
    overrides = (f"--output.folder={copy}", "--output.merged=false")
    run(worker(config, *overrides), tmp_path)
    again = [
        row for row in map(json.loads, (copy / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"
    ]
    assert [row["loss"] for row in again] == losses(folder)
    shutil.rmtree(copy)
    # Another run, even one that differs in its data only, does not take them for its own.
    copy.mkdir()
    shutil.copy(folder / "run" / "selection.safetensors", copy)
    shutil.copy(folder / "run" / "config.yaml", copy)
    output = run(worker(config, *overrides, "--data.max_length=150"), tmp_path, code=2)
    assert "holds another run (data.max_length was 160 and is now 150)" in output
    output = run(worker(config, *overrides, "--checkpoint.resume=never"), tmp_path, code=2)
    assert "keep_weights_in" in output
    assert "not empty" in output
    # A base that was exchanged meanwhile.
    other = tmp_path / "other"
    shutil.copytree(folder / "new-base", other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    described = (copy / "config.yaml").read_text().replace(str(folder / "new-base"), str(other))
    (copy / "config.yaml").write_text(described)
    changed = f"--selection.full_calibration.keep_weights_in={other}"
    output = run(worker(config, *overrides, changed), tmp_path, code=2)
    assert "holds the base other" in output
    assert "made for another" in output


@pytest.mark.slow
def test_a_start_that_was_killed_between_base_and_selection_is_made_again(kept_run, tmp_path):
    folder, config, _ = kept_run
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "run" / "config.yaml", copy)
    # Without the note the base may be anybody's.
    refused = worker(config, f"--output.folder={copy}")
    assert "which is not empty" in run(refused, tmp_path, code=2)
    shutil.copy(folder / "run" / "kept_base.json", copy)
    identity = base_identity(folder / "new-base").sha256
    run(worker(config, f"--output.folder={copy}", "--output.evaluate=false", "--output.report=false"), tmp_path)
    assert base_identity(folder / "new-base").sha256 == identity
    assert Selection.load(copy / "selection.safetensors").metadata["base"]["sha256"] == identity


@pytest.mark.slow
def test_kept_weights_do_not_depend_on_the_number_of_ranks(kept_run, base, tmp_path):
    folder, _, _ = kept_run
    config = write(base, tmp_path, **keeping(tmp_path / "two", stage=3))
    run(cli("launch", "--config", str(config)), tmp_path)
    one, two = (load_file(where / "model.safetensors") for where in (folder / "new-base", tmp_path / "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    assert losses(tmp_path) == pytest.approx(losses(folder), rel=1e-5)


@pytest.mark.slow
def test_select_writes_the_new_base_too(base, tmp_path):
    config = write(base, tmp_path, **keeping(tmp_path / "new-base"))
    out = tmp_path / "chosen.safetensors"
    run(cli("select", "--config", str(config), "--out", str(out)), tmp_path)
    assert Selection.load(out).metadata["base"]["sha256"] == base_identity(tmp_path / "new-base").sha256
    output = run(cli("select", "--config", str(config), "--out", str(out)), tmp_path, code=2)
    assert "keep_weights_in" in output
    assert "not empty" in output


def test_what_cannot_work_is_said_before_anything_starts(base, tmp_path):
    config = write(base, tmp_path, **keeping(tmp_path / "new-base", batches_per_step=1))
    output = run(cli("launch", "--config", str(config)), tmp_path, code=2)
    assert "batches_per_step is 1, not a multiple of the 2 ranks" in output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new-base").exists()
    (tmp_path / "new-base").mkdir()
    (tmp_path / "new-base" / "mine.txt").write_text("keep me")
    output = run(worker(config), tmp_path, code=2)
    assert f"keep_weights_in is {tmp_path / 'new-base'}, which is not empty" in output
    assert not (tmp_path / "run").exists()
    output = run(worker(config, "--selection.calibration_weights=frozen"), tmp_path, code=2)
    assert "trains no weights" in output
    shutil.rmtree(tmp_path / "new-base")
    (tmp_path / "new-base").write_text("a file")
    output = run(worker(config), tmp_path, code=2)
    assert "not empty" in output
