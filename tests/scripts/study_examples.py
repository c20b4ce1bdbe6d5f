"""What do tests of studies share: a config, data on a disk, and results such as a study writes?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from scripts.accuracy.heads import Sizes
from scripts.accuracy.study_config import StudyConfig, read_study
from scripts.accuracy.study_data import TaskData
from scripts.accuracy.study_points import final_points, setups_of, tuning_points
from scripts.accuracy.study_statistics import as_json, paired_difference, spread

CONFIGS = Path(__file__).parents[2] / "configs" / "studies"
STUDIES = sorted(path for path in CONFIGS.glob("*.yaml") if "\nstudy:" in path.read_text())
# Of MiniLM with two classes, as `model_sizes` finds them.
SIZES = Sizes(total=22_713_986, head=770)


def files_of(config: StudyConfig, task: Any) -> TaskData:
    """As `prepare_data` gives, of files that need not be there."""
    data = config.tasks[task.name]["data"]
    has_problems = data.get("test") is not None
    held_out = Path("data/held-out.jsonl")
    return TaskData(
        train=Path("data/train.jsonl"),
        development=Path("data/development.jsonl"),
        tested_on=held_out,
        has_problems=has_problems,
        counts={"train": 1, "development": 1, "test": 1, "dropped": 0, "shared": 0},
    )


def all_points(config: StudyConfig) -> tuple[list[Any], list[Any]]:
    """Tuning points, and final ones with each setup's first rate."""
    tuning, finals = [], []
    for setup in setups_of(config):
        data = files_of(config, setup.task)
        sizes = SIZES if setup.task.head else None
        tuning += [each for rate in setup.method.rates for each in tuning_points(config, setup, rate, data, sizes)]
        finals += final_points(config, setup, next(iter(setup.method.rates), None), data, sizes)
    return tuning, finals


def write_study(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A study of two methods on a tiny model; ``changes`` replace whole sections."""
    content: dict[str, Any] = {
        "study": {"folder": str(path / "out"), "question": "Which?", "seeds": [1, 2, 3]},
        "tuning": {"rates": [1e-3, 1e-2], "records": 4, "steps": 2},
        "run": {
            "model": {"name_or_path": str(path / "model")},
            "training": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
            "data": {"template": "plain", "max_length": 96, "evaluation": {"max_new_tokens": 4}},
        },
        "tasks": {"words": {"data": {"train": str(path / "train.json"), "test": str(path / "test.json")}}},
        "budgets": [0.1],
        "methods": {
            "full": {"peer": {"method": "full"}, "budgets": []},
            "rows": {
                "selection": {
                    "regions": [{"kind": "row", "modules": ["*.mlp.{gate,up}_proj"]}],
                    "calibration_batches": 2,
                    "calibration_batch_size": 2,
                }
            },
        },
    }
    content |= dict(changes or {})
    path.mkdir(parents=True, exist_ok=True)
    file = path / "study.yaml"
    file.write_text(json.dumps(content))
    return file


def read_example(path: Path, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> StudyConfig:
    """The same, read."""
    return read_study(write_study(path, changes), overrides)


def write_records(path: Path, questions: Sequence[str]) -> Path:
    """Instruction records of these questions."""
    records = [{"instruction": each, "output": f"answer {at}", "answer": str(at)} for at, each in enumerate(questions)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def example_results(name: str = "example", *, budgets: Sequence[float] = (0.001, 0.01, 0.2)) -> dict[str, Any]:
    """Such as a study writes, of drawn answers to 300 problems."""
    generator = numpy.random.default_rng(3)
    hard = generator.random(300)
    answers: dict[tuple[str, float | None], Any] = {("full", None): hard[None] < generator.normal(0.86, 0.01, (3, 1))}
    answers["frozen", None] = hard[None] < generator.normal(0.7, 0.004, (3, 1))
    for amount in budgets:
        for peer, top in (("lora", 0.84), ("blocks", 0.87)):
            share = 0.7 + (top - 0.7) * (1 + numpy.log10(amount / 0.001)) / 3.4
            answers[peer, amount] = hard[None] < generator.normal(share, 0.012, (3, 1))
    labels = {"full": "full fine-tuning", "frozen": "frozen", "lora": "LoRA", "blocks": "blocks"}
    rows = []
    for (method, budget), correct in answers.items():
        scores = correct.mean(axis=1).tolist()
        baseline = None if budget is None or method == "lora" else answers["lora", budget]
        trained = {"full": 1_000_000, "frozen": 770}.get(method, 770 + 1e6 * (budget or 0))
        after = {"full": 0.4, "frozen": 0.0}.get(method, 2 * (budget or 0))
        rates = [1e-4, 3e-4, 1e-3]
        rows.append(
            {
                "task": "words", "method": method, "label": labels[method], "budget": budget,
                "parameters_total": 1_000_000, "parameters_trained": trained, "parameters_head": 770,
                "places": {"weights": [2, 5, 3], "layers": [0.0, 0.25, 0.75]} if method == "blocks" else None,
                "rate": None if method == "frozen" else 1e-3, "rate_at_edge": None if method == "frozen" else True,
                "tried": [] if method == "frozen" else [
                    {"rate": rate, "accuracy": 0.5 + 0.1 * at + (budget or 0), "loss": 0.7 - 0.1 * at}
                    for at, rate in enumerate(rates)
                ],
                "num_finished": 3, "num_failed": 0, "score": as_json(spread(scores)),
                "scores": {str(seed): score for seed, score in zip((1, 2, 3), scores, strict=True)},
                "to_full": None if method == "full" else as_json(
                    paired_difference(correct, answers["full", None])
                ),
                "within_full": None if method == "full" else method == "blocks" and budget == 0.2,
                "to_baseline": None if baseline is None else as_json(
                    paired_difference(correct, baseline)
                ),
                "forgetting_before": as_json(spread([3.1] * 3)),
                "forgetting_after": as_json(spread([3.1 + after, 3.12 + after, 3.08 + after])),
                "final_loss": as_json(spread([0.3, 0.31, 0.32])), "seconds": as_json(spread([30.0, 31.0, 29.0])),
                "train_seconds": as_json(spread([20.0, 21.0, 19.0])),
                "tokens_per_second": as_json(spread([900.0, 910.0, 890.0])),
                "peak_memory_bytes": as_json(spread([5e8, 5e8, 5e8])),
                "adapter_bytes": as_json(spread([4.0 * trained] * 3)),
            }
        )  # fmt: skip
    return {
        "format": "sparse_zero.accuracy_study", "name": name, "question": "Which?",
        "command": "python scripts/accuracy_study.py --config configs/studies/example.yaml", "date": "2026-01-02",
        "machine": {"torch": "2.13.0", "python": "3.11.1", "machine": "x86_64", "cpu": "a CPU", "cores": "2"},
        "jobs": {"jobs": 2, "threads": 1}, "versions": {"torch": "2.13.0"},
        "protocol": {
            "seeds": [1, 2, 3], "tuning_seeds": [100], "tuning_steps": 40, "tuning_metric": "accuracy",
            "overlap": "drop", "full": "full", "baseline": "lora",
        },
        "tasks": {
            "words": {
                "label": "word problems", "metric": "accuracy", "num_problems": 300, "model": "tiny", "steps": 80,
                "records": {"train": 900, "development": 100, "test": 300, "dropped": 2, "shared": 2}, "epochs": None,
                "global_batch_size": 16, "schedule": "linear", "head_parameters": 770,
            }
        },
        "rows": rows,
    }  # fmt: skip
