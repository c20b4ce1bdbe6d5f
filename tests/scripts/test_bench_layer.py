"""Does the benchmark of one layer run, and train what it says?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import bench_layer as bench


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_every_method_is_timed(placement: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = torch.get_num_threads(), tmp_path / "numbers.json"
    try:
        assert bench.main(["--small", "--placement", placement, "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    assert list(json.loads(out.read_text())["median_seconds"]) == list(bench.METHODS)
    printed = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    # Four blocks of 4 by 4, or four rows or columns of 32, of 32 by 32.
    assert printed["blocks"] == "6.25%"
    assert printed["more_blocks"] == printed["rows"] == printed["columns"] == "12.50%"


def test_a_wrong_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--small", "--methods", "frozen,row"]) == 2
    assert "--methods has 'row': choose from frozen" in capsys.readouterr().err
