"""Is the predicted cost of a budget that of the products which torch counts, and is every budget measured?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import bench_budget as bench
from scripts.bench_step import batch_of
from scripts.benchmarks.methods import MODULES, build_models, prepare_floor
from sparse_zero.errors import InputError


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_budget_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "numbers.json", tmp_path / "plot.png"
    assert bench.main(["--small", "--threads", "1", "--json", str(out), "--plot", str(plot)]) == 0
    numbers = json.loads(out.read_text())
    points = numbers["points"]
    assert [(p["kind"], p["nominal"]) for p in points] == [(k, b) for k in bench.KINDS for b in (0.02, 0.2)]
    for point in points:
        # Not more than was asked for, and less by at most a region (a block of 64, a row or column of up to 160) a matrix.
        missing = point["nominal"] * numbers["num_parameters"] - point["trained_parameters"]
        assert 0 <= missing < 160 * 14
        assert point["difference"] == point["over_floor"]["median"] - point["predicted"]
        assert point["update_over_floor"] > 0
    assert {tuple(p["modules"]) for p in points} == {MODULES, bench.ALL_MODULES}, "q, k and v do not hold the larger"
    assert len(numbers["step_seconds"]) == 2 + len(points)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "columns 20.0%" in capsys.readouterr().out


def test_the_prediction_counts_the_products_that_are_made() -> None:
    settings = bench.SMALL
    points = bench.points_of(tuple(bench.KINDS), settings)
    models = build_models({"floor": (), **{p.name: ("*",) for p in points}}, settings)
    tokens = batch_of(settings, 0)
    floor = bench.flops_of(prepare_floor(models["floor"]).learn, tokens)
    for point in points:
        ready = point.prepare(models[point.name], settings)
        counted = bench.flops_of(ready.learn, tokens) / floor
        assert counted == pytest.approx(bench.predict(ready.num_trained, floor, settings), rel=1e-9), point.name


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--kinds", "guess"]) == 2
    assert capsys.readouterr().err.strip().startswith("error: --kinds has 'guess'")
    for budgets in ("0", "0.1,1.5", "much"):
        with pytest.raises(InputError, match="--budgets"):
            bench.Settings(budgets=budgets).shares()
