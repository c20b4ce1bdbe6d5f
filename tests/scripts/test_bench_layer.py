"""Does the benchmark of one linear train equal parts by every method, and count the products that are really made?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from scripts import bench_layer as bench
from scripts.benchmarks.methods import DELTA, OURS, PUBLISHED
from sparse_zero.errors import InputError
from tests.flop_counting import flop_counter

HAS_PEFT = importlib.util.find_spec("peft") is not None
METHODS = [method for method in bench.METHODS if HAS_PEFT or method not in ("lora", "dora")]


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_method_is_timed_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--threads", "1", "--methods", ",".join(METHODS), "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert list(numbers["sizes"]) == ["64x64", "64x96"]
    for found in numbers["sizes"].values():
        rows = found["methods"]
        assert list(rows) == METHODS
        assert all(len(seconds) == bench.SMALL.rounds for seconds in found["seconds"].values())
        assert rows["floor"]["over_floor"]["median"] == 1.0
        assert rows["products"]["roofline_share"] == pytest.approx(1.0)
        assert [method for method in rows if "write_back_seconds" in rows[method]] == [*OURS, *DELTA]
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert "only 3 rounds" in printed


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (64, 128)])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "dora"])
def test_parts_are_equal_and_products_are_counted(method: str, in_features: int, out_features: int) -> None:
    """DoRA's weight norm is no product that torch counts."""
    layer = bench.prepare(method, in_features, out_features, bench.SMALL)
    part = in_features * out_features // 16
    if method in (*PUBLISHED, *OURS, *DELTA):
        assert 0.85 * part < layer.num_trained <= part, "mixed owns each entry once"
    x = torch.randn(bench.SMALL.tokens, in_features, requires_grad=True)
    with flop_counter() as counter:
        layer.call(x, torch.randn(bench.SMALL.tokens, out_features))
    assert counter.get_total_flops() == pytest.approx(layer.flops, rel=0.02 if "mixed" in method else 0)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--methods", "rows,guess"]) == 2
    assert capsys.readouterr().err.strip().startswith("error: --methods has 'guess'")
    for size in ("64", "64x63", "32x64", "64xa"):
        with pytest.raises(InputError, match=f"--sizes has '{size}'"):
            bench.Settings(sizes=f"64x64,{size}").shapes()
