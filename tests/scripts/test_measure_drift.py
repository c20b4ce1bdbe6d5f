"""Does the script that measures drift run, and does it tell a lost change from a kept one?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import measure_drift as script


def test_a_change_is_compared_entry_by_entry() -> None:
    start = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    wanted = start + torch.tensor([0.3, 0.0, -0.4, 0.0], dtype=torch.float64)
    assert script.compare(start, wanted, wanted) == pytest.approx(
        {"relative_distance": 0.0, "cosine": 1.0, "lost_fraction": 0.0}
    )
    # The second moved entry stayed where it was; that unmoved ones stay is no loss.
    half = start + torch.tensor([0.3, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert script.compare(start, wanted, half) == pytest.approx(
        {"relative_distance": 0.8, "cosine": 0.6, "lost_fraction": 0.5}
    )


def test_every_variant_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drift.json"
    assert script.main(["--small", "--rates", "1e-5", "--json", str(out)]) == 0
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(script.VARIANTS)
    nearest, stochastic = rows["inplace-nearest"], rows["inplace-stochastic"]
    # Five steps of 1e-5: most entries of a weight in bf16 cannot show them; masters and deltas can.
    assert nearest["lost_fraction"] > 0.3
    assert stochastic["lost_fraction"] < nearest["lost_fraction"]
    assert nearest["saved_relative_distance"] < 0.1
    assert rows["delta-bf16"]["relative_distance"] < 0.1
    assert rows["inplace-no-masters"]["saved_relative_distance"] > 0.3
    printed = capsys.readouterr().out
    assert printed.count("| 1e-05 |") == len(rows)


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--small", "--variants", "up"]) == 2
    assert "--variants has 'up'" in capsys.readouterr().err
