"""Does the benchmark of the start tell what each part takes, and refuse what it cannot start?"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from scripts import bench_start as bench
from tests.models.tiny import write_tiny_llama


def test_parts_add_up_and_inner_ones_interrupt_outer_ones() -> None:
    began = time.monotonic() - 1.0
    marks = bench.Marks(began)
    inner = marks.timed(lambda: time.sleep(0.02), "model")

    def outer() -> None:
        time.sleep(0.03)
        inner()

    marks.timed(outer, "data")()
    marks.go_on("rest")
    now = time.monotonic()
    marks._take()
    assert sum(marks.seconds.values()) == pytest.approx(now - began, abs=0.01)
    assert marks.seconds["imports"] == pytest.approx(1.0, abs=0.01)
    assert marks.seconds["model"] == pytest.approx(0.02, abs=0.01)
    assert marks.seconds["data"] == pytest.approx(0.03, abs=0.01)


@pytest.mark.slow
def test_every_kind_of_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "model")
    out = tmp_path / "numbers.json"
    arguments = [
        "--small",
        "--cold",
        "--model",
        str(tmp_path / "model"),
        "--json",
        str(out),
        "--beside",
        str(bench.ROOT),
    ]
    monkeypatch.setattr("sys.argv", ["bench_start.py", *arguments])
    assert bench.main() == 0
    starts = json.loads(out.read_text())["starts"]
    assert set(starts) == {*bench.KINDS, *(f"before: {kind}" for kind in bench.KINDS[:3])}
    for (one,) in starts.values():
        assert one["seconds"] > 0.5
    (train,) = starts["train"]
    assert set(train["parts"]) == set(bench.PARTS), "every function that is timed was called"
    assert train["seconds"] == pytest.approx(sum(train["parts"].values()))


def test_a_folder_that_is_no_checkout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_start.py", "--beside", str(tmp_path)])
    assert bench.main() == 2
    assert "which is no checkout" in capsys.readouterr().err
