"""Does the benchmark of calibration run, do what it says, and compute the ratios that it prints?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import bench_calibration as bench
from sparse_zero.errors import InputError


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_method_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert list(numbers["methods"]) == list(bench.METHODS)
    assert numbers["settings"]["hidden"] == bench.SMALL.hidden
    assert all(len(seconds) == bench.SMALL.rounds for seconds in numbers["micro_batch_seconds"].values())
    assert numbers["methods"]["floor"]["min_over_floor"] == 1.0
    printed = capsys.readouterr().out
    assert all(method in printed for method in bench.METHODS)


@pytest.mark.slow
def test_methods_score_what_they_say_and_the_floor_reaches_the_embeddings() -> None:
    model = bench.build_model(bench.SMALL)
    batches = bench.batches_of(bench.SMALL, 0)
    assert len(batches) == bench.SMALL.micro_batches
    gradients: list[tuple[int, ...]] = []
    hook = model.model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda _, args: args[0].register_hook(lambda gradient: gradients.append(tuple(gradient.shape))) and None
    )
    bench.prepare("floor", model, bench.SMALL)(batches)
    hook.remove()
    assert gradients == [(2, 16, 64)] * 2
    for method in bench.METHODS:
        if method != "floor":
            scores, number = bench.prepare(method, model, bench.SMALL)(batches)
            assert number == 2
            assert {kind for _, kind in scores} == set(bench.METHODS[method]["kinds"])
            weights = {weight for weight, _ in scores}
            assert len(weights) == 2 * (3 if method.endswith("qkv") else 7)
            assert all(bool(each.any()) for each in scores.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_ratios() -> None:
    summary = bench.summarize({"floor": [1.0, 3.0, 2.0], "rows": [2.0, 6.0, 3.0]})
    assert summary["rows"] == {
        "median_seconds": 3.0,
        "min_seconds": 2.0,
        "median_over_floor": 1.5,
        "min_over_floor": 2.0,
    }
    assert "min_over_floor" not in bench.summarize({"rows": [2.0]})["rows"]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--methods", "rows,guess"]) == 2
    assert capsys.readouterr().err.strip() == f"error: --methods has 'guess': choose from {', '.join(bench.METHODS)}"
    with pytest.raises(InputError, match="--block-size 128 is larger than --hidden 64"):
        bench.Settings(hidden=64, block_size=128)
