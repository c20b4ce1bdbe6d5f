"""How are the results of a study written down: a table for a terminal, a document, a program? Pure, from the JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.summary import ABSENT, format_bytes, format_duration, format_percent
from scripts.accuracy.study_results import share_of_row
from scripts.benchmarks.tables import Table

Results = Mapping[str, Any]
_WITHIN = "Within 1 sd: not worse than full fine-tuning's mean by more than its standard deviation over seeds. "
# Numbers of parameters that differ by less than this share of them are called equal.
_EQUAL = 0.05
# Headings of what a method takes, beside what it learns.
_COSTS = ("trained", "matrices", "rate", "time", "peak memory", "adapter", "tokens/s")


def value_text(value: float, metric: str, *, signed: bool = False) -> str:
    """An accuracy in percent with one digit, a loss with four."""
    digits, scale = (1, 100.0) if metric == "accuracy" else (4, 1.0)
    return f"{value * scale:{'+' if signed else ''}.{digits}f}"


def spread_text(spread: Mapping[str, Any] | None, metric: str) -> str:
    """Mean ± deviation."""
    if spread is None:
        return ABSENT
    text = value_text(spread["mean"], metric)
    return text if spread["deviation"] is None else f"{text} ± {value_text(spread['deviation'], metric)}"


def difference_text(difference: Mapping[str, Any] | None, metric: str) -> str:
    """A difference and its interval: ``+0.4 [-0.3, +1.1]``; alone where there is none."""
    if difference is None:
        return ABSENT
    if difference["low"] is None:
        return value_text(difference["mean"], metric, signed=True)
    mean, low, high = (value_text(difference[name], metric, signed=True) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _rate(row: Mapping[str, Any]) -> str:
    if row["rate"] is None:
        return ABSENT
    return f"{row['rate']:g}" + (" (edge)" if row["rate_at_edge"] else "")


def _share(row: Mapping[str, Any]) -> str:
    share = share_of_row(row)
    return ABSENT if share is None else "0 %" if share == 0 else format_percent(share)


def _matrices(row: Mapping[str, Any]) -> str:
    """How many weights have values: of every seed, or the range over seeds."""
    places = row.get("places")
    if places is None:
        return ABSENT
    low, high = min(places["weights"]), max(places["weights"])
    return f"{low}" if low == high else f"{low} to {high}"


def _within(row: Mapping[str, Any]) -> str:
    return ABSENT if row["within_full"] is None else "yes" if row["within_full"] else "no"


def _mean(row: Mapping[str, Any], name: str) -> float | None:
    return None if row.get(name) is None else row[name]["mean"]


def _forgetting(row: Mapping[str, Any]) -> str:
    before, after = _mean(row, "forgetting_before"), _mean(row, "forgetting_after")
    if before is None or after is None:
        return ABSENT
    deviation = row["forgetting_after"]["deviation"]
    return f"{before:.3f} → {after:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def budget_text(row: Mapping[str, Any]) -> str:
    """What stands behind the label of a method: its budget, where it has one."""
    return "" if row["budget"] is None else f" {100 * row['budget']:g} %"


def _finished(row: Mapping[str, Any], num_seeds: int) -> str:
    return "" if row["num_finished"] == num_seeds else f" (n={row['num_finished']})"


def rows_of_task(results: Results, task: str) -> list[Mapping[str, Any]]:
    """The lines of one task."""
    return [row for row in results["rows"] if row["task"] == task]


def tables_of(results: Results) -> list[Table]:
    """A table for each task; columns that no line has a number for are left out."""
    tables = []
    for name, task in results["tasks"].items():
        rows = rows_of_task(results, name)
        columns = {heading: cells for heading, cells in _columns(results, task, rows).items() if _has_some(cells)}
        lines = [list(cells) for cells in zip(*columns.values(), strict=True)]
        tables.append(Table(f"{results['name']}: {task['label']}", list(columns), lines))
    return tables


def terminal_tables(results: Results) -> list[Table]:
    """As :func:`tables_of`, each in two that fit a terminal: what was learned, and at what cost."""
    parts = []
    for table in tables_of(results):
        costs = [number for number, heading in enumerate(table.headings) if number and heading in _COSTS]
        learned = [number for number in range(len(table.headings)) if number not in costs]
        parts += [table.part(table.title, learned), table.part(f"{table.title}, cost", [0, *costs])]
    return parts


def _columns(results: Results, task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    metric, protocol = task["metric"], results["protocol"]
    num_seeds = len(protocol["seeds"])
    name = "accuracy %" if metric == "accuracy" else "loss"
    speed = [_mean(row, "tokens_per_second") for row in rows]
    return {
        "method": [f"{row['label']}{budget_text(row)}{_finished(row, num_seeds)}" for row in rows],
        "trained": [_share(row) for row in rows],
        "matrices": [_matrices(row) for row in rows],
        "rate": [_rate(row) for row in rows],
        name: [spread_text(row["score"], metric) for row in rows],
        f"to {protocol['full']}": [difference_text(row["to_full"], metric) for row in rows],
        "within 1 sd": [_within(row) for row in rows],
        f"to {protocol['baseline']}": [difference_text(row["to_baseline"], metric) for row in rows],
        "other text": [_forgetting(row) for row in rows],
        "time": [format_duration(_mean(row, "seconds")) for row in rows],
        "peak memory": [format_bytes(_mean(row, "peak_memory_bytes")) for row in rows],
        "adapter": [format_bytes(_mean(row, "adapter_bytes")) for row in rows],
        "tokens/s": [ABSENT if each is None else f"{each:,.0f}" for each in speed],
    }


def _has_some(cells: Sequence[str]) -> bool:
    return any(cell != ABSENT for cell in cells)


def _has_places(results: Results) -> bool:
    return any(row.get("places") for row in results["rows"])


def protocol_text(results: Results) -> str:
    """What was done, in words, with the numbers of the files."""
    protocol = results["protocol"]
    seeds = ", ".join(map(str, protocol["seeds"]))
    parts = []
    for task in results["tasks"].values():
        records = task["records"]
        length = f"{task['steps']} steps" if task["steps"] is not None else f"{task['epochs']} epochs"
        head = f", a head of {task['head_parameters']:,} parameters beside" if task["head_parameters"] else ""
        data = "a text, rates tuned on another part or text, tested on held-out text"
        # Results of before it was told: a text counts as one record.
        if not task.get("is_text", not task["num_problems"] and records["train"] == 1):
            problems = f"{task['num_problems']:,} problems" if task["num_problems"] else f"{records['test']:,} more"
            data = (
                f"{records['train']:,} records, rates tuned on {records['development']:,} others, tested on {problems}"
            )
        parts.append(
            f"{task['label']}: {task['model']}{head}, {length} of {task['global_batch_size']} samples from {data}"
            f"{_overlap(records, protocol)}."
        )
    steps = "" if protocol["tuning_steps"] is None else f", {protocol['tuning_steps']} steps each"
    tried = sorted({len(row["tried"]) for row in results["rows"] if row["tried"]})
    number = " or ".join(map(str, tried)) if tried else "no"
    tuning = (
        f"Learning rates: {number} candidates for each task, method and budget, {_tuning_seeds(protocol)}{steps}, "
        f"the best {_tuned_by(results)} on the development data; (edge): the best was the lowest or highest."
    )
    measure = (
        f"Mean ± standard deviation (of the sample) over the seeds {seeds}. Differences are paired, with their 95 % "
        f"interval for other {_others_of_interval(results)}. "
        + (_WITHIN if any(row["within_full"] is not None for row in results["rows"]) else "")
        + "Trained: share of the parameters that the method has changed, those "
        "among them that it trained for a time only; without the head. "
        + ("Matrices: how many of the layers' have trained values. " if _has_places(results) else "")
        + "Time is that of a whole run."
    )
    return "\n\n".join(["\n".join(parts), tuning, measure, *_reservations(results)])


def _tuning_seeds(protocol: Mapping[str, Any]) -> str:
    *others, last = map(str, protocol["tuning_seeds"])
    return f"the mean of the seeds {', '.join(others)} and {last}" if others else f"seed {last}"


def _others_of_interval(results: Results) -> str:
    """Of what an interval says what others would give."""
    found = ["seeds"]
    if any(task["metric"] == "accuracy" for task in results["tasks"].values()):
        found.append("test problems")
    if pieces := sorted({number for row in _rows_of_losses(results) for number in _numbers_of_problems(row) if number}):
        found.append(f"pieces of the held-out data ({', '.join(map(str, pieces))})")
    return " and ".join(found)


def _rows_of_losses(results: Results) -> list[Mapping[str, Any]]:
    return [row for row in results["rows"] if results["tasks"][row["task"]]["metric"] == "loss"]


def _numbers_of_problems(row: Mapping[str, Any]) -> list[int | None]:
    """Of problems or pieces, in each of a row's differences; None: it is one of whole runs."""
    return [each["num_problems"] for each in (row["to_full"], row["to_baseline"]) if each is not None]


def _tuned_by(results: Results) -> str:
    """By what rates were chosen: of plain text there is the loss only."""
    metrics = {task["metric"] for task in results["tasks"].values()}
    return "loss" if metrics == {"loss"} else str(results["protocol"]["tuning_metric"])


def _reservations(results: Results) -> list[str]:
    """What a reader must know of these numbers and not of others: what is missing, and what is not equal."""
    protocol, rows = results["protocol"], results["rows"]
    found = []
    num_seeds = len(protocol["seeds"])
    found += results.get("remarks", ())
    missing = sum(num_seeds - row["num_finished"] for row in rows)
    if missing:
        found.append(
            f"Unfinished, or ended without a number: {missing} of {num_seeds * len(rows)} final runs (n: those that a "
            "line is made of)."
        )
    failed = [
        f"{row['label']}{budget_text(row)} at {each['rate']:g}"
        for row in rows
        for each in row["tried"]
        if each["accuracy"] is None and each["loss"] is None
    ]
    if failed:
        found.append(f"Candidates whose tuning run failed, diverged ones among them: {', '.join(failed)}.")
    diverged = [f"{row['label']}{budget_text(row)}: {row['num_diverged']}" for row in rows if row.get("num_diverged")]
    if diverged:
        found.append(f"Final runs that diverged; their answers count as they are: {', '.join(diverged)}.")
    of_losses = [row for row in _rows_of_losses(results) if _numbers_of_problems(row)]
    whole = [row for row in of_losses if None in _numbers_of_problems(row)]
    if whole:
        named = (
            "" if len(whole) == len(of_losses) else f" of {', '.join(row['label'] + budget_text(row) for row in whole)}"
        )
        found.append(f"Losses{named} are known as wholes: their intervals are for other seeds alone.")
    unequal = [each for row in rows if (each := _unequal(row, results)) is not None]
    if unequal:
        found.append(
            "Parameters at a budget are not equal where ranks or blocks do not fit it. Against "
            f"{protocol['baseline']}, or without it the budget: {', '.join(unequal)}."
        )
    return found


def _unequal(row: Mapping[str, Any], results: Results) -> str | None:
    """By how much a method has more or less than the baseline at its budget, if that is more than a twentieth.

    Where there is no baseline, it is the budget itself that a method has more or less than.
    """
    if row["budget"] is None or row["method"] == results["protocol"]["baseline"]:
        return None
    key = (row["task"], results["protocol"]["baseline"], row["budget"])
    other = next((each for each in results["rows"] if (each["task"], each["method"], each["budget"]) == key), None)
    ours, theirs = share_of_row(row), (other and share_of_row(other)) or row["budget"]
    if not ours or not theirs or abs(ours / theirs - 1) <= _EQUAL:
        return None
    return f"{row['label']}{budget_text(row)} {100 * (ours / theirs - 1):+.0f} %"


def _overlap(records: Mapping[str, int], protocol: Mapping[str, Any]) -> str:
    if records["shared"] and protocol["overlap"] == "keep":
        return f"; {records['shared']:,} questions are in training and in test data"
    dropped = records["dropped"]
    return f"; {dropped:,} training records whose question is held out were left out" if dropped else ""


def markdown(results: Results) -> str:
    """Tables and protocol as a document."""
    lines = [f"# {results['name']}", "", results["question"], "", protocol_text(results), ""]
    lines += [each.markdown() for each in tables_of(results)]
    lines += [f"`{results['command']}`; {made_on(results)}.", ""]
    return "\n".join(lines)


def made_on(results: Results) -> str:
    """Date, machine and versions, in words."""
    machine, versions = results["machine"], results["versions"]
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    jobs = results.get("jobs")
    side = "" if jobs is None else f", {jobs['jobs']} runs at a time with {jobs['threads']} threads each"
    if jobs is not None and jobs.get("varied"):
        side += f" (some with other {' and '.join(jobs['varied'])})"
    cores = f"{machine['cores']} cores{side}"
    made = f"{results['date']}, {machine['cpu']}{gpu}, {cores}, Python {machine['python']}, {packages}"
    if results.get("commit"):
        made += f", commit {results['commit']}"
    for task in results["tasks"].values():
        if task.get("base"):
            hashes = ", ".join(f"{name} {digest}" for name, digest in task["data"].items())
            made += f"; sha256 of {task['label']}: base {task['base']}, {hashes}"
    return made


def as_csv(results: Results) -> str:
    """A line for each task, method and budget; numbers as they are."""
    lines = []
    for row in results["rows"]:
        line = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        line["share_trained"] = share_of_row(row)
        for name, value in row.items():
            if name not in ("scores", "tried") and (isinstance(value, dict) or value is None):
                for part in ("mean", "deviation", "low", "high"):
                    if value is None or part in value:
                        line[f"{name}_{part}"] = None if value is None else value[part]
        line |= {f"score_seed_{seed}": value for seed, value in row["scores"].items()}
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    # Columns of nothing but nothing tell nothing.
    names = [name for name in names if any(line.get(name) is not None for line in lines)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if line.get(name) is None else line[name] for name in names] for line in lines])
    return buffer.getvalue()
