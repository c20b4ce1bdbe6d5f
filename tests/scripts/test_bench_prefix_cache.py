"""Does the benchmark of the frozen-prefix cache run, train the same in all its ways, and compute what it prints?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import bench_prefix_cache as bench


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_all_ways_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--json", str(out), "--folder", str(tmp_path)]) == 0
    numbers = json.loads(out.read_text())
    assert all(len(numbers["step_seconds"][way]) == bench.SMALL.steps for way in bench.WAYS)
    assert 0.2 < numbers["found"]["predicted"] < 0.8
    assert "later epoch" in capsys.readouterr().out
    assert 0 <= numbers["found"]["loss_difference"] < 1e-6
    assert bench.main(["--small", "--stored", "float8", "--json", str(out)]) == 0
    assert 1e-6 < json.loads(out.read_text())["found"]["loss_difference"] < 1e-2
    assert list(tmp_path.iterdir()) == [out]
    assert bench.main(["--small", "--min-layer", "4"]) == 2
    assert bench.main(["--small", "--stored", "fp8"]) == 2


def test_all_ways_have_the_same_losses(tmp_path: Path) -> None:
    losses = {}
    for way in bench.WAYS:
        step = bench.prepare(way, bench.SMALL, tmp_path)
        losses[way] = [step(number) for number in range(4)]
    assert losses["first"] == losses["plain"]
    assert losses["later"] == pytest.approx(losses["plain"], rel=1e-6)


def test_ratios() -> None:
    found = bench.summarize({"plain": [4.0, 5.0, 9.0], "first": [4.0, 6.0, 7.0], "later": [1.0, 3.0, 4.0]}, 0.4)
    assert found["median_later_over_first"] == 0.5
    assert found["min_later_over_first"] == 0.25
    assert found["median_later_over_plain"] == 0.6
    assert found["first_over_plain"] == 1.2
    # Of the same round, 1/4, 3/5 and 4/9, as predicted for a step of which nothing is left out.
    assert found["paired_later_over_plain"] == pytest.approx(4 / 9)
    assert found["measured_over_predicted"] == pytest.approx(4 / 9 / 0.4)
