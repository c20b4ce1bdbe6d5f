"""Does the benchmark run, train equal numbers of parameters, and compute the ratios that it prints?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from scripts import bench_step as bench
from sparse_zero.errors import InputError


@pytest.fixture(autouse=True)
def _threads() -> object:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# PEFT 0.21 reads an attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_every_method_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = [method for method in bench.METHODS if method != "lora" or importlib.util.find_spec("peft")]
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--no-memory", "--methods", ",".join(methods), "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    rows = numbers["methods"]
    assert list(rows) == methods
    assert rows["floor"]["trained_parameters"] == 0
    assert rows["full"]["trained_parameters"] == numbers["num_parameters"]
    equal = {rows[method]["trained_parameters"] for method in methods if method not in ("floor", "full", "mixed")}
    assert equal == {2 * 3 * 4 * 64}, "2 layers, q, k and v, 4 rows of 64"
    assert 0.9 < rows["mixed"]["trained_parameters"] / 1536 <= 1.0
    assert all(len(seconds) == bench.SMALL.steps for seconds in numbers["step_seconds"].values())
    printed = capsys.readouterr().out
    assert all(method in printed for method in methods)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    peaks = {method: bench.measure_memory(method, _larger()) for method in ("floor", "full", "rows")}
    parameters = 4 * 12 * 256**2
    # Full fine-tuning holds gradients and two moments of every parameter; rows hold those of a few.
    assert peaks["full"] - peaks["rows"] > 0.8 * 3 * 4 * parameters
    assert peaks["rows"] > 0


def _larger() -> bench.Settings:
    """Large enough to stand out from what the allocator keeps: 3 million parameters and more."""
    from dataclasses import replace

    return replace(bench.SMALL, hidden=256, layers=4, intermediate=682, vocab=256)


def test_steps_train_what_they_should() -> None:
    """A step of ours lowers the loss and changes the selected share of q, k and v, nothing else."""
    for method in ("blocks", "rows", "columns"):
        model = bench.build_model(bench.SMALL)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step, trained = bench.prepare(method, model, bench.SMALL)
        tokens = bench.batch_of(bench.SMALL, 0)
        losses = [step(tokens) for _ in range(5)]
        assert losses[-1] < losses[0]
        changed = {name: int((model.state_dict()[name] != value).sum()) for name, value in before.items()}
        assert {name.split(".")[-2] for name, number in changed.items() if number} == set(bench.MODULES)
        assert 0.9 * trained < sum(changed.values()) <= trained


def test_ratios() -> None:
    seconds = {"floor": [1.0, 3.0, 2.0], "rows": [2.0, 6.0, 3.0]}
    summary = bench.summarize(seconds, {"floor": 0, "rows": 7}, {"floor": 10, "rows": 15})
    assert summary["rows"] == {
        "trained_parameters": 7,
        "median_seconds": 3.0,
        "min_seconds": 2.0,
        "median_over_floor": 1.5,
        "min_over_floor": 2.0,
        "memory_over_floor": 1.5,
        "peak_growth_bytes": 15,
    }


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--methods", "rows,guess"]) == 2
    assert capsys.readouterr().err.strip() == f"error: --methods has 'guess': choose from {', '.join(bench.METHODS)}"
    with pytest.raises(InputError, match="--rows 6 of 64 entries"):
        bench.Settings(hidden=64, rows=6)
