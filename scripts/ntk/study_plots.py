"""How do kernels look, and how does what they say change with the budget? Pure functions to matplotlib figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, style, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

Rows = Sequence[Mapping[str, Any]]
# Okabe and Ito's, as in the memory study: rows, columns, blocks (SMT), LoRA.
COLOURS = {"rows": "#009e73", "columns": "#56b4e9", "blocks": "#0072b2", "lora": "#e69f00"}
_SCORE_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_SCORE_MARKERS = ("o", "s", "D", "^")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The deviation is that of the sample; 0 of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _curve(rows: Rows, measure: str) -> list[tuple[float, float, float]]:
    """(parameters, mean, deviation) by budget, from small to large."""
    points = []
    for budget in sorted({row["budget"] for row in rows}):
        own = [row for row in rows if row["budget"] == budget]
        mean, deviation = mean_and_deviation([row[measure] for row in own])
        points.append((statistics.fmean(row["num_parameters"] for row in own), mean, deviation))
    return points


def _budget_axes(axes: Axes, rows: Rows, measure: str, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    style(axes, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    scores = list(dict.fromkeys(row["score"] for row in rows if row["score"]))
    shift = 0
    for kind, colour in COLOURS.items():
        for score in [score for score in (*scores, "") if any((r["kind"], r["score"]) == (kind, score) for r in rows)]:
            curve = _curve([row for row in rows if (row["kind"], row["score"]) == (kind, score)], measure)
            number = scores.index(score) if score else 0
            # Beside each other, for equal budgets would hide each other's deviations.
            factor = 1.02 ** (shift % 9 - 4) if score else 1.0
            axes.errorbar(
                [x * factor for x, _, _ in curve],
                [y for _, y, _ in curve],
                yerr=[error for _, _, error in curve],
                color=colour,
                linestyle=_SCORE_LINES[number % 4],
                marker=_SCORE_MARKERS[number % 4],
                markersize=4.5,
                linewidth=1.6,
                elinewidth=0.9,
                capsize=2.0,
                label=f"{kind}, {score}" if score else "LoRA, A random, B zero",
            )
            shift += 1
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    )
    axes.xaxis.set_minor_locator(NullLocator())


def _references(theme: Theme) -> dict[str, tuple[str, str, Any]]:
    """Name, colour and dashes of the lines that have no budget."""
    return {
        "full": ("all parameters", theme.ink, "-"),
        "vectors": ("biases and norms", theme.muted, (0, (4, 2))),
        "head": ("the head alone", theme.warning, (0, (1, 1))),
    }


def budget_figure(rows: Rows, measure: str, label: str, theme: Theme = LIGHT) -> Figure:
    """One measure against the number of trained parameters; a panel for each head (and number of shots).

    Args:
        rows: of :func:`scripts.ntk.study_points.rows_of`.
        measure: name of a column.
        label: of the vertical axis.
        theme: colours.
    """
    panels = list(dict.fromkeys((row["head"], row["shots"]) for row in rows))
    width = 2 if len(panels) > 1 else 1
    height = math.ceil(len(panels) / width)
    figure = new_figure(WIDTH_INCHES, 1.1 + 3.4 * height, theme)
    grid = figure.subplots(height, width, sharey=True, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (head, shots) in zip(grid, panels, strict=False):
        own = [row for row in rows if (row["head"], row["shots"]) == (head, shots)]
        _budget_axes(axes, own, measure, theme)
        title(axes, f"{f'{head} head, ' if head else ''}{shots} samples a class", theme)
        for kind, (named, colour, dash) in _references(theme).items():
            values = [row[measure] for row in own if row["kind"] == kind]
            # The distance of the full kernel to itself is no line to compare with.
            if values and (kind != "full" or measure == "accuracy"):
                axes.axhline(statistics.fmean(values), color=colour, linewidth=1.2, linestyle=dash, label=named)
    for axes in grid[: len(panels) : width]:
        axes.set_ylabel(label)
    found: dict[str, Any] = {}
    for axes in grid[: len(panels)]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(text, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
        labelcolor=theme.ink,
    )
    return figure


def kernels_figure(kernels: Mapping[str, Tensor], labels: Sequence[int], theme: Theme = LIGHT) -> Figure:
    """The kernels of the training samples, as cosines between samples' gradients; lines part the classes.

    Args:
        kernels: [N, N] by the heading of their panel.
        labels: [N] in ascending order.
        theme: colours.
    """
    columns = min(4, len(kernels))
    height = math.ceil(len(kernels) / columns)
    figure = new_figure(WIDTH_INCHES, 0.3 + 1.95 * height, theme)
    grid = figure.subplots(height, columns, squeeze=False).flatten()
    for axes in grid[len(kernels) :]:
        axes.set_visible(False)
    edges = [number for number in range(1, len(labels)) if labels[number] != labels[number - 1]]
    image: Any = None
    for axes, (name, kernel) in zip(grid, kernels.items(), strict=False):
        root = kernel.diagonal().clamp(min=1e-300).sqrt()
        cosines = kernel / root / root.unsqueeze(1)
        image = axes.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
        for edge in edges:
            axes.axhline(edge - 0.5, color="#1f2328", linewidth=0.8)
            axes.axvline(edge - 0.5, color="#1f2328", linewidth=0.8)
        style(axes, theme)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(name.replace("-", " "), loc="left", color=theme.ink, fontsize=8.5)
    bar = figure.colorbar(image, ax=list(grid[: len(kernels)]), shrink=0.8, pad=0.02)
    bar.set_label("cosine of two samples' gradients", color=theme.ink, fontsize=9)
    bar.ax.tick_params(colors=theme.muted, labelsize=8)
    bar.outline.set_visible(False)
    return figure
