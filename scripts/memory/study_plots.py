"""How do the curves of a memory study look? Pure functions from the rows of its table to matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, style, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
GIB = 2**30
# Inches, of the pictures with two panels and many lines: a file of less than 100 kB.
_WIDTH = 0.9 * WIDTH_INCHES
# What this package trains is drawn through, what it is compared with in dashes.
PEERS = ("full", "lora", "dora", "qlora")
# Okabe and Ito's colours; the same for a method in every picture.
_COLOURS = {
    "smt": "#0072b2",
    "rocoft-rows": "#009e73",
    "rocoft-columns": "#56b4e9",
    "mixed": "#7a5195",
    "diablo": "#cc79a7",
    "smt-nf4": "#7fb03a",
    "full": "#d55e00",
    "lora": "#e69f00",
    "dora": "#9a6324",
    "qlora": "#b3a000",
}
# Not those of methods, which stand beside them.
_STAGES = {0: "#8a8f98", 1: "#b5a42e", 2: "#2e8b8b", 3: "#8b2e6b"}
_MARKERS = {"smt": "o", "lora": "s", "full": "D"}


def _axes(axes: Axes, theme: Theme, heading: str, xlabel: str, *, base: int = 2) -> None:
    style(axes, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xscale("log", base=base)
    axes.set_xlabel(xlabel)
    title(axes, heading, theme)


def _ticks(axes: Axes, values: Sequence[float], label: Callable[[float], str]) -> None:
    """Ticks at the values themselves, at every other one where there are many, and no others."""
    from matplotlib.ticker import NullLocator

    shown = list(values) if len(values) <= 7 else list(values)[::2]
    axes.set_xticks(shown, [label(value) for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _bytes_axis(axes: Axes, *, label: bool = True) -> None:
    """Logarithmic, in GiB as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if label:
        axes.set_ylabel("GiB of one rank")


def _legend(figure: Figure, axes: Sequence[Axes], theme: Theme, columns: int) -> None:
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        labelcolor=theme.ink,
    )


def _curve(axes: Axes, rows: Rows, axis: str, *, colour: str, label: str, dashed: bool, theme: Theme) -> None:
    """One line by the closed form, and points where it was simulated."""
    ordered = sorted(rows, key=lambda row: float(row[axis]))
    if not ordered:
        return
    axes.plot(
        [row[axis] for row in ordered],
        [row["peak_bytes"] / GIB for row in ordered],
        color=colour,
        linewidth=1.8,
        linestyle=(0, (4, 2)) if dashed else "-",
        label=label,
    )
    known = [row for row in ordered if row.get("simulated_peak_bytes")]
    axes.plot(
        [row[axis] for row in known],
        [row["simulated_peak_bytes"] / GIB for row in known],
        linestyle="none",
        marker="o",
        markersize=6.5,
        markerfacecolor="none",
        markeredgecolor=theme.ink,
        markeredgewidth=1.2,
        label="simulated" if known else "_none",
        zorder=5,
    )


def _methods(axes: Axes, rows: Rows, axis: str, theme: Theme) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        _curve(axes, own, axis, colour=_COLOURS[method], label=method, dashed=method in PEERS, theme=theme)


def short(number: float) -> str:
    """1024 as 1k, for axes of tokens and ranks."""
    return f"{number / 1024:g}k" if number >= 1024 else f"{number:g}"


def world_figure(rows: Rows, theme: Theme = LIGHT) -> Figure:
    """Against the number of ranks: the stages for SMT and full fine-tuning, and all methods at stage 3."""
    figure = new_figure(_WIDTH, 4.2, theme)
    left, right = figure.subplots(1, 2, sharey=True)
    worlds = sorted({row["world_size"] for row in rows})
    for axes, heading in ((left, "Stages: SMT (line), full (dashes)"), (right, "All methods, stage 3")):
        _axes(axes, theme, heading, "ranks")
    for method in ("smt", "full"):
        for stage, colour in _STAGES.items():
            own = [row for row in rows if row["method"] == method and row["stage"] == stage]
            _curve(left, own, "world_size", colour=colour, label=f"stage {stage}", dashed=method == "full", theme=theme)
    _methods(right, [row for row in rows if row["stage"] == 3], "world_size", theme)
    _bytes_axis(left)
    _bytes_axis(right, label=False)
    for axes in (left, right):
        _ticks(axes, worlds, short)
    _legend(figure, (left, right), theme, 6)
    return figure


def axis_figure(
    rows: Rows, axis: str, *, heading: str, xlabel: str, label: Callable[[float], str], theme: Theme = LIGHT
) -> Figure:
    """All methods against one axis."""
    figure = new_figure(WIDTH_INCHES, 4.8, theme)
    axes = figure.subplots()
    _axes(axes, theme, heading, xlabel)
    _methods(axes, rows, axis, theme)
    _bytes_axis(axes)
    _ticks(axes, sorted({row[axis] for row in rows}), label)
    _legend(figure, (axes,), theme, 6)
    return figure


def length_figure(rows: Rows, theme: Theme = LIGHT) -> Figure:
    """Against the tokens of a sample, with gradient checkpointing and without."""
    figure = new_figure(_WIDTH, 4.2, theme)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, checkpointing in zip(panels, (True, False), strict=True):
        _axes(axes, theme, f"{'With' if checkpointing else 'Without'} gradient checkpointing", "tokens of a sample")
        _methods(axes, [row for row in rows if row["gradient_checkpointing"] == checkpointing], "length", theme)
        _ticks(axes, sorted({row["length"] for row in rows}), short)
    for axes in panels:
        _bytes_axis(axes, label=axes is panels[0])
    _legend(figure, panels, theme, 6)
    return figure


def model_figure(rows: Rows, theme: Theme = LIGHT) -> Figure:
    """Against the size of the model, at stages 2 and 3."""
    figure = new_figure(_WIDTH, 4.2, theme)
    panels = figure.subplots(1, 2, sharey=True)
    sizes = sorted({row["parameters"] for row in rows})
    for axes, stage in zip(panels, (2, 3), strict=True):
        _axes(axes, theme, f"Stage {stage}", "parameters", base=10)
        _methods(axes, [row for row in rows if row["stage"] == stage], "parameters", theme)
        _ticks(axes, sizes, lambda size: f"{size / 1e9:.2g}B")
        axes.tick_params(axis="x", labelsize=8)
    for axes in panels:
        _bytes_axis(axes, label=axes is panels[0])
    _legend(figure, panels, theme, 6)
    return figure


def frontier_figure(rows: Rows, theme: Theme = LIGHT) -> Figure:
    """The largest model that fits, against the number of GPUs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    memories = sorted({row["gpu_gib"] for row in rows})
    figure = new_figure(WIDTH_INCHES, 4.4, theme)
    panels = figure.subplots(1, len(memories), sharey=True, squeeze=False)[0]
    for axes, gib in zip(panels, memories, strict=True):
        _axes(axes, theme, f"GPUs of {gib:g} GiB", "GPUs")
        own = [row for row in rows if row["gpu_gib"] == gib]
        for method in dict.fromkeys(row["method"] for row in own):
            line = sorted((row for row in own if row["method"] == method), key=lambda row: int(row["world_size"]))
            axes.plot(
                [row["world_size"] for row in line],
                [row["parameters"] / 1e9 for row in line],
                color=_COLOURS[method],
                linewidth=1.8,
                linestyle=(0, (4, 2)) if method in PEERS else "-",
                marker=_MARKERS.get(method, "o"),
                markersize=4.5,
                label=method,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}B"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _ticks(axes, sorted({row["world_size"] for row in own}), short)
    panels[0].set_ylabel("parameters of the largest model")
    _legend(figure, panels, theme, 6)
    return figure


def headline_figure(reductions: Rows, claimed: float, theme: Theme = LIGHT) -> Figure:
    """By which share SMT needs less than full fine-tuning, against the number of ranks.

    Args:
        reductions: model, stage, gradient_checkpointing, world_size, reduction, and simulated_reduction if known.
        claimed: drawn as a line.
        theme: colours.
    """
    from matplotlib.ticker import PercentFormatter

    models = list(dict.fromkeys(row["model"] for row in reductions))
    figure = new_figure(WIDTH_INCHES, 4.6, theme)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _axes(axes, theme, model, "ranks")
        own = [row for row in reductions if row["model"] == model]
        for stage in sorted({row["stage"] for row in own}):
            for checkpointing in (True, False):
                line = [row for row in own if (row["stage"], row["gradient_checkpointing"]) == (stage, checkpointing)]
                axes.plot(
                    [row["world_size"] for row in line],
                    [row["reduction"] for row in line],
                    color=_STAGES[stage],
                    linewidth=1.8,
                    linestyle="-" if checkpointing else (0, (1, 1.5)),
                    label=f"stage {stage}{'' if checkpointing else ', all activations kept'}",
                )
                known = [row for row in line if row.get("simulated_reduction") is not None]
                axes.plot(
                    [row["world_size"] for row in known],
                    [row["simulated_reduction"] for row in known],
                    linestyle="none",
                    marker="o",
                    markersize=6.5,
                    markerfacecolor="none",
                    markeredgecolor=theme.ink,
                    label="simulated" if known else "_none",
                    zorder=5,
                )
        axes.axhline(claimed, color=theme.warning, linewidth=1.4, linestyle="--", label=f"claimed: {claimed:.0%}")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _ticks(axes, sorted({row["world_size"] for row in own}), short)
    panels[0].set_ylabel("less than full fine-tuning")
    _legend(figure, panels, theme, 3)
    return figure
