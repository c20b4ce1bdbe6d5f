"""Does choosing need hardly more memory than training, at 7B by simulation, and does the script measure real models?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from scripts import measure_calibration_memory as script
from tests.models.tiny import write_tiny_llama


def options(**changes: object) -> argparse.Namespace:
    settings = {"batch": 4, "length": 512, "steps": 2, "block_size": 64, "fraction": 0.01, "checkpointing": True}
    return argparse.Namespace(**{**settings, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_frozen_calibration_of_a_7b_needs_what_training_needs(checkpointing: bool) -> None:
    peaks = {
        variant: script.simulate(variant, options(checkpointing=checkpointing))["peak_bytes"]
        for variant in ("training", "abs_of_mean", "mean_of_abs per_step", "full, stage 2")
    }
    assert peaks["training"] > 2 * 6.7e9, "the weights alone, in bf16"
    assert peaks["abs_of_mean"] < 1.1 * peaks["training"]
    assert peaks["mean_of_abs per_step"] < 1.1 * peaks["training"]
    assert peaks["full, stage 2"] > 16 * 6.7e9, "weights, gradients, masters and two moments"


@pytest.mark.slow
def test_a_real_model_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    out = tmp_path / "numbers.json"
    arguments = ["--model", str(tmp_path / "model"), "--length", "8", "--steps", "2", "--block-size", "16"]
    assert script.main([*arguments, "--variants", "0,1,4", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["variants"]
    assert list(found) == ["training", "abs_of_mean", "mean_of_abs sum, on disk"]
    assert all(own["peak_bytes"] >= own["loaded_bytes"] > 10**8 for own in found.values())


def test_training_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--variants", "1"]) == 2
    assert "start with 0" in capsys.readouterr().err
