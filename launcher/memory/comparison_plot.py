"""How do forecast, simulation and measurement of a run's memory look side by side? From memory.json to a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, say_empty, style, title
from launcher.summary import as_mapping, as_number, format_bytes
from sparse_zero.memory.simulation.timeline import KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours by kind of tensor, in the order of KINDS, and two darker ones.
_COLOURS = dict(
    zip(
        KINDS,
        ("#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#009e73", "#7a5195", "#cc79a7", "#f0e442", "#9a6324"),
        strict=True,
    )
)
_SOURCES = ("forecast", "simulated", "measured", "process")
# Bars of one phase lie this far apart; phases further.
_BAR, _GAP = 1.0, 0.9
# What the process takes may be many times the tensors of a small model: its bar ends here, as a multiple of theirs.
_MOST_OF_PROCESS = 1.25


def _kinds(rank: Mapping[str, Any], phase: str) -> Mapping[str, int]:
    return as_mapping(as_mapping(as_mapping(rank.get("tensors")).get(phase)).get("by_kind"))


def _by_source(memory: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Mapping[str, int]]:
    """By source, bytes by kind; of the rank that took most."""
    name = row["phase"]
    found: dict[str, Mapping[str, int]] = {}
    for source, key in (("forecast", "forecast"), ("simulated", "simulation")):
        phase = as_mapping(as_mapping(as_mapping(memory.get(key)).get("phases")).get(name))
        if phase:
            found[source] = as_mapping(phase.get("by_kind"))
    ranks = [_kinds(as_mapping(rank), name) for rank in memory.get("ranks", ())]
    most = max(ranks, key=lambda kinds: sum(kinds.values()), default={})
    if most:
        found["measured"] = most
    return found


def shown_phases(memory: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of the comparison that have tensors to show, from the forecast or from anywhere."""
    return [
        row
        for row in memory["comparison"]["phases"]
        if any(as_number(row.get(f"{name}_bytes")) for name in ("forecast", "simulation"))
        or (as_number(row.get("measured_bytes")) and memory.get("device") == "cpu")
    ]


def _unit(most: float) -> tuple[str, float]:
    return ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)


def comparison_figure(memory: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Bars of each phase: the forecast, the simulation and the measured tensors by kind, and the process.

    Args:
        memory: the content of ``memory.json``.
        theme: colours.
    """
    rows = shown_phases(memory)
    process = "allocator" if memory.get("device") == "cuda" else "process"
    bars: list[tuple[float, str, Mapping[str, int] | float]] = []
    middles: list[float] = []
    place = 0.0
    for row in rows:
        first = place
        for source, kinds in _by_source(memory, row).items():
            bars.append((place, source, kinds))
            place += _BAR
        number = as_number(row.get("process_bytes"))
        if number:
            bars.append((place, process, number))
            place += _BAR
        middles.append((first + place - _BAR) / 2)
        place += _GAP
    figure = new_figure(WIDTH_INCHES, max(2.6, 0.2 * place + 1.7), theme)
    axes = figure.subplots()
    style(axes, theme)
    title(axes, "Memory of the fullest rank, by phase", theme)
    tensors = [sum(value.values()) for _, _, value in bars if isinstance(value, Mapping)]
    if not bars:
        say_empty(axes, "nothing was forecast or measured", theme)
        return figure
    most = max(tensors, default=0) or max(float(value) for _, _, value in bars if not isinstance(value, Mapping))
    unit, size = _unit(most)
    axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    shown = [kind for kind in KINDS if any(kind in value for _, _, value in bars if isinstance(value, Mapping))]
    for kind in shown:
        places, widths, starts = _bars_of(kind, shown, bars, size)
        axes.barh(places, widths, left=starts, height=0.86, color=_COLOURS[kind], label=kind,
                  edgecolor=theme.background, linewidth=0.4)  # fmt: skip
    for where, source, value in bars:
        total = sum(value.values()) if isinstance(value, Mapping) else float(value)
        end = total / size
        if not isinstance(value, Mapping):
            end = min(end, _MOST_OF_PROCESS * most / size)
            axes.barh([where], [end], height=0.5, color=theme.muted, alpha=0.55)
        axes.text(end + 0.008 * most / size, where, f"{source} {format_bytes(total)}", va="center", color=theme.ink,
                  fontsize=7.5)  # fmt: skip
    axes.set_xlim(0, (_MOST_OF_PROCESS + 0.32) * most / size)
    axes.set_yticks(middles, [str(row["phase"]) for row in rows])
    axes.tick_params(axis="y", labelsize=10, labelcolor=theme.ink, length=0)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    if shown:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8.5, frameon=False, labelcolor=theme.ink)
    return figure


def _bars_of(
    kind: str, order: Sequence[str], bars: Sequence[tuple[float, str, Mapping[str, int] | float]], size: float
) -> tuple[list[float], list[float], list[float]]:
    """Places, widths and starts of one kind's parts of the bars."""
    places, widths, starts = [], [], []
    for place, _, value in bars:
        if isinstance(value, Mapping):
            before = order[: order.index(kind)]
            places.append(place)
            widths.append(value.get(kind, 0) / size)
            starts.append(sum(value.get(each, 0) for each in before) / size)
    return places, widths, starts
