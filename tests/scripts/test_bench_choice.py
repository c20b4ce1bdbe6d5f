"""Does the benchmark of the choice measure what it says, on regions of the right number?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import bench_choice as bench


@pytest.mark.slow
def test_every_case_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert bench.main(["--small", "--cases", "blocks,layers", "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert list(numbers["cases"]) == ["blocks", "layers"]
    for row in numbers["cases"].values():
        assert len(row["seconds"]) == bench.SMALL.repeats
        assert row["min_seconds"] == min(row["seconds"])
        assert row["peak_growth_bytes"] >= 0
        assert row["num_parameters"] + row["num_parameters_left"] == 30 * 8**2
    assert numbers["cases"]["blocks"]["chosen"] == {"block": 30, "row": 0, "column": 0}
    assert all(numbers["cases"]["layers"]["chosen"].values()), "every kind is among the chosen"
    printed = capsys.readouterr().out
    assert "blocks" in printed
    assert "layers" in printed


def test_regions_are_those_of_llama_2_7b() -> None:
    module_map = bench.build_map(bench.Settings())
    assert len(module_map.matrices) == 7 * 32
    assert sum(m.shape[0] * m.shape[1] for m in module_map.matrices) == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert module_map.num_layers == 32
    # 4 x 16 x 16 and 3 x 16 x 43 blocks in a layer; as many rows and columns as the sides of the matrices.
    settings = bench.Settings(layers=2)
    assert bench.build("blocks", settings).num_regions == 2 * (4 * 256 + 3 * 688)
    sides = 4 * 2 * 4096 + 3 * (4096 + 11008)
    assert bench.build("mixed", settings).num_regions == 2 * (4 * 256 + 3 * 688 + sides)


def test_choices_keep_to_the_division_of_the_budget() -> None:
    problem = bench.build("matrix", bench.SMALL)
    choice = problem.choose()
    part = problem.budget.parameters // len(problem.module_map.matrices)
    assert len(choice.weights) == len(problem.module_map.matrices)
    assert all(weight.num_parameters <= part for weight in choice.weights.values())
    problem = bench.build("layers", bench.SMALL)
    choice = problem.choose()
    assert [group.allowed for group in choice.groups] == [1344, 576]
    for group, name in zip(choice.groups, ("self_attn", "mlp"), strict=True):
        used = {
            layer: sum(w.num_parameters for key, w in choice.weights.items() if f".{layer}.{name}." in key)
            for layer in range(3)
        }
        assert sum(used.values()) == group.allowed - group.left
        # At least a sixth less than a region, at most a half.
        assert all(group.allowed / 6 - 80 < number <= group.allowed / 2 for number in used.values())


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--cases", "mixed,guess"]) == 2
    assert capsys.readouterr().err.strip() == f"error: --cases has 'guess': choose from {', '.join(bench.CASES)}"
