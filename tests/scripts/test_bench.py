"""Does the suite run its parts, and does its summary judge the targets by paired times?"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench


@pytest.mark.slow
def test_the_suite_writes_numbers_plots_and_a_summary(tmp_path: Path) -> None:
    assert bench.main(["--small", "--parts", "budget", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"budget.json", "budget.png", "summary.md"}
    summary = (tmp_path / "summary.md").read_text()
    assert "| rows 5.0% |" in summary
    assert "![budget](budget.png)" in summary


def test_targets() -> None:
    seconds = {"floor": [1.0] * 9, "floor2": [1.0, 1.02] * 4 + [1.0], "rows": [1.01] * 9, "full": [1.4] * 9}
    rows = bench.Target("step", "rows", "floor", at_most=1.02).row(seconds)
    assert rows == ["step: rows / floor", "<= 1.02", "1.010 [1.010, 1.010]", "yes"]
    assert bench.Target("step", "rows", "floor", at_most=1.0).row(seconds)[-1] == "within noise"
    assert bench.Target("step", "full", "rows", at_least=1.5).row(seconds)[-1] == "NO"
    assert bench.Target("step", "full", "rows", at_least=1.38).row(seconds)[-1] == "yes"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--parts", "guess", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().startswith("error: --parts has 'guess': choose from step, ")
