"""What has each method of a study reached, and how sure are the differences? From run folders to one small JSON.

The JSON has every number that tables and pictures show, and no prediction and no text of the data.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from launcher import metrics
from launcher.run_folder import RunFolder
from launcher.summary import as_mapping, as_number
from launcher.sweep.collecting import collect
from launcher.sweep.sweep_folder import Listed, SweepFolder
from scripts.accuracy import study_statistics as statistics
from scripts.accuracy.heads import Sizes
from scripts.accuracy.study_config import StudyConfig
from scripts.accuracy.study_data import TEXT_SUFFIX, TaskData
from scripts.accuracy.study_places import Places, places_as_json, places_of
from scripts.accuracy.study_points import FINAL, Setup, StudyPoint
from scripts.accuracy.study_statistics import Difference, Spread
from scripts.accuracy.study_tuning import Tried, Tuned, choose_rate
from sparse_zero.errors import InputError
from sparse_zero.files import read_json

FORMAT = "sparse_zero.accuracy_study"
Key = tuple[str, str, float | None]
# Of what runs depend on; those that are not installed are left out.
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What one final run has reached."""

    seed: int
    row: Mapping[str, Any]
    # Accuracy, or the loss on held-out data; None: there is no number.
    score: float | None
    # What the score is the weighted mean of, in the order of the data: 1 or 0 of each test problem, or the mean loss of
    # each piece; with their weights. None: it is known as a whole only.
    units: tuple[tuple[float, int], ...] | None
    # Hash of the weights that it began with.
    base: str | None
    # Where its values lie; None of peers.
    places: Places | None = None


def rows_by_name(folder: SweepFolder, points: Sequence[StudyPoint]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The numbers of every point by its name, and what could not be read."""
    listed = [
        Listed(index=index, name=point.name, settings=point.settings, point=None) for index, point in enumerate(points)
    ]
    rows, notes = collect(folder, listed)
    return {row["name"]: row for row in rows}, notes


def tuned_of(points: Sequence[StudyPoint], rows: Mapping[str, Mapping[str, Any]], metric: str) -> Tuned | None:
    """What the tuning runs of one setup have found; None where none of them has finished.

    Candidates that have not been run to an end are none yet: that one of them lies beyond the best says nothing. One
    that failed with one of its seeds has failed.
    """
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for point in points:
        assert point.rate is not None
        by_rate.setdefault(point.rate, []).append(rows[point.name])
    tried = [
        Tried(rate=rate, accuracy=_mean_of(of_rate, "accuracy_tuned"), loss=_mean_of(of_rate, "validation_loss_last"))
        for rate, of_rate in by_rate.items()
        if all(row["state"] in ("finished", "failed") for row in of_rate)
    ]
    return choose_rate(tried, metric)


def _mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean over runs that have all finished with a number; None of others."""
    numbers = [as_number(row[name]) if row["state"] == "finished" else None for row in rows]
    known = [each for each in numbers if each is not None]
    return sum(known) / len(known) if len(known) == len(rows) else None


def read_correct(run: RunFolder) -> tuple[bool, ...]:
    """Whether each test problem was answered right, in the order of the data.

    Raises:
        InputError: the file of the predictions is missing or damaged.
    """
    path = run.evaluation / "tuned.json"
    predictions = as_mapping(read_json(path, strict=True)).get("predictions")
    if not isinstance(predictions, list) or not all(
        isinstance(each, dict) and isinstance(each.get("correct"), bool) and isinstance(each.get("index"), int)
        for each in predictions
    ):
        raise InputError(f"{path} holds no list of predictions: delete {run.path} and run the study again")
    ordered = sorted(predictions, key=lambda each: each["index"])
    return tuple(each["correct"] for each in ordered)


def read_pieces(run: RunFolder) -> tuple[tuple[float, int], ...] | None:
    """Mean loss and labels of each piece of the held-out data at the end; None where fewer than two are known.

    Raises:
        InputError: the file of the metrics is damaged.
    """
    path = run.path / metrics.FILE_NAME
    rows = [row for row in metrics.read_metrics(path) if row["kind"] == "validation"] if path.is_file() else []
    # Runs of before they were kept have none, and of a loss that is no number there is null.
    pieces = rows[-1].get("pieces") if rows else None
    try:
        found = tuple((float(loss) / int(number), int(number)) for loss, number in pieces or ())
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return found if len(found) > 1 else None


def finished_of(
    folder: SweepFolder, points: Sequence[StudyPoint], rows: Mapping[str, Mapping[str, Any]], *, has_problems: bool
) -> list[Finished]:
    """The final runs that have ended well, in the order of the seeds."""
    found = []
    for point in points:
        if rows[point.name]["state"] == "finished":
            run = folder.run(point.name)
            units = tuple((float(each), 1) for each in read_correct(run)) if has_problems else read_pieces(run)
            base = as_mapping(as_mapping(read_json(run.summary)).get("base")).get("sha256")
            row, places = rows[point.name], places_of(run.selection)
            score = as_number(row["accuracy_tuned" if has_problems else "validation_loss_last"])
            found.append(Finished(seed=point.seed, row=row, score=score, units=units, base=base, places=places))
    return found


def compare(ours: Sequence[Finished], reference: Sequence[Finished]) -> Difference | None:
    """Ours minus the reference over the seeds that both have; None where there are none, or other data."""
    theirs = {each.seed: each for each in reference}
    pairs = [(each, theirs[each.seed]) for each in ours if each.seed in theirs]
    if not pairs:
        return None
    weights = {
        None if each.units is None else tuple(weight for _, weight in each.units) for pair in pairs for each in pair
    }
    if len({sum(each) for each in weights if each is not None}) > 1:
        return None
    if len(weights) == 1 and (shared := weights.pop()) is not None:
        matrices = [[[value for value, _ in each.units or ()] for each in side] for side in zip(*pairs, strict=True)]
        return statistics.paired_difference(*matrices, weights=shared)
    # Known as wholes, or in other pieces of the same data.
    numbers = [[each.score for each in side] for side in zip(*pairs, strict=True)]
    if any(value is None for side in numbers for value in side):
        return None
    return statistics.paired_difference(numbers[0], numbers[1])


def _spread(values: Sequence[object]) -> Spread | None:
    known = [number for number in map(as_number, values) if number is not None]
    return statistics.spread(known) if known else None


def _over(runs: Sequence[Finished], name: str) -> Any:
    return statistics.as_json(_spread([each.row.get(name) for each in runs]))


def _row(
    config: StudyConfig,
    setup: Setup,
    tuned: Tuned | None,
    runs: Sequence[Finished],
    sizes: Sizes | None,
    references: tuple[Sequence[Finished], Sequence[Finished]],
    *,
    higher_is_better: bool,
    num_failed: int,
) -> dict[str, Any]:
    scores = {str(each.seed): each.score for each in runs}
    spread = _spread(list(scores.values()))
    full, baseline = references
    full_spread = _spread([each.score for each in full])
    is_full, is_baseline = (setup.method.name == name for name in (config.study.full, config.study.baseline))
    row = runs[0].row if runs else {}
    trained = as_number(row.get("parameters_trained"))
    within = None
    if spread is not None and full_spread is not None and not is_full:
        within = statistics.is_within_one_deviation(spread, full_spread, higher_is_better=higher_is_better)
    return {
        "task": setup.task.name,
        "method": setup.method.name,
        "label": setup.method.label,
        "budget": setup.budget,
        "parameters_total": as_number(row.get("parameters_total")),
        "parameters_trained": trained,
        # Trained at first and no more, and still acting: of a selection that was chosen anew.
        "parameters_retired": as_number(row.get("parameters_retired")) or 0,
        "parameters_head": 0 if sizes is None else sizes.head,
        "places": places_as_json([each.places for each in runs]),
        "rate": None if tuned is None else tuned.rate,
        "rate_at_edge": None if tuned is None else tuned.at_edge,
        "tried": [] if tuned is None else [asdict(each) for each in tuned.tried],
        # Of which there is a number: a loss that is none of a run that diverged is in no mean.
        "num_finished": sum(each.score is not None for each in runs),
        "num_failed": num_failed,
        # Those whose training loss ended as no number, as far as they were trained; they may have answers all the same.
        "num_diverged": 0 if tuned is None else sum(as_number(each.row.get("final_loss")) is None for each in runs),
        "score": statistics.as_json(spread),
        "scores": scores,
        "to_full": None if is_full else statistics.as_json(compare(runs, full)),
        "within_full": within,
        "to_baseline": None if is_baseline else statistics.as_json(compare(runs, baseline)),
        "forgetting_before": _over(runs, "forgetting_base"),
        "forgetting_after": _over(runs, "forgetting_tuned"),
        "final_loss": _over(runs, "final_loss"),
        "seconds": _over(runs, "total_seconds"),
        "train_seconds": _over(runs, "train_seconds"),
        "tokens_per_second": _over(runs, "tokens_per_second"),
        "peak_memory_bytes": _over(runs, "peak_memory_bytes"),
        "adapter_bytes": _over(runs, "adapter_bytes"),
    }


def results_of(
    config: StudyConfig,
    folder: SweepFolder,
    found: Mapping[Key, Tuned | None],
    finals: Mapping[Key, Sequence[StudyPoint]],
    setups: Sequence[Setup],
    data: Mapping[str, TaskData],
    sizes: Mapping[str, Sizes | None],
    machine: Mapping[str, Any],
    command: str,
) -> tuple[dict[str, Any], list[str]]:
    """The content of ``results.json``, and what could not be read.

    Args:
        config: of the study.
        folder: with the run folders.
        found: what tuning has found, by setup; without an entry where nothing was tuned.
        finals: the final points, by setup.
        setups: in the order of the table.
        data: of each task.
        sizes: of each task with a head.
        machine: what the runs ran on: ``machine``, see :func:`scripts.benchmarking.machine`, ``versions``, ``jobs``,
            ``commit``.
        command: that makes the study anew, without paths of this machine.
    """
    rows, notes = rows_by_name(folder, [point for points in finals.values() for point in points])
    runs = {
        setup.key: finished_of(folder, finals.get(setup.key, ()), rows, has_problems=data[setup.task.name].has_problems)
        for setup in setups
    }
    notes += _other_bases(runs)
    table = []
    for setup in setups:
        task = setup.task.name
        full = next((runs[key] for key in runs if key[:2] == (task, config.study.full)), [])
        baseline = runs.get((task, config.study.baseline, setup.budget), [])
        states = [rows[point.name]["state"] for point in finals.get(setup.key, ())]
        table.append(
            _row(
                config,
                setup,
                found.get(setup.key),
                runs[setup.key],
                sizes[task],
                (full, baseline),
                higher_is_better=data[task].has_problems,
                num_failed=states.count("failed"),
            )
        )
    content = {
        "format": FORMAT,
        "name": folder.path.name,
        "question": config.study.question,
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime(_newest(folder, finals))),
        **machine,
        "protocol": {
            "seeds": list(config.study.seeds),
            "tuning_seeds": list(config.tuning.seeds),
            "tuning_steps": config.tuning.steps,
            "tuning_metric": config.tuning.metric,
            "overlap": config.study.overlap,
            "full": config.study.full,
            "baseline": config.study.baseline,
        },
        "tasks": {
            task.name: _task(task.label, data[task.name], finals, task.name, runs, sizes[task.name])
            for task in config.all_tasks()
        },
        "rows": table,
    }
    return content, notes


def _other_bases(runs: Mapping[Key, Sequence[Finished]]) -> list[str]:
    """Runs of one task and seed that did not begin with the same weights: the model has been replaced in between.

    A head that the files lack is made from the seed, and so another one for each.
    """
    bases: dict[tuple[str, int], dict[str, str]] = {}
    for (task, method, _), found in runs.items():
        for each in found:
            if each.base is not None:
                bases.setdefault((task, each.seed), {}).setdefault(each.base, method)
    return [
        f"task {task}, seed {seed}: its runs began with {len(different)} different models, "
        + ", ".join(f"{base[:12]} ({first})" for base, first in different.items())
        + ": what differs between them says nothing of the methods"
        for (task, seed), different in bases.items()
        if len(different) > 1
    ]


def _task(
    label: str,
    data: TaskData,
    finals: Mapping[Key, Sequence[StudyPoint]],
    name: str,
    runs: Mapping[Key, Sequence[Finished]],
    sizes: Sizes | None,
) -> dict[str, Any]:
    point = next((point for key, points in finals.items() if key[0] == name for point in points), None)
    training = None if point is None else point.config.training
    some = next((each for key, found in runs.items() if key[0] == name for each in found), None)
    return {
        "label": label,
        "metric": "accuracy" if data.has_problems else "loss",
        "records": dict(data.counts),
        "num_problems": data.counts["test"] if data.has_problems else None,
        # Whether the training data is one running text.
        "is_text": data.train.suffix == TEXT_SUFFIX,
        "model": None if point is None else point.config.model.name_or_path.rstrip("/").rpartition("/")[2],
        "steps": None if training is None else training.steps,
        "epochs": None if training is None else training.epochs,
        "global_batch_size": None if training is None else training.global_batch_size,
        "schedule": None if training is None else training.schedule,
        "head_parameters": 0 if sizes is None else sizes.head,
        # What another study must have begun with and read: the first digits of the hash of weights and config (of the
        # first seed's, a new head among them), and of the splits as they were written.
        "base": None if some is None or some.base is None else some.base[:12],
        "data": data.digests,
    }


def versions() -> dict[str, str]:
    """Of Python's packages that runs depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            # Without the build: a CPU's and a GPU's are one version.
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _newest(folder: SweepFolder, finals: Mapping[Key, Sequence[StudyPoint]]) -> float:
    """When the last of the final runs ended."""
    paths = [folder.run(point.name).summary for points in finals.values() for point in points]
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=time.time())


def share_of_row(row: Mapping[str, Any]) -> float | None:
    """The share of the parameters that has been changed in the end, the head in neither: trained ones and retired."""
    trained, total, head = (row.get(f"parameters_{name}") for name in ("trained", "total", "head"))
    if trained is None or not total:
        return None
    return float(max(trained + row.get("parameters_retired", 0) - head, 0) / (total - head))


def is_final(settings: Mapping[str, Any]) -> bool:
    """Whether the settings are those of a final point."""
    return settings.get("stage") == FINAL
