"""Are the runs of a study those that its config says, under one protocol, and kept from the test data while tuning?"""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.sweep.sweep_folder import SweepFolder
from launcher.yaml_files import read_mapping
from scripts.accuracy.study_config import read_study
from scripts.accuracy.study_points import check_same_protocol, setups_of
from scripts.accuracy.study_results import tuned_of
from scripts.accuracy.study_running import check_finished, list_points
from sparse_zero.errors import InputError
from sparse_zero.selection.candidates import match_names
from tests.scripts.study_examples import CONFIGS, SIZES, STUDIES, all_points, read_example


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_is_runs_that_could_be_started(path: Path) -> None:
    config = read_study(path)
    assert config.study.folder == f"runs/studies/{path.stem}"
    assert len(config.study.seeds) >= 3
    tuning, finals = all_points(config)
    check_same_protocol([*tuning, *finals])
    names = [point.name for point in (*tuning, *finals)]
    assert len(set(names)) == len(names)
    for point in tuning:
        # The file of the test data is named in no place.
        assert "held-out" not in repr(point.config)
        assert point.seed not in config.study.seeds
    for point in finals:
        assert "development" not in repr(point.config)
    # As many candidates for every method that has any.
    assert len({len(setup.method.rates) for setup in setups_of(config) if setup.method.rates}) == 1


def test_the_plateau_has_five_budgets_of_three_methods() -> None:
    config = read_study(next(path for path in STUDIES if path.stem == "plateau"))
    setups = setups_of(config)
    assert {setup.method.name for setup in setups if len(setup.method.budgets) == 5} == {
        "lora",
        "blocks",
        "diagonal",
        "mixed",
    }
    _, finals = all_points(config)
    found = {
        point.setup.key[1:]: point.config.selection.budget.parameters - SIZES.head
        for point in finals
        if point.setup.method.name == "blocks"
    }
    assert found == {("blocks", budget): int(budget * SIZES.total) for budget in config.budgets}
    assert (min(config.budgets), max(config.budgets)) == (0.00122, 0.2)
    heads = {point.config.selection.regions[-1].modules for point in finals if not point.is_peer}
    assert heads == {("classifier.*",)}
    small = [point for point in finals if point.setup.key[1:] == ("lora", 0.00122)]
    assert {point.config.peer.modules for point in small} == {("*.layer.*.{query,value}",)}
    assert {point.config.peer.head for point in small} == {("classifier.*",)}


def test_tuning_is_short_and_final_runs_have_the_seeds(tmp_path: Path) -> None:
    tuning, finals = all_points(read_example(tmp_path))
    assert [point.name for point in tuning][:2] == [
        "stage=tune,task=words,method=full,budget=none,rate=0.001",
        "stage=tune,task=words,method=full,budget=none,rate=0.01",
    ]
    for point in tuning:
        assert point.config.data.test == point.config.data.validation == "data/development.jsonl"
        assert (point.config.training.steps, point.config.training.seed) == (2, 0)
        assert point.config.training.learning_rate == point.rate
    rows = [point for point in finals if point.setup.method.name == "rows"]
    assert [point.config.training.seed for point in rows] == [1, 2, 3]
    assert [point.config.selection.seed for point in rows] == [1, 2, 3]
    assert {point.config.training.steps for point in finals} == {3}
    assert {point.config.data.test for point in finals} == {"data/held-out.jsonl"}
    assert all(not point.config.output.evaluate_base for point in finals)


def test_every_tuning_seed_tries_every_rate(tmp_path: Path) -> None:
    tuning, _ = all_points(read_example(tmp_path, {"tuning": {"rates": [1e-3], "seeds": [7, 8]}}))
    of_rows = [point for point in tuning if point.setup.method.name == "rows"]
    assert [point.config.training.seed for point in of_rows] == [7, 8]
    # As with one seed: a second one can be added to a study that has begun.
    assert [point.name.partition("rate=")[2] for point in of_rows] == ["0.001", "0.001,seed=8"]


def test_tuning_by_the_loss_answers_nothing(tmp_path: Path) -> None:
    tuning, finals = all_points(read_example(tmp_path, {"tuning": {"rates": [1e-3], "metric": "loss"}}))
    assert {(point.config.data.test, point.config.output.evaluate) for point in tuning} == {(None, False)}
    assert {point.config.output.evaluate for point in finals} == {True}


def test_text_is_judged_by_its_loss(tmp_path: Path) -> None:
    data = {"train": "a.json", "validation": "b.json", "fields": {"text": "text"}}
    tuning, finals = all_points(read_example(tmp_path, {"tasks": {"text": {"data": data}}}))
    assert {(each.config.data.validation, each.config.data.test) for each in tuning} == {
        ("data/development.jsonl", None)
    }
    assert {(each.config.data.validation, each.config.data.test) for each in finals} == {("data/held-out.jsonl", None)}


def test_methods_that_learn_from_other_batches_are_refused(tmp_path: Path) -> None:
    methods = {
        "one": {"selection.regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}], "selection.score": "first"},
        "two": {"selection.regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}], "training.steps": 9},
    }
    tuning, finals = all_points(read_example(tmp_path, {"methods": methods, "budgets": []}))
    with pytest.raises(InputError, match=r"methods.two has training.steps 9, and one has 3"):
        check_same_protocol([*tuning, *finals])


_ROWS: dict[str, Any] = {"selection": {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": {"folder": "f", "question": "q", "seeds": [1, 2]}}, "study.seeds is"),
        ({"study": {"folder": "f", "question": "q", "seeds": [0, 1, 2]}}, "tuning.seeds has 0, one of study.seeds"),
        ({"tuning": {"rates": [1e-3], "seeds": [7, 7]}}, r"tuning.seeds is \[7, 7\]: give one or more different"),
        ({"tuning": {"rates": [1e-3], "seeds": []}}, r"tuning.seeds is \[\]"),
        ({"study": {"folder": "f", "question": "q", "sedes": [1]}}, "did you mean study.seeds"),
        ({"tuning": {"rates": [1e-2, 1e-3]}}, "tuning.rates is .*rising order"),
        ({"methods": {"a": {**_ROWS, "rates": [1e-3]}, "b": _ROWS}, "budgets": []}, "different numbers of rates"),
        ({"methods": {"a": {**_ROWS, "budgets": [0.3]}}}, "methods.a.budgets is"),
        ({"methods": {"a": {**_ROWS, "at": {"0.3": {}}}}}, "methods.a.at has '0.3'"),
        ({"methods": {"a/b": _ROWS}}, "it goes into paths"),
        ({"budgets": [0.0]}, "budgets has 0.0"),
    ],
)
def test_what_does_not_hold_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_example(tmp_path, changes)


@pytest.mark.parametrize(
    "key", ["training.learning_rate", "training.seed", "data.train", "data.limit", "data.test", "data.evaluation.limit"]
)
def test_a_method_does_not_set_what_the_study_sets(tmp_path: Path, key: str) -> None:
    config = read_example(tmp_path, {"methods": {"a": {**_ROWS, key: 1}}, "budgets": []})
    with pytest.raises(InputError, match=f"methods.a sets {key}"):
        all_points(config)
    nested: Any = 1
    for name in reversed(key.split(".")):
        nested = {name: nested}
    (tmp_path / "more.yaml").write_text(json.dumps(nested))
    methods = {"a": {**_ROWS, "extends": str(tmp_path / "more.yaml")}}
    with pytest.raises(InputError, match=rf"more\.yaml, which methods\.a extends, sets {key}"):
        all_points(read_example(tmp_path, {"methods": methods, "budgets": []}))


def test_no_run_is_chosen_by_what_it_is_judged_by(tmp_path: Path) -> None:
    data = {"train": "a.json", "validation": "b.json", "fields": {"text": "text"}}
    kept = {**_ROWS, "checkpoint": {"every": 1, "keep_best": "validation_loss"}}
    with pytest.raises(InputError, match=r"keep_best is 'validation_loss': a final run would be chosen"):
        all_points(read_example(tmp_path, {"tasks": {"text": {"data": data}}, "methods": {"a": kept}}))


def test_rows_of_the_encoders_mixture_are_of_the_mlp_alone() -> None:
    content = read_mapping(CONFIGS / "parts" / "encoder-mixed.yaml")
    blocks, rows = (region["modules"] for region in content["selection"]["regions"])
    attention = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    names = [f"bert.encoder.layer.10.{name}" for name in (*attention, "intermediate.dense", "output.dense")]
    assert match_names(blocks, names, "blocks", "matrix") == names[:4]
    assert match_names(rows, names, "rows", "matrix") == names[4:]


def test_a_finished_run_of_another_protocol_is_not_collected(tmp_path: Path) -> None:
    (point, *_), _ = all_points(read_example(tmp_path))
    (changed, *_), _ = all_points(read_example(tmp_path, overrides=["--run.training.warmup_fraction=0.5"]))
    folder = SweepFolder(tmp_path / "out")
    list_points(folder, [point])
    # Before it has run, nothing is lost.
    check_finished(folder, [changed])
    folder.run(point.name).path.mkdir(parents=True)
    folder.run(point.name).summary.write_text("{}")
    check_finished(folder, [point])
    # One of an older version, which did not know a setting yet that has its default now.
    older = folder.config(point.name)
    older.write_text("".join(line for line in point.yaml.splitlines(keepends=True) if "beta2" not in line))
    assert older.read_text() != point.yaml
    check_finished(folder, [point])
    with pytest.raises(InputError, match=r"has been run, and training.warmup_fraction was .* and is now 0.5"):
        check_finished(folder, [changed])


def test_a_candidate_that_has_not_run_is_none(tmp_path: Path) -> None:
    tuning, _ = all_points(read_example(tmp_path, {"tuning": {"rates": [1e-3, 3e-3, 1e-2], "steps": 2}}))
    points = [point for point in tuning if point.setup.method.name == "rows"]

    def found(*states: str) -> Any:
        numbers = [{"accuracy_tuned": each, "validation_loss_last": 1.0} for each in (0.5, 0.7, 0.6)]
        rows = {
            point.name: {**each, "state": state} for point, each, state in zip(points, numbers, states, strict=True)
        }
        return tuned_of(points, rows, "accuracy")

    assert (found("finished", "finished", "finished").rate, found("finished", "finished", "finished").at_edge) == (
        3e-3, False,
    )  # fmt: skip
    # Nothing is known beyond the best yet.
    waiting = found("finished", "finished", "missing")
    assert (waiting.rate, waiting.at_edge, len(waiting.tried)) == (3e-3, True, 2)
    # What failed there was tried.
    assert not found("finished", "finished", "failed").at_edge
    assert found("missing", "stopped", "running") is None


def test_overrides_change_a_task(tmp_path: Path) -> None:
    config = read_example(tmp_path, overrides=["--tasks.words.data.train=other.json", "--tuning.steps=7"])
    assert config.tasks["words"]["data"]["train"] == "other.json"
    assert config.tuning.steps == 7
    assert json.dumps(config.run)
