"""Does the crash test kill where it says, find what differs, and do killed runs end as others do?"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from scripts import crash_test as script
from scripts.tiny_run import difference, result_of


@pytest.mark.slow
def test_killed_runs_end_as_others_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    arguments = ["--small", "--kills", "2", "--json", str(out), "--folder", str(tmp_path)]
    assert script.main(arguments) == 0, capfd.readouterr()
    numbers = json.loads(out.read_text())
    assert len(numbers["kills"]) == 2
    assert sum(row["kills"] for row in numbers["summary"]["phases"].values()) == 2
    assert [run["difference"] for run in numbers["runs"]] == [None] * len(numbers["runs"])
    assert numbers["summary"]["lost_max"] <= numbers["summary"]["lost_bound"]
    assert "inside a save" in capfd.readouterr().out
    # What the comparison sees.
    whole, run = tmp_path / "whole-0" / "run", tmp_path / "run-0" / "run"
    wanted = result_of(whole)
    assert {"adapter", "merged"} <= {name.split("/")[0] for name in wanted}
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    assert difference(wanted, changed) is None
    model = changed / "merged" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + bytes([model.read_bytes()[-1] ^ 1]))
    assert difference(wanted, changed) == "merged/model.safetensors differ"
    shutil.copy(run / "merged" / "model.safetensors", model)
    (changed / "checkpoints" / ".step-000002.1.tmp").mkdir()
    assert difference(wanted, changed) == "checkpoints/.step-000002.1.tmp left behind"


@pytest.mark.slow
def test_many_kills(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert script.main(["--kills", "30", "--json", str(out)]) == 0, capfd.readouterr()
    numbers = json.loads(out.read_text())
    assert {row["kills"] > 0 for row in numbers["summary"]["phases"].values()} == {True}


def _kill(phase: script.Phase, **changes: object) -> script.Kill:
    usual: dict[str, object] = {
        "kind": "",
        "meant": phase,
        "phase": phase,
        "victims": [0],
        "survivors": {1: 75},
        "ended": "by themselves",
        "step": 5,
        "lost": 0,
    }
    return script.Kill(**{**usual, **changes})  # type: ignore[arg-type]


def test_the_numbers_of_the_table() -> None:
    kills = [
        _kill("training", lost=3),
        _kill("training", lost=None, victims=[0, 1], survivors={}, ended=""),
        _kill("inside a save", lost=4, victims=[1], leftovers=["x"]),
    ]
    runs: list[dict[str, str | None]] = [{"kind": "a", "difference": None}, {"kind": "b", "difference": "x differ"}]
    summary = script.summarize(kills, runs, script.SMALL)
    training, save = summary["phases"]["training"], summary["phases"]["inside a save"]
    assert (training["kills"], training["resumes"], training["lost_mean"], training["of_both"]) == (2, 1, 3, 1)
    assert (save["of_rank_1"], save["with_leftovers"]) == (1, 1)
    assert (summary["lost_mean"], summary["lost_max"]) == (3.5, 4)
    assert summary["lost_bound"] == 2 * script.SMALL.every
    assert summary["survivor_codes"] == {"75": 2}
    assert not summary["wrong_codes"]
    assert script.summarize([_kill("loading", survivors={1: -9})], [], script.SMALL)["wrong_codes"] == 1
    assert [run["kind"] for run in summary["different"]] == ["b"]


def test_saves_are_aimed_at_until_a_third_of_the_kills_was_inside_of_one(tmp_path: Path) -> None:
    from collections import Counter
    from random import Random

    random, settings = Random(0), script.Settings()
    few, enough = [_kill("training")] * 10, [_kill("inside a save")] * 9 + [_kill("training")]
    chosen = [
        Counter(script.choose_phase(kills, [], tmp_path, settings, random) for _ in range(200))
        for kills in (few, enough)
    ]
    assert chosen[0]["inside a save"] > 150
    assert chosen[1]["inside a save"] < 20
    assert script.choose_phase([], few, tmp_path, settings, random) == "ending"
    assert script.choose_phase([], few[:-1] + [_kill("ending")] * 3, tmp_path, settings, random) is None
    assert asdict(settings)["kills"] >= 200
