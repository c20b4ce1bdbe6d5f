"""Does the benchmark of the loss run, and compare what is the same?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts import bench_loss as bench


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_loss_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["losses"]
    assert [row["loss"] for row in rows] == ["at once", "chunk 5", "chunk 8", "again 8"] * 2
    assert [row["vocabulary"] for row in rows] == [64] * 4 + [96] * 4
    assert all(len(row["step_seconds"]) == bench.SMALL.steps for row in rows)
    peaks = [row["peak_bytes"] for row in rows[:3]]
    assert peaks[1] < peaks[2] < peaks[0]
    printed = capsys.readouterr().out
    assert all(row["loss"] in printed for row in rows)


@pytest.mark.parametrize(("flag", "value"), [("--chunks", "x"), ("--vocabularies", "32,-1"), ("--chunks", "0")])
def test_bad_input_is_one_line(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--small", flag, value]) == 2
    wrong = value.rpartition(",")[2]
    assert capsys.readouterr().err == f"error: {flag} has {wrong!r}: give positive integers, joined by commas\n"


def test_all_of_them_are_one_loss() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(24, 16, requires_grad=True), torch.randn(64, 16)
    targets = torch.randint(64, (24,))
    wanted, *others = (
        (loss.detach(), *torch.autograd.grad(loss, [hidden]))
        for loss in (of(hidden, weight, targets) for of in bench.losses(bench.SMALL).values())
    )
    for found in others:
        torch.testing.assert_close(found, wanted)
