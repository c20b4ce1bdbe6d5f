"""Do the commands that need no training do what they say?"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from launcher.__main__ import main
from launcher.yaml_files import dump_yaml
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from tests.launcher.test_bad_input import run_mapping


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run_mapping()), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["train", "launch", "select", "inspect", "evaluate", "export", "report"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"  sparse-zero {command} " in text.partition("examples:")[2]
    assert ("--section.key=value" in text) == ("--config FILE" in text)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"sparse-zero \S+.*\n", capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the number of ranks is that of a machine without GPUs")
def test_dry_run_prints_the_command_and_starts_nothing(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = "--selection.regions.0.modules=['*.{q,k}_proj']"
    assert main(["launch", "--config", str(run_file), "--dry-run", override]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert words[words.index("--num_gpus") + 1] == "2"
    assert Path(words[-4]).name == "train.py"
    assert Path(words[-4]).is_file()
    assert words[-3:] == ["--config", str(run_file), override]
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


def test_launch_returns_the_launchers_exit_code(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "raise SystemExit(7)"]
    monkeypatch.setattr("launcher.commands.launch.worker_command", lambda *_, **__: failing)
    assert main(["launch", "--config", str(run_file), "--cluster.ranks_per_node=2"]) == 7


@pytest.fixture
def selection() -> Selection:
    return Selection(
        {
            "model.layers.0.self_attn.q_proj.weight": WeightSelection(
                shape=(8, 12), block_size=4, blocks=torch.tensor([[0, 0], [1, 2]]), columns=torch.tensor([0])
            ),
            "model.layers.10.mlp.down_proj.weight": WeightSelection(shape=(2000, 3), rows=torch.tensor([5, 7])),
            "model.layers.9.mlp.down_proj.weight": WeightSelection(shape=(2000, 3), rows=torch.tensor([5])),
        }
    )


@pytest.mark.parametrize("place", ["file", "adapter", "run"])
def test_inspect_lists_regions(
    place: str, selection: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter" if place == "run" else tmp_path
    selection.save(folder / "selection.safetensors")
    assert main(["inspect", str(folder / "selection.safetensors" if place == "file" else tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [line.strip(" │").replace(" ", "").split("│") for line in out.splitlines() if ".weight" in line]
    assert rows == [
        ["model.layers.0.self_attn.q_proj.weight", "8x12", "block4", "2", "32", "33.33%"],
        # The first block owns 4 of the column's 8 entries.
        ["model.layers.0.self_attn.q_proj.weight", "8x12", "column", "1", "4", "4.17%"],
        ["model.layers.9.mlp.down_proj.weight", "2000x3", "row", "1", "3", "0.05%"],
        ["model.layers.10.mlp.down_proj.weight", "2000x3", "row", "2", "6", "0.10%"],
    ]
    assert "45 parameters in 3 weights" in out
    assert selection.digest() in out
