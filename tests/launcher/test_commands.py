"""Do the commands that need no training do what they say?"""

import json
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import evaluating
from launcher.__main__ import main
from launcher.config import parse_config
from launcher.world import World
from launcher.yaml_files import dump_yaml
from sparse_zero.collectives import PeerError
from sparse_zero.errors import InputError
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from tests.launcher.test_bad_input import clear_ranks, run_mapping
from tests.models.tiny import write_tiny_llama


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run_mapping()), encoding="utf-8")
    return path


COMMANDS = ["train", "launch", "doctor", "sweep", "plan", "select", "inspect", "evaluate", "export", "report"]


@pytest.mark.parametrize("command", COMMANDS)
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
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    guard, launcher, by_hand = lines
    assert Path(guard[-1]).name == "node_guard.py"
    assert launcher[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert launcher[launcher.index("--num_gpus") + 1] == "2"
    assert Path(launcher[-2]).name == "start_rank.py"
    assert Path(launcher[-2]).is_file()
    assert Path(by_hand[1]).name == "train.py"
    assert by_hand[2:] == ["--config", str(run_file), override]
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


def test_launch_returns_the_launchers_exit_code(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "raise SystemExit(7)"]
    monkeypatch.setattr("launcher.commands.launch.worker_command", lambda *_, **__: failing)
    # The run's data are not there, which is not what this is about.
    options = ["--cluster.ranks_per_node=2", "--cluster.preflight=false"]
    assert main(["launch", "--config", str(run_file), *options]) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="the number of ranks is that of a machine without GPUs")
def test_two_runs_on_one_machine_get_two_ports(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def port(*overrides: str) -> int:
        assert main(["launch", "--config", str(run_file), "--dry-run", *overrides]) == 0
        words = shlex.split(capsys.readouterr().out)
        if "--master_port" in words:
            return int(words[words.index("--master_port") + 1])
        return int(words[words.index("--rdzv_endpoint") + 1].rpartition(":")[2])

    for launcher in ("local", "torchrun"):
        found = port(f"--cluster.launcher={launcher}")
        with socket.socket() as first:
            first.bind(("", found))  # The port was free, and with a run on it the next run gets another.
            assert port(f"--cluster.launcher={launcher}") != found
        assert port(f"--cluster.launcher={launcher}", "--cluster.master_port=1234") == 1234
    # Several nodes have no way to tell each other a free one.
    across = ("--cluster.launcher=torchrun", "--cluster.num_nodes=2", "--cluster.master_address=node0")
    assert port(*across) == 29500
    assert port(*across, "--cluster.master_port=7") == 7


def test_nodes_that_are_not_used_are_named(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = "--cluster.hosts=[a slots=2, b slots=2, c slots=2]"
    overrides = ["--cluster.launcher=pdsh", hosts, "--cluster.num_nodes=2"]
    assert main(["launch", "--config", str(run_file), "--dry-run", *overrides]) == 0
    said = capsys.readouterr().err
    assert "sparse-zero: 2 of 3 nodes of cluster.hosts are used (cluster.num_nodes is 2); standing by: c\n" in said


TEST_RECORDS = json.dumps([{"instruction": f"Add {i} and 3.", "output": "", "answer": str(i + 3)} for i in range(3)])


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, problems and a run that has evaluated for itself; the ranks' variables are undone."""
    clear_ranks(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "model-folder")
    (tmp_path / "sums.v2.json").write_text(TEST_RECORDS, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(dump_yaml(run_mapping()), encoding="utf-8")
    for name in ("base", "tuned"):
        path = tmp_path / "out" / "evaluation" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the run's own")
    return tmp_path


EVALUATE = ["evaluate", "--config", "run.yaml", "--data.test=sums.v2.json", "--data.evaluation.max_new_tokens=2"]


def test_evaluate_leaves_the_runs_own_evaluation_alone(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(EVALUATE) == 0
    assert "of 3 correct" in capsys.readouterr().out
    folder = evaluated / "out" / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["base-sums.v2.json", "base.json", "tuned.json"]
    assert {(folder / name).read_text() for name in ("base.json", "tuned.json")} == {"the run's own"}
    assert json.loads((folder / "base-sums.v2.json").read_text())["num_problems"] == 3

    assert main([*EVALUATE, "--out", "new/answers.json"]) == 0
    assert (evaluated / "new" / "answers.json").read_bytes() == (folder / "base-sums.v2.json").read_bytes()


@pytest.mark.parametrize(
    ("adapter", "test", "name"),
    [
        (None, "data/test.json", "base-test"),
        ("runs/mine/adapter", "data/test.json", "mine-test"),
        ("runs/mine/adapter", "data/", "mine-data"),
        ("runs/mine/adapter", "owner/name:main", "mine-name-main"),
        ("runs/a b/adapter", "test.json", "a-b-test"),
        ("runs/base/adapter", "test.json", "adapter-test"),
        ("/adapter", "test.json", "adapter-test"),
    ],
)
def test_evaluations_are_named_by_who_answered_what(adapter: str | None, test: str, name: str) -> None:
    config = parse_config({**run_mapping(), "data": {"train": "t.json", "test": test}})
    found = evaluating.evaluation_file(config, None if adapter is None else Path(adapter))
    assert found == Path("out/evaluation") / f"{name}.json"


def test_evaluate_ends_with_2_where_another_rank_failed(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise PeerError("rank 1 failed")

    monkeypatch.setattr(evaluating, "load_with_adapter", fails)
    assert main(EVALUATE) == 2
    assert "error" not in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("local_rank", "speaks", "lines"), [(0, False, 1), (1, False, 0), (1, True, 1)])
def test_what_all_ranks_find_wrong_is_said_once(
    evaluated: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    local_rank: int,
    speaks: bool,
    lines: int,
) -> None:
    def fails(*_: object) -> None:
        error = InputError("a problem is too long")
        error.speaks_for_all = speaks
        raise error

    for name, value in {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    world = World(rank=local_rank, world_size=2, local_rank=local_rank, device=torch.device("cpu"), launcher="test")
    monkeypatch.setattr(evaluating, "join_world", lambda: world)
    monkeypatch.setattr(evaluating, "load_with_adapter", lambda *_: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(evaluating, "evaluate_model", fails)
    assert main(EVALUATE) == 2
    assert capsys.readouterr().err.count("a problem is too long") == lines


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
    path = str(folder / "selection.safetensors" if place == "file" else tmp_path)
    assert main(["inspect", path, "--by", "weight"]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r" {2,}", line.strip()) for line in out.splitlines() if ".weight" in line]
    assert rows == [
        ["model.layers.0.self_attn.q_proj.weight", "8 x 12", "block 4", "2", "32", "33.3%"],
        # The first block owns 4 of the column's 8 entries.
        ["model.layers.0.self_attn.q_proj.weight", "8 x 12", "column", "1", "4", "4.17%"],
        ["model.layers.9.mlp.down_proj.weight", "2000 x 3", "row", "1", "3", "0.050%"],
        ["model.layers.10.mlp.down_proj.weight", "2000 x 3", "row", "2", "6", "0.100%"],
    ]
    assert "45 in 3 weights" in out
    assert selection.digest() in out


TRAIN_RECORDS = json.dumps([{"instruction": f"Add {i} and 3.", "output": str(i + 3)} for i in range(12)])


@pytest.fixture
def selectable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a run that lets blocks, rows and norms be chosen."""
    clear_ranks(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "model-folder")
    (tmp_path / "train.json").write_text(TRAIN_RECORDS, encoding="utf-8")
    regions = [
        {"kind": "block", "modules": ["*.{q,v}_proj"], "block_size": 16},
        {"kind": "row", "modules": ["*.down_proj"], "per_matrix": 2},
        {"kind": "whole", "modules": ["*.input_layernorm.weight"]},
    ]
    selection = {"regions": regions, "budget": {"fraction": 0.02}, "calibration_batches": 2}
    (tmp_path / "run.yaml").write_text(dump_yaml({**run_mapping(), "selection": selection}), encoding="utf-8")
    return tmp_path


def test_select_calibrates_on_other_data_where_it_is_named(
    selectable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"instruction": f"say {word}", "output": word * 3} for word in ("one", "two", "three", "four")]
    (selectable / "other.json").write_text(json.dumps(records), encoding="utf-8")

    def scores(name: str, *settings: str) -> Mapping[Any, torch.Tensor]:
        assert main(["select", "--config", "run.yaml", "--out", f"{name}.safetensors", *settings]) == 0
        return RegionScores.load(f"{name}.scores.safetensors").scores

    plain, other = scores("plain"), scores("other", "--data.calibration=other.json")
    trained_on = scores("trained-on", "--data.train=other.json")
    assert other.keys() == trained_on.keys() == plain.keys()
    assert all(torch.equal(found, trained_on[key]) for key, found in other.items())
    assert not any(torch.equal(found, plain[key]) for key, found in other.items())
    capsys.readouterr()
    assert main(["select", "--config", "run.yaml", "--out", "x.safetensors", "--data.calibration=gone.json"]) == 2
    assert "data.calibration" in capsys.readouterr().err
    # What was chosen by other data is told with the scores.
    again = ["select", "--config", "run.yaml", "--out", "again.safetensors", "--from-scores"]
    assert main([*again, "plain.scores.safetensors", "--data.calibration=other.json"]) == 2
    assert "data.calibration is 'other.json', and the scores in plain.scores.safetensors" in capsys.readouterr().err
    assert main([*again, "other.scores.safetensors"]) == 2
    assert "data.calibration is None, and the scores in other.scores.safetensors" in capsys.readouterr().err
    assert main([*again, "other.scores.safetensors", "--data.calibration=other.json"]) == 0
    assert Selection.load("again.safetensors") == Selection.load("other.safetensors")
    # Nothing reads it where nothing is scored by data.
    scores("random", "--data.calibration=gone.json", "--selection.score=random")


def test_scores_of_other_training_data_are_not_chosen_from(
    selectable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select = ["select", "--config", "run.yaml", "--out"]
    assert main([*select, "one.safetensors"]) == 0
    again = [*select, "again.safetensors", "--from-scores"]

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*again, "one.scores.safetensors", *arguments]) == 2
        assert not Path("again.safetensors").exists()
        return capsys.readouterr().err

    made = "and the scores in one.scores.safetensors were computed with"
    (selectable / "other.json").write_text(TRAIN_RECORDS, encoding="utf-8")
    for name, value, before in (
        ("data.train", "'other.json'", "'train.json'"),
        ("data.max_length", "9", "512"),
        ("data.template", "'plain'", "'alpaca'"),
        ("data.limit", "2", "None"),
        ("data.fields.output", "'answer'", "'output'"),
        ("model.tokenizer", "'model-folder'", "None"),
    ):
        assert f"{name} is {value}, {made} {before}: score again" in refused(f"--{name}={value}")
    # The answer is of no training sample, and the limit of training data of no other.
    assert main([*again, "one.scores.safetensors", "--data.fields.answer=output"]) == 0
    Path("again.safetensors").unlink()
    assert main([*select, "two.safetensors", "--data.calibration=other.json"]) == 0
    changed = ["--data.calibration=other.json", "--data.limit=2", "--data.train=gone.json"]
    assert main([*again, "two.scores.safetensors", *changed]) == 0
    Path("again.safetensors").unlink()

    # Other records of the same name; without the file, its name has to do.
    (selectable / "train.json").write_text(TRAIN_RECORDS.replace("Add", "Sum"), encoding="utf-8")
    assert "data.train 'train.json' has changed since the scores in one.scores.safetensors" in refused()
    (selectable / "train.json").unlink()
    assert main([*again, "one.scores.safetensors"]) == 0

    # Scores of an earlier version say less, and are taken as they were.
    scores = RegionScores.load("one.scores.safetensors")
    scores.metadata["calibration_data"] = {"calibration": None, "calibration_split": None}
    scores.save("old.scores.safetensors")
    assert main([*again, "old.scores.safetensors", "--data.max_length=9"]) == 0


def test_select_writes_scores_and_chooses_again_from_them(selectable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select = ["select", "--config", "run.yaml"]
    assert main([*select, "--out", "one.safetensors"]) == 0
    out = capsys.readouterr().out
    for part in (
        "q_proj",
        "block 16",
        "down_proj",
        "row",
        "input_layernorm",
        "whole",
        "captured",
        "Left of the budget",
    ):
        assert part in out
    first, scores = Selection.load("one.safetensors"), RegionScores.load("one.scores.safetensors")
    assert f"{first.num_parameters:,} of " in out
    assert {c.kind for c in scores.candidates} == {"block", "row"}
    assert scores.metadata["base"] == first.metadata["base"]
    files = {path.name for path in selectable.iterdir()}

    # The same budget gives the same selection, without data and weights; another one gives another.
    (selectable / "train.json").unlink()
    again = [*select, "--from-scores", "one.scores.safetensors"]
    assert main([*again, "--out", "same.safetensors"]) == 0
    same = Selection.load("same.safetensors")
    assert same == first
    assert same.metadata == first.metadata
    assert main([*again, "--out", "new/two.safetensors", "--selection.budget.fraction=0.04"]) == 0
    second = Selection.load("new/two.safetensors")
    assert second.num_parameters > 1.8 * first.num_parameters
    assert {path.name for path in selectable.iterdir()} == {*files, "same.safetensors", "new"} - {"train.json"}
    assert [path.name for path in (selectable / "new").iterdir()] == ["two.safetensors"], "the scores are kept once"
    capsys.readouterr()

    def refused(*arguments: str) -> str:
        assert main([*again, "--out", "no.safetensors", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert not Path("no.safetensors").exists()
        return captured.err

    assert "block_shape (32, 32), and scored was (16, 16)" in refused("--selection.regions.0.block_size=32")
    assert "were not scored" in refused("--selection.regions.0.modules=['*.k_proj']")
    assert "with score magnitude, and scored was abs_of_mean" in refused("--selection.score=magnitude")
    assert "gone does not exist" in refused("--from-scores=gone")
    assert "has format 'sparse_zero.selection'" in refused("--from-scores=one.safetensors")
    assert "keep one of them" in refused(
        "--selection.file=one.safetensors", "--selection.regions=[]", "--selection.budget=null"
    )
    write_tiny_llama(selectable / "other", seed=1)
    assert "has scores of the base model-folder" in refused("--model.name_or_path=other")

    # Beside the run, the scores get the name that a run gives them.
    (selectable / "train.json").write_text(TRAIN_RECORDS, encoding="utf-8")
    assert main(select) == 0
    assert {path.name for path in (selectable / "out").iterdir()} == {"selection.safetensors", "scores.safetensors"}
    assert Selection.load("out/selection.safetensors") == first
    assert main(["inspect", "out", "same.safetensors"]) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--out=a/s.safetensors", "--scores=a/s.safetensors"],
            "--scores is a/s.safetensors, the file of the selection",
        ),
        (["--scores=."], "--scores is ., which is a folder"),
        (["--scores=run.yaml/x"], "--scores is run.yaml/x, but run.yaml is a file"),
        (
            ["--selection.regions=[]", "--selection.budget=null", "--selection.file=s", "--scores=x"],
            "--scores is x, but selection.file s is used as it is",
        ),
    ],
)
def test_select_refuses_impossible_files(
    run_file: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_file.parent)
    assert main(["select", "--config", "run.yaml", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


def test_from_scores_needs_no_ranks(selectable: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["select", "--config", "run.yaml", "--from-scores=x"]) == 2
    assert "--from-scores is x on several ranks" in capsys.readouterr().err
