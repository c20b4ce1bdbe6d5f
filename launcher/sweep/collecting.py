"""What has each point of a sweep reached, and what do the repeats of one setting reach together?"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher import metrics
from launcher.summary import as_mapping, as_number
from launcher.sweep.sweep_config import identity
from launcher.sweep.sweep_folder import Listed, SweepFolder
from sparse_zero.errors import InputError
from sparse_zero.files import read_json

_PHASES = ("load", "evaluate_base", "forgetting", "calibrate", "train", "evaluate_tuned", "save")
# Columns of the table after those of the settings; numbers, or nothing where they were not measured.
NUMBERS = (
    "final_loss",
    "validation_loss_best",
    "validation_loss_last",
    "accuracy_base",
    "accuracy_tuned",
    # Mean loss per token of data.forgetting before and after, and what was added to it.
    "forgetting_base",
    "forgetting_tuned",
    "forgetting_change",
    "parameters_trained",
    "parameters_retired",
    "parameters_total",
    "parameters_fraction",
    # Of the rank that has the most.
    "peak_memory_bytes",
    "tokens_per_second",
    "adapter_bytes",
    "steps",
    "world_size",
    *(f"{phase}_seconds" for phase in _PHASES),
    "total_seconds",
)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """One number over repeats."""

    mean: float
    # Of the sample (divided by n - 1); None of a single one.
    deviation: float | None
    # Of how many finished points; None: of all. A loss that was not finite is in no mean.
    num_points: int | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """The points that differ only in what is repeated."""

    settings: Mapping[str, Any]
    num_points: int
    num_finished: int
    num_failed: int
    # Over the finished points that have the number.
    numbers: Mapping[str, Mean]


def collect(folder: SweepFolder, listed: Sequence[Listed]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for every point (index, name, settings, state, exit_code, NUMBERS), and what could not be read."""
    rows, notes = [], []
    for each in listed:
        numbers: dict[str, float | None] = dict.fromkeys(NUMBERS)
        state, code = "damaged", None
        try:
            state, code = folder.state(each.name), folder.exit_code(each.name)
            numbers |= _of_summary(folder, each.name)
            numbers |= _of_metrics(folder, each.name)
        except InputError as error:
            notes.append(f"{each.name}: {error}")
        row = {"index": each.index, "name": each.name, **each.settings, "state": state, "exit_code": code}
        rows.append(row | numbers)
    return rows, notes


def group(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], repeats: Sequence[str]) -> list[Group]:
    """Rows of the same settings but for ``repeats``, in the order of their first ones."""
    kept = [key for key in keys if key not in repeats]
    members: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        members.setdefault(tuple(identity(row[key]) for key in kept), []).append(row)
    groups = []
    for each in members.values():
        finished = [row for row in each if row["state"] == "finished"]
        numbers = {}
        for name in NUMBERS:
            values = [float(row[name]) for row in finished if row[name] is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                found = len(values) if len(values) < len(finished) else None
                numbers[name] = Mean(mean=statistics.fmean(values), deviation=deviation, num_points=found)
        groups.append(
            Group(
                settings={key: each[0][key] for key in kept},
                num_points=len(each),
                num_finished=len(finished),
                num_failed=sum(row["state"] == "failed" for row in each),
                numbers=numbers,
            )
        )
    return groups


def _of_summary(folder: SweepFolder, name: str) -> dict[str, float | None]:
    path = folder.run(name).summary
    if not path.is_file():
        return {}
    summary = as_mapping(read_json(path, strict=True))
    accuracy, parameters, phases = (as_mapping(summary.get(key)) for key in ("accuracy", "parameters", "phases"))
    same = ("final_loss", "tokens_per_second", "adapter_bytes", "steps", "world_size")
    found: dict[str, float | None] = {key: as_number(summary.get(key)) for key in same}
    found |= {f"accuracy_{key}": as_number(accuracy.get(key)) for key in ("base", "tuned")}
    forgetting = as_mapping(summary.get("forgetting"))
    base, tuned = (as_number(forgetting.get(key)) for key in ("base", "tuned"))
    found |= {"forgetting_base": base, "forgetting_tuned": tuned}
    found["forgetting_change"] = tuned - base if tuned is not None and base is not None else None
    trained, total, retired = (as_number(parameters.get(key)) for key in ("trained", "total", "retired"))
    found |= {"parameters_trained": trained, "parameters_total": total, "parameters_retired": retired}
    found["parameters_fraction"] = trained / total if trained is not None and total else None
    peaks = summary.get("peak_memory_bytes_per_rank")
    known = [peak for peak in map(as_number, peaks if isinstance(peaks, list) else []) if peak is not None]
    found["peak_memory_bytes"] = max(known, default=None)
    found |= {f"{phase}_seconds": as_number(phases.get(phase)) for phase in _PHASES}
    seconds = [second for second in map(as_number, phases.values()) if second is not None]
    found["total_seconds"] = sum(seconds) if seconds else None
    if as_number(summary.get("resumed_after_step")):
        # Those of its last start only.
        found |= dict.fromkeys((name for name in found if name.endswith("_seconds")), None)
        found["peak_memory_bytes"] = None
    return found


def _of_metrics(folder: SweepFolder, name: str) -> dict[str, float | None]:
    path = folder.run(name).path / metrics.FILE_NAME
    rows = metrics.read_metrics(path) if path.is_file() else []
    losses = [as_number(row.get("loss")) for row in rows if row["kind"] == "validation"]
    known = [loss for loss in losses if loss is not None]
    return {"validation_loss_best": min(known, default=None), "validation_loss_last": losses[-1] if losses else None}
