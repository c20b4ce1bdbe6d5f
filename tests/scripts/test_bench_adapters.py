"""Does every action do what it is timed for, and are the ratios those of the same rounds?"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import bench_adapters as bench

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed"),
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_action_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert list(numbers["rows"]) == list(bench.ROWS)
    assert all(len(seconds) == bench.SMALL.rounds for seconds in numbers["seconds"].values())
    assert 0.9 * numbers["trained"]["LoRA"] < numbers["trained"]["ours"] <= numbers["trained"]["LoRA"]
    printed = capsys.readouterr().out
    assert all(title in printed for title in bench.ROWS)


def test_exchanges_change_what_acts_and_loads_are_undone(tmp_path: Path) -> None:
    from tests.models.tiny import write_tiny_llama

    settings = replace(bench.SMALL, model=str(write_tiny_llama(tmp_path / "model")))
    actions, _, models = bench.make_actions(settings, tmp_path)
    tokens = torch.arange(12).reshape(1, 12)
    for name, model in models.items():
        model.eval()
        found = []
        with torch.no_grad():
            for _ in range(3):
                found.append(model(tokens).logits)
                actions[name].work()
        assert (found[0] - found[1]).abs().max() > 1e-4, name
        assert torch.allclose(found[0], found[2], atol=1e-5), name
    for _ in range(2):
        for name in ("load", "LoRA: load"):
            actions[name].work()
            actions[name].after()


def test_ratios() -> None:
    names = {name for row in bench.ROWS.values() for name in row if name is not None}
    seconds = {name: [1.0, 2.0, 6.0] for name in names}
    seconds["LoRA: load"] = [2.0, 1.0, 2.0]
    summary = bench.summarize(seconds)
    assert summary["load an adapter"] == {"seconds": 2.0, "peer_seconds": 2.0, "ratio": 2.0}
    assert summary["write-back"] == {"seconds": 2.0, "peer_seconds": None, "ratio": None}
