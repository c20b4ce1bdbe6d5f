"""In which order do tuning, extension and final runs come, and which points are run? With runs that write their end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.stopping import EXIT_ERROR
from launcher.sweep.sweep_folder import SweepFolder
from scripts import accuracy_study
from scripts.accuracy import study as study_module
from scripts.accuracy.study import Study, run_study, study_results
from scripts.accuracy.study_points import StudyPoint, setups_of
from scripts.accuracy.study_running import Machine
from scripts.accuracy.study_tables import protocol_text
from sparse_zero.errors import InputError
from sparse_zero.files import read_json
from tests.scripts.study_examples import files_of, read_example, write_records

RATES = [1e-3, 3e-3, 1e-2]


def make_study(path: Path, **tuning: Any) -> Study:
    config = read_example(path, {"tuning": {"rates": RATES, "steps": 2, **tuning}})
    (task,) = config.all_tasks()
    return Study(
        config=config,
        folder=SweepFolder(config.study.path),
        data={"words": files_of(config, task)},
        sizes={"words": None},
        setups=setups_of(config),
    )


def finish(folder: SweepFolder, point: StudyPoint, accuracy: float | None) -> None:
    run = folder.run(point.name)
    run.evaluation.mkdir(parents=True, exist_ok=True)
    run.summary.write_text(json.dumps({"accuracy": {"tuned": accuracy}, "base": {"sha256": f"head-{point.seed}"}}))
    predictions = [{"index": 0, "correct": True}, {"index": 1, "correct": False}]
    (run.evaluation / "tuned.json").write_text(json.dumps({"predictions": predictions}))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each point was started, by stage, method and rate; the highest rate is the best one."""
    found: Counter[str] = Counter()

    def run(folder: SweepFolder, points: Sequence[StudyPoint], *_: Any, **__: Any) -> int:
        code = 0
        for point in points:
            if folder.state(point.name) == "running":
                code = EXIT_ERROR
            elif folder.state(point.name) != "finished":
                found[f"{point.stage} {point.setup.method.name} {point.rate:g}"] += 1
                if point.rate == 1e-2 and point.setup.method.name == "full":
                    folder.write_outcome(point.name, 1, 1.0)
                    code = EXIT_ERROR
                else:
                    finish(folder, point, point.rate or 0.0)
        return code

    monkeypatch.setattr(study_module, "run_points", run)
    return found


def test_every_round_adds_one_candidate_and_runs_no_other_again(tmp_path: Path, started: Counter[str]) -> None:
    assert run_study(make_study(tmp_path, extend=2), Machine()) == 1
    tuned = {name: number for name, number in started.items() if name.startswith("tune")}
    assert tuned == {
        **{f"tune {method} {rate:g}": 1 for method in ("full", "rows") for rate in RATES},
        # One that failed lies beyond the best: full goes on between the best and its other neighbour.
        "tune full 0.00173": 1,
        "tune full 0.00228": 1,
        "tune rows 0.0333": 1,
        "tune rows 0.111": 1,
    }
    assert {name: number for name, number in started.items() if name.startswith("final")} == {
        "final full 0.003": 3,
        "final rows 0.111": 3,
    }


def test_the_mean_over_the_tuning_seeds_chooses(tmp_path: Path, started: Counter[str]) -> None:
    study = make_study(tmp_path, seeds=[7, 8])
    for point in study.tuning_points:
        # With the first seed the highest rate is best, with both the middle one; one seed of the lowest has no number.
        best = {(7, 1e-2): 0.9, (8, 1e-2): 0.1, (7, 3e-3): 0.7, (8, 3e-3): 0.6, (7, 1e-3): 1.0, (8, 1e-3): None}
        finish(study.folder, point, best[point.seed, point.rate])
    for tuned in study.found().values():
        assert tuned is not None
        assert tuned.rate == 3e-3
        assert [each.accuracy for each in tuned.tried] == [None, pytest.approx(0.65), pytest.approx(0.5)]
    assert run_study(study, Machine()) == 0
    assert set(started) == {"final full 0.003", "final rows 0.003"}
    results, _ = study_results(study, "again")
    assert results["protocol"]["tuning_seeds"] == [7, 8]
    assert "the mean of the seeds 7 and 8" in protocol_text(results)


def test_a_candidate_counts_with_all_of_its_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[7, 8])
    rows = [point for point in study.tuning_points if point.setup.method.name == "rows"]
    for point in rows:
        if (point.seed, point.rate) != (8, 1e-2):
            finish(study.folder, point, point.rate or 0.0)
    tuned = study.found()[rows[0].setup.key]
    assert tuned is not None
    assert [each.rate for each in tuned.tried] == [1e-3, 3e-3]


def test_a_dry_run_of_an_extended_study_shows_what_was_run(
    tmp_path: Path, started: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(make_study(tmp_path, extend=1), Machine())
    accuracy_study.show_points(make_study(tmp_path, extend=1))
    out = capsys.readouterr().out
    assert "8 tuning runs, 6 final runs (6 have their rate)" in out
    assert "missing" not in out
    results, _ = study_results(make_study(tmp_path, extend=1), "again")
    assert {row["method"]: row["rate"] for row in results["rows"]} == {"full": 0.003, "rows": 0.0333}


def test_no_rate_is_chosen_while_other_processes_tune(
    tmp_path: Path, started: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, extend=1)
    elsewhere = study.tuning_points[-1].name
    state: Callable[[SweepFolder, str], str] = SweepFolder.state
    monkeypatch.setattr(SweepFolder, "state", lambda self, name: "running" if name == elsewhere else state(self, name))
    assert run_study(study, Machine()) == EXIT_ERROR
    assert {name.split()[0] for name in started} == {"tune"}
    assert len(started) == 5


def test_no_rate_is_chosen_without_a_candidate_that_was_stopped(tmp_path: Path, started: Counter[str]) -> None:
    study = make_study(tmp_path, extend=1)
    stopped = next(point for point in study.tuning_points if point.setup.method.name == "rows")
    finishing: Callable[..., int] = vars(study_module)["run_points"]

    def run(folder: SweepFolder, points: Sequence[StudyPoint], *arguments: Any, **named: Any) -> int:
        code = finishing(folder, [point for point in points if point.name != stopped.name], *arguments, **named)
        folder.write_outcome(stopped.name, 143, 1.0)
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "run_points", run)
        assert run_study(study, Machine()) == EXIT_ERROR
    assert {name.split()[0] for name in started} == {"tune"}
    run_study(make_study(tmp_path, extend=1), Machine())
    assert {name.split()[0] for name in started} == {"tune", "final"}


def test_files_beside_the_splits_stay_what_they_were(tmp_path: Path, started: Counter[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("One text.")

    def study() -> Study:
        made = make_study(tmp_path)
        rows = {"selection": {"regions": [{"kind": "row", "modules": ["*"]}]}, "data.forgetting": str(other)}
        config = read_example(tmp_path, {"tuning": {"rates": RATES, "steps": 2}, "methods": {"rows": rows}})
        return Study(config=config, folder=made.folder, data=made.data, sizes=made.sizes, setups=setups_of(config))

    study()
    other.write_text("Another one.")
    assert run_study(study(), Machine()) == 0
    study()
    other.write_text("A third one.")
    with pytest.raises(InputError, match=r"other\.txt has changed since runs of this study read it"):
        study()


def test_how_a_study_was_run_is_of_its_runs(tmp_path: Path, started: Counter[str]) -> None:
    jobs = tmp_path / "out" / "jobs.json"
    run_study(make_study(tmp_path), Machine(jobs=2, threads=3))
    first = read_json(jobs)
    assert (first["jobs"], first["threads"], first["varied"]) == (2, 3, [])
    run = SweepFolder(tmp_path / "out").run(next(path.name for path in (tmp_path / "out").glob("*final*rows*seed=1")))
    run.summary.unlink()
    run_study(make_study(tmp_path), Machine(jobs=1, threads=3))
    again = read_json(jobs)
    assert again == {**first, "varied": ["jobs"]}


def test_what_is_held_out_does_not_choose_what_is_trained(tmp_path: Path) -> None:
    for name, numbers in (("train", range(8)), ("test", range(8, 12)), ("other", range(20, 24))):
        write_records(tmp_path / f"{name}.json", [f"What is {number}?" for number in numbers])
    held_out = [{"instruction": "what is  9?", "output": "9", "answer": "9"}]
    (tmp_path / "mixed.json").write_text(json.dumps(held_out))

    def opened(calibration: str) -> Study:
        rows = {
            "selection": {"regions": [{"kind": "row", "modules": ["*"]}]},
            "data.calibration": str(tmp_path / calibration),
        }
        study = {"folder": str(tmp_path / "out"), "question": "Which?", "overlap": "drop"}
        config = read_example(tmp_path, {"study": study, "methods": {"rows": rows}})
        return study_module.open_study(config)

    opened("other.json")
    opened("train.json")
    for name in ("test.json", "mixed.json"):
        with pytest.raises(InputError, match=rf"methods\.rows\.data\.calibration is .*{name}.* some of it is held out"):
            opened(name)
