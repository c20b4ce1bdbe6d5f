"""Do tables and pictures say what the JSON of a study says, and nothing else?"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.plots import LIGHT, to_png
from launcher.run_folder import RunFolder
from scripts.accuracy.study_places import Places, places_as_json, places_of
from scripts.accuracy.study_plots import drawings
from scripts.accuracy.study_results import Finished, Key, _other_bases, compare, read_pieces, share_of_row
from scripts.accuracy.study_tables import as_csv, markdown, tables_of, terminal_tables
from scripts.accuracy_study import kept_remarks
from scripts.commands import command_of
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from tests.scripts.study_examples import example_results

DOCS = Path(__file__).parents[2] / "docs"


def test_a_line_has_the_numbers_of_its_row() -> None:
    results = example_results()
    (table,) = tables_of(results)
    assert len(table.rows) == len(results["rows"])
    row, line = next(
        (row, dict(zip(table.headings, line, strict=True)))
        for row, line in zip(results["rows"], table.rows, strict=True)
        if row["method"] == "blocks" and row["budget"] == 0.2
    )
    assert line["method"] == "blocks 20 %"
    assert line["accuracy %"] == f"{100 * row['score']['mean']:.1f} ± {100 * row['score']['deviation']:.1f}"
    assert line["rate"] == "0.001 (edge)"
    assert line["within 1 sd"] == "yes"
    assert line["matrices"] == "2 to 5"
    low = 100 * row["to_baseline"]["low"]
    assert line["to lora"].startswith(f"{100 * row['to_baseline']['mean']:+.1f} [{low:+.1f}, ")
    deviation = row["forgetting_after"]["deviation"]
    assert line["other text"] == f"3.100 → 3.500 ± {deviation:.3f}"
    assert share_of_row(row) == pytest.approx(200_000 / 999_230)


def test_in_a_terminal_what_was_learned_and_the_cost_are_two_tables() -> None:
    (whole,) = tables_of(example_results())
    learned, cost = terminal_tables(example_results())
    assert learned.headings[0] == cost.headings[0] == "method"
    assert sorted([*learned.headings, *cost.headings[1:]]) == sorted(whole.headings)
    assert "accuracy %" in learned.headings
    assert "tokens/s" in cost.headings
    for table in (learned, cost):
        for row, full in zip(table.rows, whole.rows, strict=True):
            assert list(row) == [full[whole.headings.index(heading)] for heading in table.headings]


def test_where_values_lie_is_read_from_selections(tmp_path: Path) -> None:
    def chosen(rows: Sequence[int]) -> WeightSelection:
        return WeightSelection(shape=(8, 4), rows=rows)

    first = {"encoder.layer.1.a.weight": chosen([0]), "encoder.layer.3.b.weight": chosen([0, 1, 2])}
    Selection({**first, "classifier.weight": chosen([5])}).save(tmp_path / "first.safetensors")
    Selection({"encoder.layer.1.a.weight": chosen([1])}).save(tmp_path / "second.safetensors")
    Selection({"classifier.weight": chosen([5])}).save(tmp_path / "head.safetensors")
    names = ("first", "second", "head", "missing")
    found = [places_of(tmp_path / f"{name}.safetensors") for name in names]
    assert found == [
        Places(num_weights=2, by_layer={1: 4, 3: 12}), Places(num_weights=1, by_layer={1: 4}), None, None
    ]  # fmt: skip
    assert places_as_json(found) == {"weights": [2, 1], "layers": [0.0, 0.625, 0.0, 0.375]}
    assert places_as_json(found[2:]) is None


def test_remarks_stay_until_others_are_given(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert kept_remarks(file, ["It rained."]) == ["It rained."]
    assert kept_remarks(file, []) == []
    file.write_text(json.dumps({"remarks": ["It rained."]}))
    assert kept_remarks(file, []) == ["It rained."]
    assert kept_remarks(file, ["It snowed.", "Twice."]) == ["It snowed.", "Twice."]
    assert kept_remarks(file, [""]) == []


def test_a_model_that_was_replaced_between_runs_is_said() -> None:
    def runs(*bases: str | None) -> list[Finished]:
        return [Finished(seed=seed, row={}, score=None, units=None, base=base) for seed, base in enumerate(bases)]

    # A head is made from the seed: another base for every seed.
    same: dict[Key, list[Finished]] = {("words", "full", None): runs("a", "b"), ("words", "lora", 0.1): runs("a", None)}
    assert _other_bases(same) == []
    (note,) = _other_bases({**same, ("words", "rows", 0.1): runs("a", "c"), ("text", "full", None): runs("d")})
    assert note.startswith("task words, seed 1: its runs began with 2 different models, b (full), c (rows)")


def test_what_is_missing_or_unequal_is_said() -> None:
    results = example_results()
    text = markdown(results)
    for word in ("Unfinished", "tuning run failed", "not equal", "for other seeds alone"):
        assert word not in text
    assert "It rained." in markdown({**results, "remarks": ["It rained."]})
    row = next(row for row in results["rows"] if row["method"] == "blocks" and row["budget"] == 0.2)
    row["num_finished"] = 2
    row["num_diverged"] = 1
    row["parameters_trained"] = 770 + 1.3 * 200_000
    row["tried"][2] |= {"accuracy": None, "loss": None}
    text = markdown(results)
    assert f"Unfinished, or ended without a number: 1 of {3 * len(results['rows'])} final runs" in text
    assert "tuning run failed, diverged ones among them: blocks 20 % at 0.001." in text
    assert "Final runs that diverged; their answers count as they are: blocks 20 %: 1." in text
    assert "Against lora, or without it the budget: blocks 20 % +30 %." in text
    results["rows"] = [each for each in results["rows"] if each["method"] != "lora"]
    row["parameters_trained"] = 770 + 0.8 * 200_000
    assert "without it the budget: blocks 20 % -20 %." in markdown(results)


def test_a_command_tells_no_folder_of_a_machine() -> None:
    overrides = ["--a.model=/x/y/model", "--a.train=../z/train.tsv", "--study.folder=runs/mine", "--b=[1, 2]"]
    found = command_of("scripts/accuracy_study.py", Path("configs/studies/words.yaml"), overrides)
    assert found == (
        "python scripts/accuracy_study.py --config configs/studies/words.yaml --a.model=.../model "
        "--a.train=.../train.tsv --study.folder=runs/mine '--b=[1, 2]'"
    )


def finished(*units: tuple[tuple[float, int], ...]) -> list[Finished]:
    """Runs of the seeds 0, 1, ..., by what their scores are means of."""
    return [
        Finished(
            seed=seed,
            row={},
            score=sum(value * weight for value, weight in each) / sum(weight for _, weight in each),
            units=each,
            base=None,
        )
        for seed, each in enumerate(units)
    ]


def test_losses_are_compared_piece_by_piece() -> None:
    reference = finished(((3.0, 100), (2.5, 100), (2.0, 50)), ((3.1, 100), (2.55, 100), (1.8, 50)))
    # Everywhere a tenth of a nat a token worse: no doubt of it.
    worse = finished(*(tuple((loss + 0.1, number) for loss, number in each.units or ()) for each in reference))
    found = compare(worse, reference)
    assert found is not None
    assert (found.num_seeds, found.num_problems) == (2, 3)
    assert [found.mean, found.low, found.high] == pytest.approx([0.1, 0.1, 0.1])
    # Worse on the short piece alone: over all tokens as the scores are, and not sure for other pieces.
    other = finished(*(((*each.units[:2], (each.units[2][0] + 1.0, 50))) for each in reference if each.units))
    found = compare(other, reference)
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.mean == pytest.approx((other[0].score or 0) - (reference[0].score or 0))
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high


def test_what_cannot_be_paired_by_pieces_is_compared_as_wholes() -> None:
    reference = finished(((3.0, 100), (2.0, 50)), ((3.1, 100), (1.8, 50)))
    cut_otherwise = finished(((3.0, 90), (2.0, 60)), ((3.1, 90), (1.8, 60)))
    for each in (cut_otherwise, [replace(cut_otherwise[0], units=None), cut_otherwise[1]]):
        found = compare(each, reference)
        assert found is not None
        assert found.num_problems is None
    # Of other data.
    assert compare(finished(((3.0, 100),), ((3.1, 100),)), reference) is None
    assert compare(finished(((1.0, 1), (0.0, 1))), finished(((1.0, 1),))) is None


def test_pieces_are_read_from_the_last_validation(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_pieces(run) is None
    rows: list[dict[str, Any]] = [{"kind": "validation", "step": 1, "loss": 2.0, "pieces": [[8.0, 4], [4.0, 2]]}]
    for pieces, expected in (
        ([[6.0, 4], [1.0, 2]], ((1.5, 4), (0.5, 2))),
        # None kept, only one, no number, no labels, damaged.
        (None, None),
        ([[6.0, 4]], None),
        ([[6.0, 4], [None, 2]], None),
        ([[6.0, 4], [1.0, 0]], None),
        ([[6.0, 4], 3], None),
    ):
        last = {"kind": "validation", "step": 2, "loss": 1.0} | ({} if pieces is None else {"pieces": pieces})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, last)))
        assert read_pieces(run) == expected


def test_the_page_says_of_what_intervals_of_losses_speak() -> None:
    results = example_results()
    task = results["tasks"]["words"]
    task |= {"metric": "loss", "num_problems": None, "is_text": True}
    for row in results["rows"]:
        for each in ("to_full", "to_baseline"):
            if row[each] is not None:
                row[each]["num_problems"] = None
    text = markdown(results)
    assert "95 % interval for other seeds. Within" in text
    assert "Losses are known as wholes: their intervals are for other seeds alone" in text
    assert "16 samples from a text, rates tuned on another part or text, tested on held-out text" in text
    rows = [row for row in results["rows"] if row["to_full"] is not None]
    for row in rows[1:]:
        for each in ("to_full", "to_baseline"):
            if row[each] is not None:
                row[each]["num_problems"] = 21
    text = markdown(results)
    assert "95 % interval for other seeds and pieces of the held-out data (21). Within" in text
    assert f"Losses of {rows[0]['label']}" in text
    for row in results["rows"]:
        row["within_full"] = None
    assert "Within 1 sd: not worse" not in markdown(results)


def test_what_a_study_read_is_told() -> None:
    results = {**example_results(), "commit": "0123456789ab+"}
    results["tasks"]["words"] |= {"base": "ba5e", "data": {"train": "7a", "test": "7e"}}
    assert ", commit 0123456789ab+; sha256 of word problems: base ba5e, train 7a, test 7e." in markdown(results)


def test_csv_and_document() -> None:
    results = example_results()
    lines = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert [float(line["score_mean"]) for line in lines] == [row["score"]["mean"] for row in results["rows"]]
    assert float(lines[0]["score_seed_2"]) == results["rows"][0]["scores"]["2"]
    text = markdown(results)
    assert "2 training records whose question is held out were left out" in text
    assert "3 candidates for each task, method and budget, seed 100, 40 steps each" in text
    assert "a head of 770 parameters beside" in text


def test_columns_without_numbers_are_left_out() -> None:
    results = example_results()
    for row in results["rows"]:
        row["forgetting_after"] = None
    assert "other text" not in tables_of(results)[0].headings
    assert set(drawings(results)) == {"share", "rates", "layers"}


def test_pictures_can_be_drawn() -> None:
    results = example_results()
    assert set(drawings(results)) == {"share", "rates", "layers", "forgetting"}
    by_method = example_results(budgets=())
    assert set(drawings(by_method)) == {"methods", "rates", "forgetting"}
    for found in (results, by_method):
        for _, draw in drawings(found).values():
            assert to_png(draw(LIGHT)).startswith(b"\x89PNG")


def test_a_method_far_from_the_others_is_told_and_does_not_press_them() -> None:
    matplotlib_text = pytest.importorskip("matplotlib.text")
    results = example_results(budgets=())
    rows = results["rows"]
    more = [{**rows[-1], "method": f"other-{number}", "label": f"other {number}"} for number in range(3)]
    for number, row in enumerate([*rows, *more]):
        mean = 0.8 + 0.01 * number
        row |= {"score": {"mean": mean, "deviation": 0.002, "count": 3}, "scores": {"1": mean}}
    results["rows"] = [*rows, *more]

    def drawn() -> tuple[list[str], tuple[float, float]]:
        figure = drawings(results)["methods"][1](LIGHT)
        return [text.get_text() for text in figure.findobj(matplotlib_text.Text)], figure.axes[0].get_xlim()

    texts, (low, high) = drawn()
    assert not any("→" in text or "←" in text for text in texts)
    assert high - low < 10
    more[0] |= {"score": {"mean": 0.2, "deviation": 0.05, "count": 3}, "scores": {"1": 0.2}}
    texts, (low, high) = drawn()
    assert "← 20 ± 5" in texts
    assert low > 70
    # Seeds that lie further apart than the means have room for it.
    for row in results["rows"]:
        row |= {"score": {"mean": 0.8, "deviation": 0.02, "count": 3}, "scores": {"1": 0.78, "2": 0.8, "3": 0.82}}
    more[0] |= {"score": {"mean": 0.83, "deviation": 0.01, "count": 3}, "scores": {"1": 0.83}}
    texts, (low, high) = drawn()
    assert not any("→" in text for text in texts)
    assert high > 83


def test_rates_that_diverged_are_told_and_do_not_press_the_others() -> None:
    matplotlib_text = pytest.importorskip("matplotlib.text")
    results = example_results()
    results["protocol"]["tuning_metric"] = "loss"
    for row in results["rows"]:
        for at, each in enumerate(row["tried"]):
            each["loss"] = 2.0 + 0.01 * at
    tried = [each for row in results["rows"] for each in row["tried"] if each["rate"] != row["rate"]]

    def limits() -> tuple[list[str], tuple[float, float]]:
        figure = drawings(results)["rates"][1](LIGHT)
        return [text.get_text() for text in figure.findobj(matplotlib_text.Text)], figure.axes[0].get_ylim()

    _, before = limits()
    assert before[0] < 2.0 < before[1] < 2.1
    # Two that diverged to the same, as they do: to what guessing has.
    tried[0]["loss"] = tried[-1]["loss"] = 10.8
    texts, after = limits()
    assert after[1] < 2.2
    assert texts.count("10.8") == 2
    # What is far better is what matters.
    chosen = next(each for row in results["rows"] for each in row["tried"] if each["rate"] == row["rate"])
    chosen["loss"] = 0.5
    assert limits()[1][0] < 0.5


def test_long_labels_above_panels_do_not_touch() -> None:
    results = example_results()
    for row in results["rows"]:
        row["label"] += ", an equal part of the budget for every matrix"
    figure = drawings(results)["rates"][1](LIGHT)
    to_png(figure)
    matplotlib_text = pytest.importorskip("matplotlib.text")
    texts = figure.findobj(matplotlib_text.Text)
    boxes = [text.get_window_extent() for text in texts if text.get_text().endswith("matrix")]
    assert len(boxes) >= 3
    for at, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[at + 1 :])
