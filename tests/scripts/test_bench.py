"""Does the suite run its parts, and does its summary judge the targets by paired times?"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench
from scripts.benchmarking import chosen_names, read_settings
from scripts.benchmarks.ratios import Ratio


@pytest.mark.slow
def test_the_suite_writes_numbers_plots_and_a_summary(tmp_path: Path) -> None:
    assert bench.main(["--small", "--parts", "budget", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"budget.json", "budget.png", "summary.md"}
    summary = (tmp_path / "summary.md").read_text()
    assert "| rows 5.0% |" in summary
    assert "![budget](budget.png)" in summary


def test_targets() -> None:
    seconds = {"floor": [1.0] * 9, "floor2": [1.0, 1.02] * 4 + [1.0], "rows": [1.01] * 9, "full": [1.4] * 9}
    rows = bench.Target("step", "rows", "floor", at_most=1.02).row(seconds)
    assert rows == ["step: rows / floor", "<= 1.02", "1.010 [1.010, 1.010]", "yes"]
    assert bench.Target("step", "rows", "floor", at_most=1.0).row(seconds)[-1] == "not told apart", "within noise"
    assert bench.Target("step", "full", "rows", at_least=1.5).row(seconds)[-1] == "NO"
    assert bench.Target("step", "full", "rows", at_least=1.38).row(seconds)[-1] == "yes"
    few = {name: each[:4] for name, each in seconds.items()}
    assert bench.Target("step", "rows", "floor", at_most=1.02).row(few)[-1] == "too few rounds"


@pytest.mark.parametrize(
    ("low", "high", "at_most", "at_least"),
    [
        (0.97, 0.99, "yes", "NO"),
        (0.97, 1.01, "not told apart", "not told apart"),  # the median alone would hold
        (0.99, 1.03, "not told apart", "not told apart"),  # and here would not
        (1.005, 1.009, "not told apart", "yes"),  # no more above than the floors are
        (0.991, 0.995, "yes", "not told apart"),
        (1.02, 1.05, "NO", "yes"),
    ],
)
def test_a_target_is_judged_by_the_interval(low: float, high: float, at_most: str, at_least: str) -> None:
    middle = (low + high) / 2
    found = Ratio(
        median=middle,
        lower_quartile=low,
        upper_quartile=high,
        low=low,
        high=high,
        of_minima=middle,
        num_rounds=9,
    )
    assert bench.Target("step", "rows", "floor", at_most=1.0).verdict(found, 0.01) == at_most
    assert bench.Target("step", "rows", "floor", at_least=1.0).verdict(found, 0.01) == at_least


@pytest.mark.parametrize("part", list(bench.PARTS))
def test_the_flags_of_a_part_are_its_scripts(part: str) -> None:
    script, flags = bench.PARTS[part]
    module = bench.MODULES[script]
    for given in (flags, ("--small", *bench.SMALL_PARTS[part])):
        options = module.parse(given)
        settings = read_settings(options, module.Settings(), module.SMALL)
        if "--methods" in given:
            chosen_names(options.methods, module.METHODS, "--methods")
        if script == "bench_layer.py":
            assert settings.shapes()
    # What a target asks for is measured.
    methods = module.parse(flags).methods.split(",") if script == "bench_step.py" else []
    wanted = {name for target in bench.targets() if target.part == part for name in (target.own, target.over, "floor2")}
    assert wanted <= set(methods)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--parts", "guess", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().startswith("error: --parts has 'guess': choose from step, ")
