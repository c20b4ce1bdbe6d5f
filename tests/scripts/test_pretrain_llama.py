"""Does one command give a Llama that has learned, the same again and after a stop, and that the launcher can train?"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from models.generated_text import generate_documents
from scripts import pretrain_llama
from scripts.pretraining import loop, text
from scripts.pretraining.settings import Schedule
from scripts.pretraining.state import STATE_NAME, Progress
from sparse_zero.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--vocab", "512", "--hidden", "256", "--intermediate", "256", "--layers", "1", "--heads", "2"]
SHORT = [*SMALL, "--characters", "30000", "--batch", "4", "--length", "24", "--steps", "12"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pre-training of 12 steps."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    assert pretrain_llama.main(["--out", str(folder), *SHORT]) == 0
    return folder


def test_held_out_documents_are_in_no_training_data() -> None:
    documents = [f"document {number}" for number in range(300)]
    training, validation = text.split_documents([*documents[:299], "document 7"])
    assert (len(training), validation) == (297, ["document 297", "document 298"])
    with pytest.raises(InputError, match="3 documents that all stand before"):
        text.split_documents([*documents[:297], *documents[:3]])


def test_a_line_of_spaces_separates_and_names_of_special_tokens_are_read(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    lines = [f" = Part {number} = \n \n The <unk> of <s> is {number} , and it is old . \n" for number in range(40)]
    file.write_text(" \n".join(lines))
    documents, _ = text.read_documents([file], 0, 0)
    assert documents[:3] == ["= Part 0 =", "The <unk> of <s> is 0 , and it is old .", "= Part 1 ="]
    tokenizer = text.train_tokenizer([documents[1], *documents], 300)
    ids = tokenizer(documents[1])["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 1
    assert tokenizer.decode(tokenizer("it is old")["input_ids"], skip_special_tokens=True) == "it is old"


def test_the_folder_is_a_model_with_its_tokenizer_and_its_story(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {path.name for path in made.iterdir()}
    assert names >= {"model.safetensors", "tokenizer.json", "validation.txt", "learning_curve.png", "pretraining.json"}
    assert STATE_NAME not in names
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    sizes = [size for name, each in model.named_parameters() if "norm" not in name for size in each.shape]
    assert sizes
    assert all(size % 256 == 0 for size in sizes)
    told = json.loads((made / "pretraining.json").read_text())
    assert told["num_parameters"] == sum(each.numel() for each in model.parameters())
    documents = list(generate_documents(30_000, 0))
    assert told["text_sha256"] == hashlib.sha256("\n\n".join(documents).encode()).hexdigest()
    assert told["tokens"] == 12 * 4 * 23
    assert told["tokens_per_second"] == pytest.approx(told["tokens"] / told["seconds"])
    curve = json.loads((made / "learning_curve.json").read_text())
    assert [point["step"] for point in curve["train"]] == [10, 12]
    assert curve["validation"][-1] == {"step": 12, "loss": told["validation_loss"]}
    # Learned: a guess costs log(512) = 6.24.
    assert told["validation_loss"] < curve["validation"][0]["loss"] < 6.5
    # BOS first, digits alone, and every text comes back.
    ids = tokenizer("Tom has 19 apples.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id == 1
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert "1" in pieces
    assert "9" in pieces
    assert tokenizer.decode(tokenizer("Là-bas,\n\n12 €", add_special_tokens=False)["input_ids"]) == "Là-bas,\n\n12 €"
    # What validates stands at the end of the text, and nothing of it is trained on.
    held_out = (made / "validation.txt").read_text().strip().split("\n\n")
    assert held_out == documents[-len(held_out) :]


def test_samples_are_the_documents_in_turn_with_end_and_empty_line(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    documents = ["Tom has 12 apples.", "Ida counts: 1, 2.", "The cat eats fish.", "It rains."] * 20
    samples, num_tokens = text.make_samples(documents, tokenizer, 30)
    assert {len(each.input_ids) for each in samples} == {30}
    stream = [token for each in samples for token in each.input_ids[1:]]
    assert num_tokens - 30 < len(stream) <= num_tokens
    told = tokenizer.decode(stream).lstrip()
    assert told.startswith("Tom has 12 apples.\n\nIda counts: 1, 2.</s>The cat eats fish.\n\nIt rains.</s>Tom has")


def test_a_stopped_pre_training_goes_on_as_if_it_had_not_been(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM after the seventh step; then from there: the weights and the curve are those of one go."""
    arguments = ["--out", str(tmp_path / "again"), *SHORT]
    plain, count = loop._loss, 0

    def stopping(model: Any, samples: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, samples)

    monkeypatch.setattr(loop, "_loss", stopping)
    assert pretrain_llama.main(arguments) == 128 + signal.SIGTERM
    assert {path.name for path in (tmp_path / "again").iterdir()} == {STATE_NAME}
    assert pretrain_llama.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert pretrain_llama.main([*arguments, "--resume", "--seed", "1"]) == 2
    assert "--out has a pre-training with text_sha256" in capsys.readouterr().err
    assert pretrain_llama.main([*arguments, "--resume"]) == 0
    assert count == 12
    one, other = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "again"))
    assert all(one[name].equal(other[name]) for name in one)
    curves = [json.loads((each / "learning_curve.json").read_text()) for each in (made, tmp_path / "again")]
    assert curves[0]["validation"] == curves[1]["validation"]
    # A complete one is left alone.
    before = (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns
    assert pretrain_llama.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns == before


def test_the_rate_rises_and_falls_and_the_time_gives_the_steps() -> None:
    schedule = Schedule(learning_rate=1e-3, warmup_steps=10)
    rates = [loop.rate_of(schedule, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5.5e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert loop.rate_of(schedule, 3, None) == rates[3]


def test_minutes_give_the_number_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, quick = tmp_path / "timed", [*SMALL, "--characters", "20000", "--batch", "1", "--length", "8"]
    assert pretrain_llama.main(["--out", str(out), *quick, "--minutes", "0.02"]) == 0
    told = json.loads((out / "pretraining.json").read_text())
    # At least the warm-up; how many more depends on the machine.
    assert told["steps"] >= told["schedule"]["warmup_steps"] == 50
    assert Progress().num_steps is None
    # A log tells how far it is, too.
    told_lines = capsys.readouterr().err
    assert "step 1 of as many as there is time for: loss" in told_lines
    assert f"step {told['steps']} of {told['steps']}: loss" in told_lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "300"], "--hidden is 300"),
        (["--heads", "7"], "--heads is 7"),
        (["--text", "gone.txt"], "--text is gone.txt"),
        (["--text", "short.txt"], "--text has 1 documents"),
        (["--steps", "0"], "--steps is 0"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--length", "5000"], "--length is 5000"),
        (["--out", "other"], "--out is other, which holds something else"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    (tmp_path / "short.txt").write_text("Only this.")
    assert pretrain_llama.main(["--out", "new", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_blocks_of_the_published_size_fit_every_matrix(made: Path) -> None:
    from models.families import module_map
    from models.loading import ModelConfig, load_model
    from sparse_zero.selection.config import BudgetConfig, RegionConfig, SelectionConfig
    from sparse_zero.selection.select import check_selection

    model = load_model(ModelConfig(name_or_path=str(made)))
    regions = (RegionConfig(kind="block", block_size=256, modules=("*.{q,k,v,o}_proj", "*.mlp.*_proj")),)
    check_selection(model, SelectionConfig(regions=regions, budget=BudgetConfig(fraction=0.2)), module_map(model))


@pytest.mark.slow
def test_the_launcher_trains_it_with_blocks_of_256(made: Path, tmp_path: Path) -> None:
    from models.word_problems import write_word_problems

    write_word_problems(tmp_path / "data", 24, 4, 4, seed=0)
    config = {
        "model": {"name_or_path": str(made)},
        "data": {
            "train": str(tmp_path / "data" / "train.json"),
            "forgetting": str(made / "validation.txt"),
            "forgetting_tokens": 200,
            "template": "plain",
        },
        "selection": {
            "regions": [{"kind": "block", "modules": ["*.self_attn.{q,k,v}_proj"], "block_size": 256}],
            "budget": {"fraction": 0.15},
            "calibration_batches": 2,
        },
        "training": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2},
        "zero": {"stage": 2},
        "output": {"folder": str(tmp_path / "run"), "evaluate": False, "report": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters"]["trained"] % 256**2 == 0
    assert summary["parameters"]["trained"] > 0
    assert summary["forgetting"]["num_tokens"] == 200
