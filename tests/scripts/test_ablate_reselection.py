"""Does the study run what it says, keep finished runs, and compare seed by seed?"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from launcher.config import load_config
from scripts import ablate_reselection as script


@pytest.mark.parametrize("name", list(script.CONDITIONS))
def test_every_condition_is_a_valid_run(name: str, tmp_path: Path) -> None:
    options = Namespace(folder=tmp_path, data=tmp_path, steps=60, fraction=0.002, every=15)
    changes = [change.format(every=15) for change in script.CONDITIONS[name]]
    command = script.command_of(tmp_path / "run", changes, 3, options, "model")
    config = load_config(command[command.index("--config") + 1], [each for each in command if "=" in each])
    assert config.training.steps == 60
    assert config.training.seed == config.selection.seed == 3
    assert all(region.per_matrix is None for region in config.selection.regions)
    assert (config.selection.reselect is not None) == ("every" in name)
    assert (config.selection.score == "random") == name.startswith("random")


def test_finished_runs_are_read_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    for name, losses in {"once": (0.5, 0.4), "every 15": (0.45, 0.42)}.items():
        for seed, loss in enumerate(losses):
            folder = tmp_path / f"{name.replace(' ', '-')}-{seed}"
            folder.mkdir()
            rows = [{"kind": "train", "loss": 9.0}, {"kind": "validation", "loss": loss}]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            (folder / "summary.json").write_text(json.dumps({"parameters": {"trained": 100, "retired": 7}}))
            found.setdefault(name, []).append(script.run_one(name, [], seed, Namespace(folder=tmp_path), "model"))
    script.print_table(found)
    printed = capsys.readouterr().out
    assert "-0.0500, +0.0200" in printed
    assert "0.4350" in printed
