"""Do the cases of the memory verification meet, and would it notice a wrong forecast or a wrong simulation?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import verify_memory
from scripts.memory import covering, measured_cases, memory_cases
from scripts.memory.in_processes import finished, run_all
from scripts.memory.memory_errors import Compared, PhaseCompared, compare, print_comparison
from sparse_zero.memory.closed_form.forecast import Forecast
from sparse_zero.memory.closed_form.moments import Moment, Term


def test_every_pair_of_settings_meets() -> None:
    cases = memory_cases.covering_cases(verify_memory.NUM_CASES)
    assert len(cases) >= 120
    assert len({case.name for case in cases}) == len(cases)
    met = set()
    for case in cases:
        values = {name: getattr(case, name) for name in memory_cases.FACTORS}
        assert memory_cases.is_possible(values)
        met |= covering.pairs_of(values)
    needed = covering.needed_pairs(memory_cases.FACTORS, memory_cases.is_possible, memory_cases.is_needed)
    assert needed <= met
    assert (("stage", 3), ("world_size", 1024)) in needed
    assert (("method", "full"), ("placement", "delta")) not in needed
    # Fast models meet every method.
    assert {(c.model, c.method) for c in cases} >= {("llama-2-7b", method) for method in ("smt", "full", "dora")}
    assert cases == memory_cases.covering_cases(verify_memory.NUM_CASES)


def test_real_runs_cover_ranks_stages_and_checkpointing() -> None:
    cases = measured_cases.measured_cases()
    assert len(cases) >= 30
    assert len({case.name for case in cases}) == len(cases)
    assert {(case.stage, case.world_size) for case in cases} == {(s, w) for s in range(4) for w in (1, 2, 3, 4)}
    assert {(case.stage, case.checkpointing) for case in cases} == {(s, c) for s in range(4) for c in (False, True)}
    assert {case.model for case in cases} == set(measured_cases.CONFIGS)


def _case(peak: int, kinds: dict[str, int]) -> tuple[Forecast, dict[str, object]]:
    terms = [
        Term(name="base", kind="weights", num_bytes=kinds["weights"]),
        Term(name="kept", kind="activations", num_bytes=kinds["activations"]),
    ]
    forecast = Forecast([Moment(phase="load", name="end", terms=(terms[0],)),
                         Moment(phase="forward", name="loss", terms=tuple(terms))])  # fmt: skip
    phases = {
        "load": {"peak_bytes": 100, "by_kind": {"weights": 100}, "module": ""},
        "forward": {"peak_bytes": peak, "by_kind": {"weights": 100, "activations": peak - 100}, "module": "head"},
        "save": {"peak_bytes": 90, "by_kind": {"weights": 90}, "module": ""},
    }
    simulated = {"peak_bytes": peak, "phases": phases, "parameters": 7_000_000_000}
    return forecast, {"simulated": simulated, "seconds": 3.0, "process_bytes": 10**9}


def test_errors_are_by_phase_and_kind_and_missed_bounds_fail(capsys: pytest.CaptureFixture[str]) -> None:
    forecast, row = _case(200, {"weights": 100, "activations": 98})
    found = compare("a case", forecast, row)
    assert found.error == pytest.approx(-0.01)
    assert found.phases["forward"].error == pytest.approx(-0.01)
    assert found.phases["save"].error == -1.0  # Simulated, and not forecast.
    assert found.phases["forward"].forecast_kinds == {"weights": 100, "activations": 98}
    assert print_comparison([found], details=True)
    told = capsys.readouterr().out
    assert "1 of 1 cases compared" in told
    assert "activations" in told
    # A median of 2% and a worst of 5% are allowed, of the peak.
    off = compare("off", *_case(200, {"weights": 100, "activations": 112}))
    assert off.error == pytest.approx(0.06)
    assert not print_comparison([found, found, off], details=False)
    assert not print_comparison([found, replace(found, seconds=61.0)], details=False)
    assert not print_comparison([found, replace(found, process_bytes=5 * 2**30)], details=False)
    assert not print_comparison([found, Compared(name="b", failed="why\nbecause")], details=False)
    assert "because" in capsys.readouterr().out


def test_a_phase_without_bytes_has_no_error() -> None:
    empty = PhaseCompared(
        forecast=0, simulated=0, forecast_kinds={}, simulated_kinds={}, moment="end", module=""
    )  # fmt: skip
    assert empty.error == 0.0


def test_real_runs_are_judged_by_the_rank_that_holds_most() -> None:
    def rank(backward: int, growth: int) -> dict[str, object]:
        peaks = {"engine": 50, "forward": 90, "backward": backward, "step": 60}
        return {"growth_bytes": growth, "phases": {name: {"peak_bytes": peak} for name, peak in peaks.items()}}

    simulated = {name: {"peak_bytes": peak} for name, peak in
                 {"load": 999, "engine": 50, "forward": 90, "backward": 100, "step": 60}.items()}  # fmt: skip
    row = {"simulated": {"phases": simulated}, "ranks": [rank(95, 105), rank(98, 90)], "seconds": 1.0}
    found = measured_cases.judge("a run", row)
    assert (found.simulated, found.tensors, found.growth) == (100, 98, 105)
    assert found.tensor_error == pytest.approx(100 / 98 - 1)
    assert measured_cases.is_right(found) == (True, True)
    assert measured_cases.is_right(replace(found, tensors=96, growth=112)) == (False, False)
    assert measured_cases.print_measured([found])
    assert not measured_cases.print_measured([found, replace(found, tensors=96)])
    assert not measured_cases.print_measured([found, measured_cases.judge("b", {"failed": "why"})])


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    results, done = tmp_path / "results.jsonl", []

    def work(name: str) -> dict[str, object]:
        done.append(name)
        return {"failed": "why"} if name == "c" else {"value": len(name)}

    def told(name: str, found: dict[str, object]) -> None:
        pass

    first = run_all(["a", "c"], work, results, workers=2, on_result=told)
    assert first["c"]["failed"] == "why"
    assert list(finished(results)) == ["a"]
    with results.open("a") as file:  # As a program that was killed leaves it.
        file.write('{"name": "b", "val')
    found = run_all(["a", "b", "c"], work, results, workers=1, on_result=told)
    assert sorted(done) == ["a", "b", "c", "c"]
    assert [found[name].get("value") for name in "abc"] == [1, 1, None]
    assert [json.loads(line)["name"] for line in results.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "--forecast or --measured"), (["--forecast", "--quick", "--only", "none"], "--only is 'none'")],
)
def test_wrong_input_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_memory.main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_forecast_is_held_against_its_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--forecast", "--quick", "--only", "tiny-llama smt z", "--out", str(tmp_path)]
    out = tmp_path / "numbers.json"
    assert verify_memory.main([*arguments, "--json", str(out)]) in (0, 1)
    found = json.loads(out.read_text())
    assert [case["failed"] for case in found] == [None, None]
    for case in found:
        assert case["forecast"] == pytest.approx(case["simulated"], rel=0.05)
    # A rerun simulates nothing.
    before = (tmp_path / "forecast.jsonl").read_bytes()
    assert verify_memory.main(arguments) in (0, 1)
    assert (tmp_path / "forecast.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_real_run_is_held_against_its_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--measured", "--quick", "--only", "smt z2 w2", "--out", str(tmp_path)]
    assert verify_memory.main(arguments) == 0, capsys.readouterr().out
    (row,) = finished(tmp_path / "measured.jsonl").values()
    assert len(row["ranks"]) == 2
    assert all(rank["growth_bytes"] > 0 for rank in row["ranks"])
