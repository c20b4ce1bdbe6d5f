"""How do forecast, simulation and measurement of a run's memory compare, phase by phase?

Pure functions of what stands in the run folder's ``memory.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.summary import ABSENT, TABLE_WIDTH, as_mapping, as_number, format_bytes
from sparse_zero.errors import InputError
from sparse_zero.files import read_json

if TYPE_CHECKING:
    from rich.table import Table

FILE_NAME = "memory.json"
# In the order of a run; others come after them.
PHASES = (
    "load", "calibration", "engine", "resume", "forward", "backward", "step", "save", "evaluate", "train",
)  # fmt: skip
# Of a training step and what comes before: where the peak of the tensors is looked for.
_COMPARED = ("load", "engine", "forward", "backward", "step")
_SOURCES = ("forecast", "simulation")
# Differences that nobody minds, however small the model.
_LEAST_BYTES = 2**20
_HEAD = ("Phase", "Forecast", "Simulated", "Tensors", "Process")


def _of_phases(part: object) -> Mapping[str, Any]:
    return as_mapping(as_mapping(part).get("phases"))


def _host_included(phase: Mapping[str, Any], offloads: bool) -> float | None:
    """Bytes of a forecast or simulated phase; on a CPU with what is offloaded, which is in the same memory there.

    Without offloading the host holds the base's entries under the values only, made before anything is recorded.
    """
    found = as_number(phase.get("peak_bytes"))
    if found is None or not offloads:
        return found
    return found + (as_number(phase.get("host_bytes")) or 0)


def _most(ranks: Sequence[Mapping[str, Any]], find: Any) -> float | None:
    known = [value for value in (as_number(find(rank)) for rank in ranks) if value is not None]
    return max(known, default=None)


def _difference(value: float | None, measured: float | None) -> float | None:
    return None if value is None or not measured else value / measured - 1


def compare(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The phases of a run side by side, each of the rank on which it took most.

    Args:
        memory: ``ranks``, ``forecast``, ``simulation``, ``device`` and ``offloads`` of ``memory.json``.

    Returns:
        ``phases``: rows of bytes by source (``forecast``, ``simulation``, ``measured`` tensors, ``process``: how much
        the process grew, or the GPU's allocator had) and the differences from ``measured`` as shares; ``peak``: the
        same of the largest phase of training.
    """
    ranks, on_host = memory["ranks"], memory["device"] == "cpu"
    offloads = on_host and bool(memory["offloads"])
    forecast, simulation = _of_phases(memory.get("forecast")), _of_phases(memory.get("simulation"))
    names = {*forecast, *simulation}
    for rank in ranks:
        names |= {*rank["tensors"], *rank["process"]}
    rows = []
    for name in sorted(names, key=lambda each: (PHASES.index(each) if each in PHASES else len(PHASES), each)):
        process = _most(
            ranks,
            lambda rank, name=name: (
                rank["process"][name] - (rank["at_start"] if on_host else 0) if name in rank["process"] else None
            ),
        )
        measured = process
        if on_host:
            measured = _most(ranks, lambda rank, name=name: as_mapping(rank["tensors"].get(name)).get("peak_bytes"))
        rows.append(
            _row(
                name,
                _host_included(as_mapping(forecast.get(name)), offloads),
                _host_included(as_mapping(simulation.get(name)), offloads),
                measured,
                process,
            )
        )
    return {"phases": rows, "peak": _peak(rows)}


def _row(
    name: str, forecast: float | None, simulation: float | None, measured: float | None, process: float | None
) -> dict[str, Any]:
    return {
        "phase": name,
        "forecast_bytes": forecast,
        "simulation_bytes": simulation,
        "measured_bytes": measured,
        "process_bytes": process,
        "forecast_difference": _difference(forecast, measured),
        "simulation_difference": _difference(simulation, measured),
    }


def _peak(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the phases that were measured, each source's largest."""
    shared = [row for row in rows if row["phase"] in _COMPARED and row["measured_bytes"] is not None]

    def largest(name: str) -> float | None:
        return max((row[name] for row in shared if row[name] is not None), default=None)

    found = [largest(f"{name}_bytes") for name in ("forecast", "simulation", "measured", "process")]
    return _row("peak", *found)


def find_warnings(comparison: Mapping[str, Any], warn_above: float) -> list[str]:
    """A line for each source whose peak differs from the measured one by more than the share ``warn_above``."""
    peak, found = comparison["peak"], []
    for source in _SOURCES:
        difference = peak[f"{source}_difference"]
        if difference is None or abs(difference) <= warn_above:
            continue
        value, measured = peak[f"{source}_bytes"], peak["measured_bytes"]
        if abs(value - measured) < _LEAST_BYTES:
            continue
        found.append(
            f"the {source} of the peak memory of a rank is {format_bytes(value)}, and {format_bytes(measured)} were "
            f"measured ({100 * difference:+.1f} %): {FILE_NAME} has both by phase and kind"
        )
    return found


def load_memory(run_folder: Path) -> dict[str, Any] | None:
    """The content of a run folder's ``memory.json``; None where the run has not written it.

    Raises:
        InputError: it is damaged.
    """
    path = run_folder / FILE_NAME
    if not path.exists():
        return None
    content = read_json(path, strict=True)
    if not isinstance(content, dict) or not isinstance(as_mapping(content.get("comparison")).get("phases"), list):
        raise InputError(f"{path} holds no comparison of memory: delete it")
    return content


def _cell(value: object, difference: object) -> str:
    shown, share = format_bytes(value), as_number(difference)
    return shown if share is None else f"{shown} ({100 * share:+.1f} %)"


def comparison_rows(memory: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a table: phase, forecast, simulated, tensors, process."""
    comparison = memory["comparison"]
    rows = [*comparison["phases"], {**as_mapping(comparison.get("peak")), "phase": "peak of training"}]
    return [
        (
            str(row["phase"]),
            _cell(row.get("forecast_bytes"), row.get("forecast_difference")),
            _cell(row.get("simulation_bytes"), row.get("simulation_difference")),
            format_bytes(row.get("measured_bytes")),
            format_bytes(row.get("process_bytes")),
        )
        for row in rows
    ]


def comparison_head(memory: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the columns."""
    return (*_HEAD[:-1], "Allocator") if memory.get("device") == "cuda" else _HEAD


def comparison_notes(memory: Mapping[str, Any]) -> list[str]:
    """What must be known to read the table: which micro-batches, what is missing and why, what differs."""
    notes = []
    ranks = [as_mapping(rank) for rank in memory.get("ranks", ())]
    batches: list[str] = []
    for rank in ranks:
        for each in rank.get("micro_batches", ()):
            text = f"{each['micro_batch']} x {each['length']} tokens, {each['label_positions']} with logits"
            batches += [] if text in batches else [text]
    steps = max((int(as_number(rank.get("steps")) or 0) for rank in ranks), default=0)
    if batches:
        shown = "; ".join(batches[:3]) + (f" and {len(batches) - 3} more" if len(batches) > 3 else "")
        notes.append(
            f"Measured in {'the second step' if steps > 1 else 'the first step'} with micro-batches of {shown}."
        )
    else:
        notes.append("No step was measured; the forecast is for micro-batches of full length.")
    if memory.get("device") == "cpu":
        start = _most(ranks, lambda rank: rank.get("at_start"))
        notes.append(f"Process: resident memory beyond the {format_bytes(start)} held before the run.")
    for source in _SOURCES:
        problem = as_mapping(memory.get(source)).get("problem")
        if problem:
            notes.append(f"No {source}: {problem}.")
    return notes + [f"Warning: {text}." for text in memory.get("warnings", ())]


def memory_table(memory: Mapping[str, Any]) -> Table:
    """The comparison, at most ``TABLE_WIDTH`` characters wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Without differences where nothing was measured to differ from.
    table = Table(
        box=box.SIMPLE_HEAD, title="Memory of the fullest rank", title_justify="left", pad_edge=False, width=TABLE_WIDTH
    )
    for number, name in enumerate(comparison_head(memory)):
        table.add_column(name, justify="right" if number else "left")
    rows = comparison_rows(memory)
    for number, row in enumerate(rows):
        bold = number + 1 == len(rows)
        cells = [Text(cell.replace(" (", "\n")[:-1] if cell.endswith("%)") else cell) for cell in row]
        table.add_row(*cells, style="bold" if bold else None, end_section=number + 2 == len(rows))
    return table


def is_worth_showing(memory: Mapping[str, Any]) -> bool:
    """Whether any phase has a number."""
    return any(cell != ABSENT for row in comparison_rows(memory) for cell in row[1:])
