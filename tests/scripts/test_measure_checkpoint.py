"""Does the script that measures checkpoints run, and does it compute what it prints?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import measure_checkpoint
from scripts.measure_checkpoint import TINY, summarize


@pytest.mark.slow
def test_stalls_and_sizes_are_measured_on_fresh_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    arguments = ["--small", "--variants", "inplace-2,delta-3", "--folder", str(tmp_path), "--json", str(out)]
    assert measure_checkpoint.main(arguments) == 0
    rows = json.loads(out.read_text())["variants"]
    assert list(rows) == ["inplace-2", "delta-3"]
    for row in rows.values():
        assert row["values"] == 10240
        assert row["formula_bytes"] == 122880 < row["bytes"] < 2 * 122880
        # All of the model, and one that leaves it out.
        assert row["deepspeed_bytes"] > 3 * row["bytes"]
        assert row["deepspeed_without_frozen_bytes"] < row["deepspeed_bytes"] / 3
        for mode in ("background", "waiting"):
            assert 0 < row[mode]["waits"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    assert "inplace-2" in capsys.readouterr().out


def test_shares_are_those_of_the_median_block() -> None:
    sizes = {"bytes": 900, "seconds": 2.0}
    found = {
        "values": 100,
        "retired": 10,
        "bytes": 1320,
        "blocks": {
            "none": [[10.0, 0.0], [8.0, 0.0], [12.0, 0.0]],
            "background": [[11.0, 0.5], [10.5, 0.21], [10.0, 0.1]],
            "waiting": [[20.0, 9.0], [12.5, 2.5], [12.0, 2.0]],
        },
        "deepspeed": sizes,
        "deepspeed_without_frozen": {**sizes, "bytes": 300},
    }
    row = summarize(found, replace(TINY, steps=100))
    assert row["step_seconds"] == pytest.approx(0.1)
    assert row["background"] == pytest.approx({"block_seconds": 10.5, "waits": 0.02, "longer": 0.05})
    assert row["waiting"] == pytest.approx({"block_seconds": 12.5, "waits": 0.2, "longer": 0.25})
    assert row["formula_bytes"] == 1280
    assert row["over_formula"] == pytest.approx(40 / 1280)
    assert (row["deepspeed_bytes"], row["deepspeed_without_frozen_bytes"]) == (900, 300)


@pytest.mark.parametrize("arguments", [["--folder", "no-such-folder"], ["--rounds", "0"], ["--variants", "full-9"]])
def test_wrong_input_is_refused(arguments: list[str]) -> None:
    assert measure_checkpoint.main(["--small", *arguments]) == 2
