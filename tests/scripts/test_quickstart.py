"""The quickstart's claim, on the real pretrained model: at least 40 points better, and the merged model agrees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.smollm2 import default_cache, smollm2_folder
from models.word_problems import write_word_problems
from tests.plain_predictions import plain_predictions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quickstart_run_learns_and_merges(tmp_path):
    from models.data import FieldConfig
    from models.loading import ModelConfig, load_tokenizer
    from models.templates import render

    model = smollm2_folder(default_cache())
    write_word_problems(tmp_path / "data", 4000, 100, 200, seed=0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher",
            "launch",
            "--config",
            str(ROOT / "configs" / "runs" / "quickstart.yaml"),
            f"--model.name_or_path={model}",
            f"--data.train={tmp_path}/data/train.json",
            f"--data.test={tmp_path}/data/test.json",
            f"--output.folder={tmp_path}/run",
        ],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["tuned"] >= summary["accuracy"]["base"] + 0.40
    assert summary["parameters"]["trained"] <= 0.01 * summary["parameters"]["total"]

    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(model)))
    records = json.loads((tmp_path / "data" / "test.json").read_text())[:20]
    prompts = [render("plain", record, tokenizer, FieldConfig())[0] for record in records]
    _, texts = plain_predictions(tmp_path / "run" / "merged", prompts, 48)
    tuned = json.loads((tmp_path / "run" / "evaluation" / "tuned.json").read_text())["predictions"]
    assert texts == [prediction["text"] for prediction in tuned[:20]]
