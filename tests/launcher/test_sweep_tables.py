"""Are the table, the means and the picture of a sweep what its run folders say?"""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import sweep as command
from launcher.config import resolved_yaml
from launcher.run_folder import RunLock
from launcher.sweep.collecting import NUMBERS, Group, Mean, collect, group
from launcher.sweep.plot import MAX_LINES, default_metric, lines_of, numeric_key, sweep_figure
from launcher.sweep.points import expand
from launcher.sweep.progress import SweepProgress
from launcher.sweep.running import last_lines
from launcher.sweep.sweep_config import PLACE_COLUMNS, SweepConfig
from launcher.sweep.sweep_folder import STATES, Listed, SweepFolder, list_points
from launcher.sweep.tables import (
    SHOWN,
    describe,
    format_mean,
    markdown,
    means_table,
    points_table,
    write_csv,
    write_parquet,
)
from tests.launcher import synthetic_run
from tests.launcher.test_bad_input import run_mapping

GRID = {
    "method": {"a|b": {}, "rows": {"training.micro_batch_size": 2}},
    "training.learning_rate": [1e-3, 1e-2],
    "training.seed": [0, 1],
}


def finish(folder: SweepFolder, name: str, **changes: Any) -> None:
    """A run folder as a finished run leaves it."""
    run = folder.run(name)
    run.path.mkdir(parents=True)
    run.summary.write_text(json.dumps({**synthetic_run.summary(), **changes}))
    rows = [{"kind": "validation", "step": step, "loss": loss} for step, loss in ((1, 0.9), (2, 0.4), (3, 0.5))]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made(tmp_path: Path) -> tuple[SweepFolder, SweepConfig, list[Listed]]:
    """Eight points: six are finished, one failed, one is not begun."""
    folder, config = SweepFolder(tmp_path), SweepConfig(folder=str(tmp_path), grid=GRID)
    listed = list_points([], expand(config, run_mapping()))
    for number, each in enumerate(listed[:6]):
        finish(folder, each.name, final_loss=1.0 + number, accuracy={"base": 0.1, "tuned": 0.5 + 0.01 * number})
    folder.write_outcome(listed[6].name, 1, 3.0)
    return folder, config, listed


def test_a_row_has_the_settings_the_state_and_the_numbers(made: tuple[SweepFolder, SweepConfig, list[Listed]]) -> None:
    folder, _, listed = made
    rows, notes = collect(folder, listed)
    assert not notes
    assert [row["state"] for row in rows] == ["finished"] * 6 + ["failed", "missing"]
    assert [row["exit_code"] for row in rows] == [None] * 6 + [1, None]
    first = rows[0]
    assert tuple(first) == ("index", "name", *GRID, "state", "exit_code", *NUMBERS)
    assert {*PLACE_COLUMNS} == {*first} - {*GRID, *NUMBERS}
    expected = {
        "method": "a|b", "training.learning_rate": 1e-3, "training.seed": 0, "final_loss": 1.0,
        "validation_loss_best": 0.4, "validation_loss_last": 0.5, "accuracy_base": 0.1, "accuracy_tuned": 0.5,
        "forgetting_base": 2.3125, "forgetting_tuned": 2.375, "forgetting_change": 0.0625,
        "parameters_trained": 1_376_256, "parameters_fraction": 1_376_256 / 134_515_008,
        "peak_memory_bytes": 1_450_000_000, "tokens_per_second": 612.4, "adapter_bytes": 5_560_320,
        "train_seconds": 471.2, "total_seconds": pytest.approx(621.4), "steps": 150, "world_size": 2,
    }  # fmt: skip
    assert {key: first[key] for key in expected} == expected
    assert all(rows[-1][name] is None for name in NUMBERS)


def test_times_of_a_continued_point_are_not_those_of_a_whole_run(tmp_path: Path) -> None:
    folder, config = SweepFolder(tmp_path), SweepConfig(folder=str(tmp_path), grid={"training.seed": [0, 1]})
    listed = list_points([], expand(config, run_mapping()))
    finish(folder, listed[0].name)
    finish(folder, listed[1].name, resumed_after_step=7)
    whole, row = collect(folder, listed)[0]
    assert whole["total_seconds"] > 0
    assert row["final_loss"] is not None
    assert {row[name] for name in row if name.endswith("_seconds")} == {None}
    assert row["peak_memory_bytes"] is None


def test_every_state(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    for code, state in (
        (0, "stopped"),
        (130, "stopped"),
        (143, "stopped"),
        (1, "failed"),
        (2, "failed"),
        (137, "failed"),
    ):
        run = folder.run(f"x={code}")
        run.path.mkdir()
        run.config.write_text("")
        folder.write_outcome(f"x={code}", code, 1.0)
        assert folder.state(f"x={code}") == state
        with RunLock(run.path) as lock:
            lock.take()
            assert folder.state(f"x={code}") == "running"
    assert folder.state("x=new") == "missing"
    finish(folder, "x=done")
    folder.write_outcome("x=done", 1, 1.0)
    assert folder.state("x=done") == "finished"
    assert STATES == ("finished", "running", "failed", "stopped", "missing")


def test_a_damaged_folder_is_a_note_and_not_the_end_of_the_table(
    made: tuple[SweepFolder, SweepConfig, list[Listed]],
) -> None:
    folder, _, listed = made
    folder.run(listed[0].name).summary.write_text("{")
    folder.outcome(listed[7].name).write_text("{")
    rows, (first, second) = collect(folder, listed)
    assert first.startswith(f"{listed[0].name}: ")
    assert "summary.json" in first
    assert rows[0]["final_loss"] is None
    assert second.startswith(f"{listed[7].name}: ")
    assert rows[7]["state"] == "damaged"


def test_means_and_deviations_over_seeds(made: tuple[SweepFolder, SweepConfig, list[Listed]]) -> None:
    folder, config, listed = made
    rows, _ = collect(folder, listed)
    groups = group(rows, list(GRID), config.repeats)
    assert [(each.num_finished, each.num_failed, each.num_points) for each in groups] == [
        (2, 0, 2), (2, 0, 2), (2, 0, 2), (0, 1, 2),
    ]  # fmt: skip
    assert groups[1].settings == {"method": "a|b", "training.learning_rate": 1e-2}
    assert groups[1].numbers["final_loss"] == Mean(mean=3.5, deviation=statistics.stdev([3.0, 4.0]))
    assert groups[3].numbers == {}
    # Without repeats, every point is its own group, and nothing deviates.
    alone = group(rows, list(GRID), ())
    assert len(alone) == 8
    assert alone[0].numbers["final_loss"] == Mean(mean=1.0, deviation=None)


def test_a_mean_says_of_how_many_it_is_where_a_repeat_diverged(
    made: tuple[SweepFolder, SweepConfig, list[Listed]],
) -> None:
    folder, config, listed = made
    summary = folder.run(listed[1].name).summary
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "final_loss": None}))
    groups = group(collect(folder, listed)[0], list(GRID), config.repeats)
    assert groups[0].num_finished == 2
    assert groups[0].numbers["final_loss"] == Mean(mean=1.0, deviation=None, num_points=1)
    assert groups[0].numbers["steps"].num_points is None
    lines = markdown(groups, list(GRID), config.repeats).splitlines()
    assert "n: how many have the number" in lines[0]
    assert "| 2/2 | 1.0000 (n=1) |" in lines[4]


def test_files_hold_the_table(made: tuple[SweepFolder, SweepConfig, list[Listed]], tmp_path: Path) -> None:
    import pyarrow.parquet

    folder, _, listed = made
    rows, _ = collect(folder, listed)
    # Settings of all kinds in one column.
    for row, value in zip(rows, [1, 'a,\n"b', None, [1, "x"], {"y": 2}, True, 0.5, "z"], strict=True):
        row["training.seed"] = value
    write_csv(folder.table, rows)
    with folder.table.open(newline="") as file:
        read = list(csv.DictReader(file))
    texts = ["1", 'a,\n"b', "", '[1, "x"]', '{"y": 2}', "true", "0.5", "z"]
    assert [row["training.seed"] for row in read] == texts
    assert [row["final_loss"] for row in read] == ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "", ""]
    write_parquet(folder.parquet, rows)
    table = pyarrow.parquet.read_table(folder.parquet).to_pydict()
    assert list(table) == list(rows[0])
    assert table["training.seed"] == [
        None if row["training.seed"] is None else text for row, text in zip(rows, texts, strict=True)
    ]
    assert table["training.learning_rate"] == [1e-3, 1e-3, 1e-2, 1e-2] * 2
    assert table["final_loss"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, None, None]


def test_markdown_and_terminal(made: tuple[SweepFolder, SweepConfig, list[Listed]]) -> None:
    from rich.console import Console

    folder, config, listed = made
    rows, _ = collect(folder, listed)
    groups = group(rows, list(GRID), config.repeats)
    lines = markdown(groups, list(GRID), config.repeats).splitlines()
    assert "over training.seed" in lines[0]
    assert lines[2].startswith("| method | training.learning_rate | finished | loss | best val. loss | accuracy % |")
    assert lines[4].startswith(
        "| a\\|b | 0.001 | 2/2 | 1.5000 ± 0.7071 | 0.4000 ± 0.0000 | 50.5 ± 0.7 | 0.0625 ± 0.0000 | 1.023 ± 0.000 |"
    )
    assert lines[7].startswith("| rows | 0.01 | 0/2 (1 failed) | – |")
    assert len({line.replace("\\|", "").count("|") for line in lines[2:]}) == 1
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(means_table(groups, config.repeats))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "1.5000±0.7071" in text
    # No setting is torn.
    assert {"method=a|b", "method=rows", "learning_rate=0.001", "learning_rate=0.01"} < set(text.split())


def test_the_command_offers_what_can_be_shown() -> None:
    assert tuple(SHOWN) == command._METRICS
    assert set(SHOWN) <= set(NUMBERS)


def test_formats() -> None:
    assert format_mean(None, SHOWN["final_loss"]) == "–"
    assert format_mean(Mean(mean=0.471, deviation=None), SHOWN["accuracy_tuned"]) == "47.1"
    assert format_mean(Mean(mean=2**31, deviation=2**29), SHOWN["peak_memory_bytes"]) == "2.00 ± 0.50"
    assert describe({"training.seed": 1, "selection.seed": None}) == "training.seed=1 selection.seed=null"


def test_a_picture_has_a_line_for_each_other_setting_and_its_deviations(
    made: tuple[SweepFolder, SweepConfig, list[Listed]],
) -> None:
    pytest.importorskip("matplotlib")
    folder, config, listed = made
    groups = group(collect(folder, listed)[0], list(GRID), config.repeats)
    assert numeric_key(config) == "training.learning_rate"
    assert default_metric(groups) == "accuracy_tuned"
    deviation = statistics.stdev([0.5, 0.51])
    lines = lines_of(groups, "training.learning_rate", "accuracy_tuned")
    assert list(lines) == ["method=a|b", "method=rows"]
    assert [point for line in lines.values() for point in line] == [
        pytest.approx((1e-3, 0.505, deviation)),
        pytest.approx((1e-2, 0.525, deviation)),
        pytest.approx((1e-3, 0.545, deviation)),
    ]
    (axes,) = sweep_figure(lines, "training.learning_rate", "accuracy_tuned").axes
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "accuracy %"
    bars: Any = axes.containers
    first, _ = bars
    assert list(first.lines[0].get_ydata()) == pytest.approx([50.5, 52.5])
    low, high = first.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((50.5 - 100 * deviation, 50.5 + 100 * deviation))
    # All lines that are allowed can be told apart.
    many = {f"line {number}": [(1.0, 0.5, 0.0), (2.0, 0.6, 0.0)] for number in range(MAX_LINES)}
    (axes,) = sweep_figure(many, "x", "final_loss").axes
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == MAX_LINES
    assert axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    ("grid", "key"),
    [
        ({"training.seed": [0, 1]}, None),
        ({"zero.stage": [2]}, None),
        ({"checkpoint.every": [None, 2], "zero.stage": [1, 2], "data.max_length": [8, 9]}, "zero.stage"),
        ({"zero.exact": [True, False]}, None),
    ],
)
def test_what_lies_along_the_axis(grid: dict[str, Any], key: str | None) -> None:
    assert numeric_key(SweepConfig(folder="x", grid=grid)) == key


def test_lines_say_how_long_it_takes() -> None:
    from rich.console import Console

    now, file = [0.0], io.StringIO()
    with SweepProgress(3, Console(file=file, width=40), lambda: now[0]) as progress:
        progress.start("a=1")
        now[0] = 10.0
        progress.end("a=1", "finished")
        progress.start("a=2")
        now[0] = 14.0
        progress.end("a=2", "failed with exit code 1", ["[red]why"])
        progress.start("a=3")
    assert file.getvalue().splitlines() == [
        "[1/3] a=1",
        "[1/3] a=1: finished after 10.0 s",
        "[2/3] a=2, about 20.0 s left",
        "[2/3] a=2: failed with exit code 1 after 4.0 s",
        "    [red]why",
        "[3/3] a=3, about 7.0 s left",
    ]


def test_a_bar_in_a_terminal() -> None:
    from rich.console import Console

    file = io.StringIO()
    with SweepProgress(2, Console(file=file, width=80, force_terminal=True)) as progress:
        progress.start("a=1")
        progress.end("a=1", "finished")
    assert "a=1: finished" in file.getvalue()
    assert "1/2" in file.getvalue()


def test_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"before\n" + b"\x1b[31mred\x1b[0m \xff\rbar\n\n" + b"".join(b"line %d\n" % n for n in range(20)))
    assert last_lines(log, 7) == [f"line {number}" for number in range(5, 20)]
    log.write_bytes(b"before\n\x1b[31mred\x1b[0m \xff\rbar\x07\n\n")
    assert last_lines(log, 7) == ["red \ufffd", "bar"]
    assert last_lines(tmp_path / "none") == []
    # What the point itself says comes first, however much its launcher says after it.
    log.write_text("".join(f"sparse-zero: error: {number}\n" for number in range(9)) + "Traceback\n" * 20)
    assert last_lines(log) == [*(f"sparse-zero: error: {number}" for number in range(3)), *["Traceback"] * 15]


def test_a_finished_run_may_have_been_run_elsewhere(made: tuple[SweepFolder, SweepConfig, list[Listed]]) -> None:
    """What is finished is what its folder says, not what a sweep remembers."""
    folder, _, listed = made
    point = listed[7].point
    assert point is not None
    finish(folder, point.name)
    folder.run(point.name).config.write_text(resolved_yaml(point.config))
    assert folder.state(point.name) == "finished"


def test_a_dry_run_says_what_a_name_does_not() -> None:
    from rich.console import Console

    grid = {"data.train": ["folder with spaces/train.json", "b.json"]}
    listed = list_points([], expand(SweepConfig(folder="x", grid=grid), run_mapping()))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(points_table(listed, ["missing", "failed"]))
    text = console.export_text()
    assert "train=folder with spaces/train.json" in text
    assert text.count("b.json") == 1


def test_groups_of_values_that_python_takes_for_equal() -> None:
    numbers = dict.fromkeys(NUMBERS)
    rows = [{"a": value, "state": "missing", **numbers} for value in (1, True, 1.0)]
    groups = group(rows, ["a"], ())
    assert [each.settings["a"] for each in groups] == [1, True, 1.0]
    assert isinstance(groups[0], Group)
    assert len(groups) == 3
