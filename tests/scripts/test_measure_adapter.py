"""Does the script that measures adapters run, and does it measure an adapter of the size that was asked for?"""

import json
from pathlib import Path

import pytest

from scripts import measure_adapter as script
from tests.models.tiny import write_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_every_time_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    base, out = write_tiny_llama(tmp_path / "base", layers=1), tmp_path / "adapter.json"
    arguments = ["--model", str(base), "--fraction", "0.05", "--block-size", "8", "--repeats", "1", "--json", str(out)]
    assert script.main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["values"] == pytest.approx(0.05 * found["parameters"], rel=0.05)
    assert 4 * found["values"] < found["bytes"] < 4 * found["values"] + 30_000
    assert list(found["seconds"]) == ["save", "load", "exchange", "load with PEFT"]
    assert all(taken > 0 for taken in found["seconds"].values())
    assert f"{found['values']:,} values of" in capsys.readouterr().out
