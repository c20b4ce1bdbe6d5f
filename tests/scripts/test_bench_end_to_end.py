"""Do both sides see the same samples, is each part of ours really on or off, and are the ratios those of the steps?"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launcher.training_config import TrainingConfig
from models.data import DataConfig
from scripts import bench_end_to_end as bench
from scripts.records_of_lengths import ANSWER, QUESTION, draw_lengths, write_records
from scripts.training_in_turns import METHODS, PARTS, PREVIOUS, Settings, all_positions, replace_in
from sparse_zero.errors import InputError


def test_records_are_as_long_as_they_should(tmp_path: Path) -> None:
    write_records(tmp_path, 300, 20, count_tokens=lambda text: len(text.split()), seed=3)
    records = json.loads((tmp_path / "train.json").read_text())
    drawn = draw_lengths(300, 3)
    for field, column, (mean, deviation) in (("instruction", 0, QUESTION), ("output", 1, ANSWER)):
        lengths = np.array([len(record[field].split()) for record in records])
        # A record ends with the problem that reaches its length.
        assert np.abs(lengths - drawn[:, column]).max() <= 50
        assert np.corrcoef(lengths, drawn[:, column])[0, 1] > 0.9
        assert np.log(drawn[:, column]).mean() == pytest.approx(mean, abs=0.06)
        assert np.log(drawn[:, column]).std() == pytest.approx(deviation, rel=0.1)
    validation = json.loads((tmp_path / "validation.json").read_text())
    assert not {r["instruction"] for r in validation} & {r["instruction"] for r in records}


def test_ratios_are_those_of_the_same_steps(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"trained": 7, "lowest": 0, "loss": 1.0}
    found = {
        "lora": {**facts, "seconds": [4.0, 8.0, 2.0]},
        "sparse": {**facts, "seconds": [2.0, 8.0, 2.0]},
        "depth": {**facts, "seconds": [1.0, 2.0, 1.0]},
    }
    summary = bench.summarize(found, [10, 20, 10])
    assert [row["speedup"] for row in summary.values()] == [1.0, 1.0, 4.0]
    assert summary["sparse"]["speedup_over_previous"] == 1.0
    assert summary["depth"]["speedup_over_previous"] is None, "what comes before it was not run"
    assert summary["depth"]["speedup_range"] == (2.0, 4.0)
    assert summary["depth"]["tokens_per_second"] == 10.0
    assert summary["depth"]["median_seconds"] == 1.0
    bench.table_of(summary, [1.0, 0.8, 0.5], 1).show()
    printed = capsys.readouterr().out
    assert "2.00-4.00" in printed
    assert "+ upper half" in printed
    assert "-" in next(line for line in printed.splitlines() if "upper half" in line).split()
    rows = dict.fromkeys(METHODS, summary["depth"])
    bench.table_of(rows, [1.0] * len(rows), 1).show()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    assert not any("…" in line for line in lines)
    assert any(line.strip().startswith("or: micro-") for line in lines)
    assert bench.title_of("lora_small", 2) == "LoRA, micro-\nbatches of 2"


def test_small_micro_batches_are_compared_with_those_of_lora() -> None:
    settings = Settings(batch=8, micro_batch=4, small_batch=2)
    sizes = {method: settings.micro_batch_of(method) for method in METHODS}
    assert {method for method, size in sizes.items() if size == 2} == {"lora_small", "lengths", "depth"}
    assert PREVIOUS["lengths"] == "lora_small"


def test_the_model_of_the_steps_knows_what_each_part_leaves_out(tmp_path: Path) -> None:
    from models.data import TokenizedSample
    from tests.models.tiny import tiny_llama

    # The second sample is short: half of a padded batch of both is padding, and little of it is learned.
    train = [
        TokenizedSample(list(range(200)), [-100] * 150 + list(range(50))),
        TokenizedSample(list(range(20)), [-100] * 10 + list(range(10))),
    ]
    settings = Settings(batch=2, micro_batch=2, steps=3)
    lowest = {"lora": 0, "sparse": 0, "logits": 0, "packing": 0, "lengths": 0, "depth": 2, "lora_small": 0}
    found = bench.operations(settings, tiny_llama(layers=4), (None, train, None, [0, 1]), lowest, 100)
    assert found[0] == 1.0
    assert found[0] > found[1] > found[2] > found[3] > found[4] > found[5]
    # Without padding, and in attention without the pairs that a packed row hides, but with more logits to a label.
    assert found[4] / found[2] == pytest.approx(220 / 400, abs=0.06)
    # Padding is no less of LoRA's own; what is left between the two is logits and LoRA's products.
    assert found[6] == pytest.approx(220 / 400, abs=0.06)
    assert found[6] > found[4]


def test_what_the_loop_is_given_instead_is_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under this name; and then it forms logits at all positions, of which the same have labels."""
    import launcher.train as worker
    import launcher.training_loop as loop
    from models.data import TokenizedSample
    from tests.models.tiny import tiny_llama

    assert "MetricsLog" in vars(worker)
    model, shapes = tiny_llama(layers=1), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: shapes.append(tuple(output.shape[:2])))
    state: Any = SimpleNamespace(
        config=SimpleNamespace(data=DataConfig(train="x"), training=TrainingConfig(steps=1)),
        pad_token_id=0,
        prefix_cache=None,
        world=SimpleNamespace(device=torch.device("cpu")),
        engine=model,
    )
    samples = [TokenizedSample(list(range(20)), [-100] * 15 + list(range(5)))] * 2
    few = loop._nll(state, samples)
    # At the end, monkeypatch puts back what was there.
    monkeypatch.setattr(loop, "label_positions", vars(loop)["label_positions"])
    replace_in(loop, "label_positions", all_positions)
    every = loop._nll(state, samples)
    assert shapes == [(2, 5), (2, 19)]
    torch.testing.assert_close(few, every)
    with pytest.raises(RuntimeError, match=r"has no response_nll any more"):
        replace_in(loop, "response_nll", all_positions)


def test_a_failure_ends_all_at_once(tmp_path: Path) -> None:
    """A method that cannot begin, for want of a model: what it said is told, and nobody is waited for."""
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"sparse ended early:[\s\S]*nowhere"):
        bench.measure(("sparse",), Settings(model=str(tmp_path / "nowhere"), data=str(tmp_path)), str(tmp_path), 1)
    assert time.perf_counter() - began < 50, "less than the wait for an orderly end"


def test_settings_that_time_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--methods", "lora,guess"]) == 2
    assert capsys.readouterr().err.strip() == f"error: --methods has 'guess': choose from {', '.join(METHODS)}"
    with pytest.raises(InputError, match="--warmup 3 of --steps 3"):
        Settings(warmup=3, steps=3)
    assert bench.main(["--methods", "sparse,lora"]) == 2
    assert (
        capsys.readouterr().err == "error: --methods begins with 'sparse': begin with lora, over which the ratios are\n"
    )
    with pytest.raises(InputError, match="--clock is 'sun': choose from wall, cpu"):
        Settings(clock="sun")
    with pytest.raises(InputError, match="adds up the time of 2 threads"):
        Settings(clock="cpu", threads=2)
    with pytest.raises(InputError, match="--batch 6 is no multiple of --micro-batch 4"):
        Settings(batch=6, micro_batch=4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
def test_all_methods_take_their_turns(tmp_path: Path) -> None:
    assert bench.main(["--small", "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    rows = numbers["methods"]
    assert list(rows) == list(METHODS)
    assert all(len(seconds) == 2 for seconds in numbers["step_seconds"].values())
    for method in PARTS:
        assert 0.9 * rows["lora"]["trained"] < rows[method]["trained"] <= rows["lora"]["trained"]
    # How a batch is made up changes no result: the same selection of the same steps.
    assert rows["logits"]["validation_loss"] == pytest.approx(rows["sparse"]["validation_loss"], rel=1e-5)
    assert rows["lengths"]["validation_loss"] == pytest.approx(rows["sparse"]["validation_loss"], rel=1e-5)
    assert rows["packing"]["validation_loss"] == pytest.approx(rows["sparse"]["validation_loss"], rel=1e-5)
    assert rows["depth"]["lowest_layer"] == 2
