"""How does training look, step by step? Pure functions from rows of metrics to matplotlib figures.

Figures are built on the Agg canvas without pyplot and without changing matplotlib's settings, so that
they work without a display and beside a user's own plots. Colours are those of Okabe and Ito (2008),
which remain apart in the common forms of colour blindness.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from sparse_zero.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one appearance."""

    background: str
    ink: str
    muted: str
    grid: str
    primary: str
    secondary: str
    warning: str
    # Outline on a cell of any colour of the map.
    mark: str
    # Name of a perceptually ordered colour map whose low end is near the background, and the shares of
    # it that are used: the low end must still be told from an empty cell.
    colour_map: str
    colour_range: tuple[float, float]
    empty: str


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#59636e",
    grid="#e4e8ec",
    primary="#0072b2",
    secondary="#d55e00",
    warning="#b0357f",
    mark="#e0301e",
    colour_map="YlGnBu",
    colour_range=(0.22, 1.0),
    empty="#f3f4f6",
)
DARK = Theme(
    background="#161b22",
    ink="#e6edf3",
    muted="#9aa5b1",
    grid="#2b323b",
    primary="#56b4e9",
    secondary="#e69f00",
    warning="#e58ac1",
    mark="#ff4b6e",
    colour_map="viridis",
    colour_range=(0.18, 1.0),
    empty="#20262e",
)

WIDTH_INCHES = 8.0
_PNG_DOTS_PER_INCH = 144
# From so many points on, the single steps step back behind their running mean.
_MIN_POINTS_FOR_MEAN = 20
# Largest over smallest value from which on a logarithmic axis shows more than a linear one.
_MIN_RATIO_FOR_LOG = 30.0


def new_figure(width: float, height: float, theme: Theme) -> "Figure":
    """An empty figure of ``width`` by ``height`` inches."""
    figure_class = require("matplotlib.figure", extra="plots", purpose="draw the pictures of a run").Figure
    figure: Figure = figure_class(figsize=(width, height), facecolor=theme.background, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12, h_pad=0.12)  # Inches between the outermost text and the picture's edge.
    return figure


def to_png(figure: "Figure") -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    canvas_class = require("matplotlib.backends.backend_agg", extra="plots", purpose="draw").FigureCanvasAgg
    buffer = io.BytesIO()
    canvas_class(figure)
    figure.savefig(buffer, format="png", dpi=_PNG_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def style(axes: "Axes", theme: Theme) -> None:
    """Give the axes the theme's colours, and no frame beyond the two lines with ticks."""
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.muted, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)


def title(axes: "Axes", text: str, theme: Theme) -> None:
    """Write what the axes show above their left end."""
    axes.set_title(text, loc="left", color=theme.ink, fontsize=11, fontweight="bold", pad=10)


def theme_colours(theme: Theme) -> "Colormap":
    """The part of the theme's colour map that differs from an empty cell."""
    matplotlib = require("matplotlib", extra="plots", purpose="draw a map")
    colors = require("matplotlib.colors", extra="plots", purpose="draw a map")
    sampled = matplotlib.colormaps[theme.colour_map]
    low, high = theme.colour_range
    colours: Colormap = colors.LinearSegmentedColormap.from_list(
        "cells", [sampled(low + (high - low) * i / 255) for i in range(256)]
    )
    return colours


def say_empty(axes: "Axes", text: str, theme: Theme) -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=theme.muted, fontsize=10)


def _step_axis(axes: "Axes", steps: Sequence[int], theme: Theme, *, label: bool = True) -> None:
    """Whole steps below, light lines behind, and room for a single step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style(axes, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    if label:
        axes.set_xlabel("optimizer step")
    if not steps:
        axes.set_xticks([])
        return
    first, last = min(steps), max(steps)
    margin = max(0.02 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    if first == last:
        axes.set_xticks([first])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _points(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one field, NaN where none is finite; the last row of a step counts."""
    values: dict[int, float] = {}
    for row in rows:
        value = row.get(name)
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        values[int(row["step"])] = float(value) if known and value is not None else math.nan
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over ``window`` points, fewer at the ends; NaN points are left out, and stay NaN."""
    reach = window // 2
    sums, numbers = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (0.0 if math.isnan(value) else value))
        numbers.append(numbers[-1] + (not math.isnan(value)))
    means = []
    for index, value in enumerate(values):
        first, end = max(0, index - reach), min(len(values), index + reach + 1)
        known = not math.isnan(value)
        means.append((sums[end] - sums[first]) / (numbers[end] - numbers[first]) if known else math.nan)
    return means


def _draw_series(axes: "Axes", rows: Rows, name: str, theme: Theme, *, label: str, mean: bool) -> list[float]:
    """One field over the steps, with its running mean if there are enough points; returns finite values."""
    steps, values = _points(rows, name)
    finite = [value for value in values if not math.isnan(value)]
    if not finite:
        return []
    lone = len(finite) < 3
    if mean and len(finite) >= _MIN_POINTS_FOR_MEAN:
        window = 2 * (max(7, len(values) // 40) // 2) + 1
        axes.plot(steps, values, color=theme.primary, alpha=0.35, linewidth=1.0, label=f"{label}, each step")
        axes.plot(
            steps,
            running_mean(values, window),
            color=theme.primary,
            linewidth=2.0,
            label=f"mean of {window} points",
        )
    else:
        axes.plot(
            steps, values, color=theme.primary, linewidth=1.8, marker="o" if len(finite) < 20 else None,
            markersize=6 if lone else 4, label=label,
        )  # fmt: skip
    return finite


def _scale(axes: "Axes", values: Iterable[float], theme: Theme, *, from_zero: bool = False) -> None:
    """A logarithmic axis for values over several magnitudes, else a linear one with short numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    known = [value for value in values if not math.isnan(value)]
    if not known:
        say_empty(axes, "no finite value recorded", theme)
        return
    if not from_zero and min(known) > 0 and max(known) / min(known) >= _MIN_RATIO_FOR_LOG:
        axes.set_yscale("log")
        decades = math.log10(max(known) / min(known))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    if from_zero:
        axes.set_ylim(0, 1.12 * max(known) or 1.0)
    elif min(known) == max(known):
        reach = 0.1 * abs(known[0]) or 0.1
        axes.set_ylim(known[0] - reach, known[0] + reach)


def _mark_skipped(axes: "Axes", rows: Rows, theme: Theme) -> None:
    """A mark on the lower edge for every step whose update was left out."""
    skipped = sorted({int(row["step"]) for row in rows if row.get("skipped")})
    if skipped:
        axes.plot(
            skipped, [0.035] * len(skipped), transform=axes.get_xaxis_transform(), color=theme.warning,
            linestyle="none", marker="|", markersize=11, markeredgewidth=2.0,
            label=f"skipped, not finite ({len(skipped)})",
        )  # fmt: skip


def _legend(axes: "Axes", theme: Theme) -> None:
    """Name the lines, where the axis label alone leaves it open."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1 or any(label.startswith("skipped") for label in labels):
        legend = axes.legend(
            loc="best",
            fontsize=9,
            frameon=True,
            facecolor=theme.background,
            edgecolor=theme.grid,
            framealpha=0.9,
        )
        for text in legend.get_texts():
            text.set_color(theme.ink)


def loss_figure(train: Rows, validation: Rows = (), theme: Theme = LIGHT) -> "Figure":
    """Training loss of every step, its running mean, and the validation loss.

    Args:
        train: training rows of the metrics; skipped and non-finite steps leave gaps and are marked.
        validation: validation rows, possibly none.
        theme: colours.
    """
    figure = new_figure(WIDTH_INCHES, 4.0, theme)
    axes = figure.subplots()
    shown = _draw_series(axes, train, "loss", theme, label="training", mean=True)
    steps, values = _points(validation, "loss")
    if any(not math.isnan(value) for value in values):
        axes.plot(
            steps,
            values,
            color=theme.secondary,
            linewidth=1.8,
            marker="D",
            markersize=5,
            label="validation",
            zorder=4,
        )
        shown += values
    _step_axis(axes, [int(row["step"]) for row in (*train, *validation)], theme)
    axes.set_ylabel("loss (nats per response token)")
    _scale(axes, shown, theme)
    _mark_skipped(axes, train, theme)
    _legend(axes, theme)
    title(axes, "Loss", theme)
    return figure


def learning_rate_figure(train: Rows, theme: Theme = LIGHT) -> "Figure":
    """The learning rate of every step."""
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(WIDTH_INCHES, 3.0, theme)
    axes = figure.subplots()
    shown = _draw_series(axes, train, "learning_rate", theme, label="learning rate", mean=False)
    _step_axis(axes, [int(row["step"]) for row in train], theme)
    axes.set_ylabel("learning rate")
    _scale(axes, shown, theme, from_zero=True)
    if shown:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    title(axes, "Learning rate", theme)
    return figure


def gradient_norm_figure(train: Rows, theme: Theme = LIGHT) -> "Figure":
    """The gradient norm of every step, before clipping, over all trained values."""
    figure = new_figure(WIDTH_INCHES, 3.2, theme)
    axes = figure.subplots()
    shown = _draw_series(axes, train, "gradient_norm", theme, label="gradient norm", mean=True)
    _step_axis(axes, [int(row["step"]) for row in train], theme)
    axes.set_ylabel("gradient norm (L2)")
    _scale(axes, shown, theme)
    _mark_skipped(axes, train, theme)
    _legend(axes, theme)
    title(axes, "Gradient norm", theme)
    return figure


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def throughput_figure(train: Rows, theme: Theme = LIGHT) -> "Figure":
    """Tokens and operations per second, and peak memory of every step, one above the other."""
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(WIDTH_INCHES, 6.4, theme)
    speed, operations, memory = figure.subplots(3, 1, sharex=True)
    steps = [int(row["step"]) for row in train]
    shown = _draw_series(speed, train, "tokens_per_second", theme, label="tokens per second", mean=True)
    _step_axis(speed, steps, theme, label=False)
    speed.set_ylabel("tokens per second")
    _scale(speed, shown, theme, from_zero=True)
    if shown:
        speed.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e5 else f"{value:g}")
        )
    _legend(speed, theme)
    title(speed, "Speed", theme)

    # Of what the device can do, if that is known; else as such.
    share = any(_is_number(row.get("mfu")) for row in train)
    largest = max((done for row in train if _is_number(done := row.get("flops_per_second"))), default=0.0)
    unit, size = ("%", 0.01) if share else ("TFLOP/s", 1e12) if largest >= 1e12 else ("GFLOP/s", 1e9)
    name = "mfu" if share else "flops_per_second"
    in_units = [
        {"step": step, "done": done / size if _is_number(done := row.get(name)) else None}
        for step, row in zip(steps, train, strict=True)
    ]
    shown = _draw_series(operations, in_units, "done", theme, label=unit, mean=True)
    _step_axis(operations, steps, theme, label=False)
    operations.set_ylabel(unit)
    _scale(operations, shown, theme, from_zero=True)
    title(operations, "Model FLOPs utilization (MFU)" if share else "Operations per second and rank", theme)

    peaks = [row.get("peak_memory_bytes") for row in train]
    largest = max((peak for peak in peaks if _is_number(peak)), default=0)
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    in_units = [
        {"step": step, "peak": peak / size if _is_number(peak) else None}
        for step, peak in zip(steps, peaks, strict=True)
    ]
    shown = _draw_series(memory, in_units, "peak", theme, label="peak memory", mean=False)
    _step_axis(memory, steps, theme)
    memory.set_ylabel(f"peak memory ({unit})")
    _scale(memory, shown, theme, from_zero=True)
    title(memory, "Peak memory, largest of all ranks", theme)
    return figure
