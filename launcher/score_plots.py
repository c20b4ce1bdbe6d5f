"""How are the scores distributed: over each weight, over module types, and what does a budget capture of them?

Pure functions to matplotlib figures, as in :mod:`launcher.plots`.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, say_empty, style, theme_colours, title
from launcher.selection_map import PLURALS, locate_weight, module_order, short_count, short_names
from launcher.selection_stats import BudgetCurve, Histogram, chosen_mask, kinds_and_scores
from launcher.selection_tables import BUDGET_FACTORS
from launcher.summary import format_percent
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Weights in one picture: more could not be told apart. Of more, evenly spaced ones are shown.
_MAX_PANELS = 48
# Height of all panels together, and width that colour bar and labels leave them.
_MAX_MAP_INCHES, _MAP_INCHES = 7.0, 6.9
_LABEL_INCHES = 0.2
# Points of a picture along the channels of rows and columns: of neighbouring channels the largest score is shown.
_MAX_STRIP_POINTS = 512
# Orders of magnitude of scores that colours tell apart, from the largest down.
_MAX_DECADES = 5.0


@dataclass(frozen=True, kw_only=True)
class WeightScores:
    """Scores of the regions of one kind in all weights of a module type."""

    module: str
    candidates: tuple[Candidates, ...]

    @property
    def name(self) -> str:
        """For a file: letters, digits, dots and dashes."""
        return re.sub(r"[^\w.-]+", "-", f"{self.module}-{self.candidates[0].kind}-{self.candidates[0].score}")


def weight_types(scores: RegionScores) -> list[WeightScores]:
    """One for every module type, kind and score, in the order of the model."""
    found = []
    for members in kinds_and_scores(scores).values():
        by_module: dict[str, list[Candidates]] = {}
        for c in members:
            by_module.setdefault(locate_weight(c.weight)[0], []).append(c)
        for module in sorted(by_module, key=module_order):
            inside = sorted(by_module[module], key=lambda c: (locate_weight(c.weight)[1] or 0, c.slice_index or 0))
            found.append(WeightScores(module=module, candidates=tuple(inside)))
    return found


def _panel_label(c: Candidates) -> str:
    layer = locate_weight(c.weight)[1]
    parts = [] if layer is None else [f"layer {layer}"]
    if c.slice_index is not None:
        parts.append(f"[{c.slice_index}]")
    return " ".join(parts) or c.module


def _norm(values: Tensor) -> Any:
    """Logarithmic where there are positive scores, down to ``_MAX_DECADES`` below the largest; else linear."""
    from matplotlib.colors import LogNorm, Normalize

    finite = values[values.isfinite()]
    positive = finite[finite > 0]
    if not len(positive):
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        return Normalize(low, high if high > low else low + 1.0)
    high = float(positive.max())
    # A few regions with hardly any score would take the colours from all others.
    low = max(float(positive.kthvalue(1 + len(positive) // 100).values), high * 10.0**-_MAX_DECADES)
    return LogNorm(low if low < high else high / 10, high, clip=True)


def _score_bar(figure: "Figure", axes: "Axes", mesh: Any, label: str, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0, which="both")
    bar.set_label(label, color=theme.ink, fontsize=9)
    if mesh.norm.vmin > 0 and type(mesh.norm).__name__ == "LogNorm":
        decades = math.log10(mesh.norm.vmax / mesh.norm.vmin)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """A score on an axis: ``1e-6``, ``0.002``."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    return re.sub(r"e([+-])0*", lambda match: "e" + match.group(1).replace("+", ""), f"{value:.0e}")


def score_map_figure(shown: WeightScores, scores: RegionScores, selection: Selection, theme: Theme = LIGHT) -> "Figure":
    """Scores of every region of a module type, a panel or a row for each layer, with the chosen ones marked.

    Args:
        shown: one of :func:`weight_types`.
        scores: what it is from.
        selection: what was chosen.
        theme: colours.
    """
    members = list(shown.candidates)
    total = len(members)
    if total > _MAX_PANELS:
        members = [members[round(i * (total - 1) / (_MAX_PANELS - 1))] for i in range(_MAX_PANELS)]
    kind = members[0].kind
    masks = [chosen_mask(c, selection.weights.get(c.weight)) for c in shown.candidates]
    num_chosen, num_regions = (sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks))
    heading = f"Scores of the {PLURALS[kind]} in {shown.module}: {num_chosen:,} of {num_regions:,} chosen"
    if len(members) < total:
        heading += f"; {len(members)} of {total} weights shown"
    values = [scores.scores[c.weight, c.kind] for c in members]
    chosen = [chosen_mask(c, selection.weights.get(c.weight)) for c in members]
    draw = _draw_blocks if kind == "block" else _draw_strips
    return draw(members, values, chosen, heading, theme)


def _prepared(values: Tensor) -> Any:
    """Scores as a picture takes them: NaN, which is left empty, where a region is excluded."""
    return values.masked_fill(~values.isfinite(), math.nan).numpy()


def _draw_blocks(
    members: Sequence[Candidates], values: Sequence[Tensor], chosen: Sequence[Tensor], heading: str, theme: Theme
) -> "Figure":
    """A panel for each weight, in the proportions of the weight; all on one pair of axes that counts in inches."""
    from matplotlib.collections import LineCollection

    rows, columns = (side * number for side, number in zip(members[0].block_shape, members[0].grid, strict=True))
    aspect = min(max(rows / columns, 0.2), 4.0)
    columns, panel = _arrangement(len(members), aspect)
    rows = -(-len(members) // columns)
    tall = panel * aspect + _LABEL_INCHES
    gap = 0.12
    size = columns * panel + (columns - 1) * gap, rows * tall + (rows - 1) * gap
    width = min(WIDTH_INCHES, max(size[0] + 1.3, 5.0))
    heading = textwrap.fill(heading, int(9.5 * width))
    figure = new_figure(width, size[1] + 0.9 + 0.18 * heading.count("\n"), theme)
    axes = figure.subplots()
    axes.set_anchor("W")
    style(axes, theme)
    colours = theme_colours(theme).with_extremes(bad=theme.empty)
    norm = _norm(torch.cat([each.reshape(-1) for each in values]))
    edges: list[Any] = []
    mesh: Any = None
    for number, (c, scores, mask) in enumerate(zip(members, values, chosen, strict=True)):
        left = (number % columns) * (panel + gap)
        top = (number // columns) * (tall + gap) + _LABEL_INCHES
        extent = (left, left + panel, top + panel * aspect, top)
        mesh = axes.imshow(_prepared(scores), cmap=colours, norm=norm, extent=extent, origin="upper")
        axes.text(left, top - 0.04, _panel_label(c), fontsize=8, color=theme.muted, va="bottom")
        cell = panel / c.grid[1], panel * aspect / c.grid[0]
        edges += [
            [(left + x * cell[0], top + y * cell[1]) for x, y in ends] for ends in _outline(mask.nonzero().tolist())
        ]
    axes.set_aspect("equal")
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)
    axes.set_axis_off()
    smallest = min(panel / members[0].grid[1], panel * aspect / members[0].grid[0])
    line = min(1.5, max(0.9, 72 * smallest / 5))
    axes.add_collection(LineCollection(edges, colors=theme.mark, linewidths=line, capstyle="projecting"))
    _mark_legend(axes, heading, theme)
    _score_bar(figure, axes, mesh, f"score ({members[0].score})", theme)
    return figure


def _arrangement(number: int, aspect: float) -> tuple[int, float]:
    """(panels side by side, width of one in inches): as large as they can be within the picture's height."""
    best = (1, 0.0)
    for columns in range(1, number + 1):
        rows = -(-number // columns)
        width = (_MAP_INCHES - 0.12 * (columns - 1)) / columns
        room = (_MAX_MAP_INCHES - rows * (_LABEL_INCHES + 0.12)) / rows
        width = min(width, room / aspect, 3.4)
        if width > best[1] + 1e-9:
            best = columns, width
    return best


def _outline(cells: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """The edges between chosen cells (row, column) and others, as pairs of corners (x, y)."""
    inside = {(row, column) for row, column in cells}
    edges = []
    for row, column in inside:
        corners = (column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1)
        neighbours = (row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)
        for side, neighbour in enumerate(neighbours):
            if neighbour not in inside:
                edges.append([corners[side], corners[(side + 1) % 4]])
    return edges


def _mark_legend(axes: "Axes", heading: str, theme: Theme) -> None:
    """The heading above the axes, and what the marks are below them."""
    title(axes, heading, theme)
    axes.text(
        0.0, -0.01, "outlined: chosen", transform=axes.transAxes, color=theme.mark, fontsize=9, va="top", ha="left"
    )  # fmt: skip


def _draw_strips(
    members: Sequence[Candidates], values: Sequence[Tensor], chosen: Sequence[Tensor], heading: str, theme: Theme
) -> "Figure":
    """A line for each weight, along its channels; chosen channels have a mark below."""
    from matplotlib.ticker import MaxNLocator

    number, length = len(members), max(c.num_regions for c in members)
    every = -(-length // _MAX_STRIP_POINTS)
    points = -(-length // every)
    image = torch.full((number, points * every), -torch.inf, dtype=torch.float64)
    for line, scores in zip(image, values, strict=True):
        line[: len(scores)] = scores
    image = image.reshape(number, points, every).amax(2)
    row_inches = min(max(4.2 / number, 0.15), 0.4)
    figure = new_figure(WIDTH_INCHES, row_inches * number + 1.15, theme)
    axes = figure.subplots()
    style(axes, theme)
    colours = theme_colours(theme).with_extremes(bad=theme.empty)
    mesh = axes.imshow(
        _prepared(image),
        cmap=colours,
        norm=_norm(torch.cat([each.reshape(-1) for each in values])),
        extent=(0, points * every, number, 0),
        aspect="auto",
        interpolation="nearest",
    )
    marks = [(line, int(channel)) for line, mask in enumerate(chosen) for channel in mask.nonzero().squeeze(1)]
    axes.plot(
        [channel + 0.5 for _, channel in marks],
        [line + 0.82 for line, _ in marks],
        linestyle="none", marker="^", markersize=min(4.5, 18 * row_inches), color=theme.mark,
        markeredgecolor=theme.background, markeredgewidth=0.4, clip_on=False,
    )  # fmt: skip
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlim(0, length)
    axes.set_ylim(number, 0)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    step = -(-number // 24)
    axes.set_yticks([line + 0.5 for line in range(0, number, step)], [_panel_label(c) for c in members[::step]])
    axes.set_xlabel("output channel" if members[0].kind == "row" else "input channel")
    if every > 1:
        heading += f"; each point: the largest of {every} neighbouring channels"
    title(axes, textwrap.fill(heading, int(9.5 * WIDTH_INCHES)), theme)
    axes.annotate(
        "▲ chosen", (1.0, 0.0), xycoords="axes fraction", xytext=(0, -32), textcoords="offset points",
        color=theme.mark, fontsize=9, ha="right",
    )  # fmt: skip
    _score_bar(figure, axes, mesh, f"score ({members[0].score})", theme)
    return figure


def histogram_figure(found: Sequence[Histogram], theme: Theme = LIGHT) -> "Figure":
    """How many regions of each module type have which score, all candidates and the chosen ones.

    Args:
        found: as from :func:`~launcher.selection_stats.histograms`; at least one.
        theme: colours.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    columns = 1 if len(found) == 1 else 2
    rows = -(-len(found) // columns)
    figure = new_figure(WIDTH_INCHES, 1.55 * rows + 0.75, theme)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    names = dict(zip(modules := list(dict.fromkeys(each.module for each in found)), short_names(modules), strict=True))
    for axes in all_axes.flat[len(found) :]:
        axes.set_visible(False)
    for axes, each in zip(all_axes.flat, found, strict=False):
        style(axes, theme)
        edges = each.edges.tolist()
        for counts, colour, alpha, label in (
            (each.every, theme.primary, 0.45, "all candidates"),
            (each.chosen, theme.secondary, 1.0, "chosen"),
        ):
            axes.stairs(counts.tolist(), edges, fill=True, color=colour, alpha=alpha, label=label, baseline=0.5)
        if each.is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * max(int(each.every.max()), 1))
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8, which="both")
        axes.tick_params(length=0, which="minor")
        number, total = int(each.chosen.sum()), int(each.every.sum())
        heading = f"{names[each.module]}, {PLURALS[each.kind]}: {number:,} of {total:,}"
        axes.set_title(heading, loc="left", color=theme.ink, fontsize=9)
    handles, labels = all_axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside upper right", ncols=2, fontsize=9, frameon=False, borderaxespad=0.0
    )
    for text in legend.get_texts():
        text.set_color(theme.ink)
    figure.suptitle("Regions by score", x=0.02, ha="left", color=theme.ink, fontsize=11, fontweight="bold")
    scores = ", ".join(dict.fromkeys(each.score for each in found))
    figure.supxlabel(f"score ({scores})", color=theme.ink, fontsize=10)
    figure.supylabel("regions", color=theme.ink, fontsize=10)
    return figure


def budget_figure(curves: Sequence[BudgetCurve], theme: Theme = LIGHT) -> "Figure":
    """Share of the score mass that any budget could capture, with the actual one and its multiples marked.

    Args:
        curves: as from :func:`~launcher.selection_stats.budget_curves`, possibly none.
        theme: colours.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    figure = new_figure(WIDTH_INCHES, 3.7 * max(len(curves), 1), theme)
    all_axes = figure.subplots(max(len(curves), 1), 1, squeeze=False)[:, 0]
    if not curves:
        style(all_axes[0], theme)
        all_axes[0].set_xticks([])
        say_empty(all_axes[0], "no score above zero", theme)
        return figure
    for axes, curve in zip(all_axes, curves, strict=True):
        style(axes, theme)
        axes.grid(True, color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        spent, captured = curve.spent[1:].tolist(), curve.captured[1:].tolist()
        axes.plot(spent, captured, color=theme.primary, linewidth=2.0, label="highest scores first")
        axes.plot(
            spent, [each / curve.num_entries for each in spent], color=theme.muted, linewidth=1.2, linestyle="--",
            label="regions at random",
        )  # fmt: skip
        for factor in BUDGET_FACTORS:
            at = factor * curve.actual_spent
            if factor != 1.0 and 0 < at <= curve.num_entries:
                share = curve.at(at)
                axes.plot([at], [share], marker="o", markersize=5, color=theme.primary)
                axes.annotate(
                    f"{factor:g}x\n{format_percent(share)}", (at, share), xytext=(-8, 6), textcoords="offset points",
                    ha="center", fontsize=8, color=theme.ink,
                )  # fmt: skip
        if curve.actual_spent > 0:
            axes.axvline(curve.actual_spent, color=theme.secondary, linewidth=1.0, alpha=0.7)
            axes.plot(
                [curve.actual_spent], [curve.actual_captured], marker="D", markersize=7, color=theme.secondary,
                linestyle="none", label=f"this selection: {format_percent(curve.actual_captured)}",
            )  # fmt: skip
        axes.set_xscale("log")
        low = min(curve.actual_spent / 20, curve.num_entries / 200) if curve.actual_spent > 0 else spent[0]
        axes.set_xlim(max(spent[0], low), curve.num_entries * 1.05)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(length=0, which="minor")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(f"parameters in {PLURALS[curve.kind]}")
        axes.set_ylabel("score mass captured")
        title(axes, f"What a budget captures: {PLURALS[curve.kind]} by {curve.score}", theme)
        legend = axes.legend(loc="upper left", fontsize=9, facecolor=theme.background, edgecolor=theme.grid)
        for text in legend.get_texts():
            text.set_color(theme.ink)
    return figure
