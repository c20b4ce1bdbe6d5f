"""How do the results of the benchmarks look? Matplotlib figures in the colours of the training's own plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, style, title, to_png
from scripts.benchmarks.ratios import Ratio, noise
from sparse_zero.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's; ours are blue everywhere.
_COLOURS = {
    "floor": "#8a8f98",
    "full": "#d55e00",
    "PEFT": "#e69f00",
    "published ways, plain torch": "#cc79a7",
    "ours": "#0072b2",
}
_KINDS = {"blocks": "#0072b2", "rows": "#009e73", "columns": "#56b4e9"}
# A bar beyond it is cut, with its number beside it: the rest could not be told apart.
_LARGEST = 1.35


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all."""
    atomic_write_bytes(path, to_png(figure))


def draw_bars(
    ratios: Mapping[str, Ratio],
    *,
    groups: Mapping[str, Sequence[str]],
    heading: str,
    floor: str,
    theme: Theme = LIGHT,
) -> Figure:
    """A bar per method from the floor to its median ratio, with its quartiles.

    Args:
        ratios: to the floor, by method; with ``floor2``, the band of what noise can do is shaded.
        groups: which methods have one colour.
        heading: above the axes.
        floor: name of what is 1.
        theme: its colours.
    """
    figure = new_figure(WIDTH_INCHES, 1.8 + 0.26 * len(ratios), theme)
    axes = figure.subplots()
    _ratio_axis(axes, heading, theme)
    axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
    largest = max(_LARGEST, 1.02 * min(ratio.median for ratio in ratios.values()))
    for place, (method, ratio) in enumerate(ratios.items()):
        group = next((name for name, members in groups.items() if method in members), "floor")
        end = min(ratio.median, largest)
        axes.barh(place, end - 1.0, left=1.0, color=_COLOURS[group], height=0.7)
        if ratio.median <= largest:
            spread = [[ratio.median - ratio.lower_quartile], [ratio.upper_quartile - ratio.median]]
            axes.errorbar(ratio.median, place, xerr=spread, color=theme.ink, capsize=2.5, linewidth=1)
        shown = max(end, min(ratio.upper_quartile, largest))
        axes.annotate(
            f"{ratio.median:.3f}" + (" (cut)" if ratio.median > largest else ""),
            (shown, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.ink,
        )
    if "floor2" in ratios:
        band = noise(ratios["floor2"])
        axes.axvspan(1 - band, 1 + band, color=theme.grid, zorder=0, label="noise (floor against itself)")
    axes.axvline(1.0, color=theme.ink, linewidth=1)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    lowest = min(0.97, *(ratio.lower_quartile for ratio in ratios.values()))
    axes.set_xlim(lowest - 0.01, largest + 0.08)
    axes.set_xlabel(f"time over that of {floor}: median of paired rounds, quartiles")
    _legend(figure, axes, [name for name, members in groups.items() if any(m in ratios for m in members)], theme)
    return figure


def _legend(figure: Figure, axes: Axes, names: Sequence[str], theme: Theme) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS[name], label=name) for name in names]
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(
        handles=[*patches, *handles],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
    )


def draw_budget(points: Sequence[Mapping[str, float | str]], heading: str, *, theme: Theme = LIGHT) -> Figure:
    """Measured steps over the floor's against the trained share, and what the products of the values predict.

    Args:
        points: with kind, share (of all parameters), measured, lower_quartile, upper_quartile and predicted.
        heading: above the axes.
        theme: its colours.
    """
    figure = new_figure(WIDTH_INCHES, 4.2, theme)
    axes = figure.subplots()
    _ratio_axis(axes, heading, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    for kind, colour in _KINDS.items():
        own = [point for point in points if point["kind"] == kind]
        if not own:
            continue
        x = [100 * float(point["share"]) for point in own]
        y = [float(point["measured"]) for point in own]
        spread = [
            [float(point["measured"]) - float(point["lower_quartile"]) for point in own],
            [float(point["upper_quartile"]) - float(point["measured"]) for point in own],
        ]
        axes.errorbar(x, y, yerr=spread, color=colour, marker="o", markersize=4, capsize=2.5, label=kind)
    # The same for all kinds.
    predicted = sorted((100 * float(point["share"]), float(point["predicted"])) for point in points)
    axes.plot(*zip(*predicted, strict=True), color=theme.muted, linestyle="--", label="predicted from the products")
    axes.axhline(1.0, color=theme.ink, linewidth=1)
    axes.set_xscale("log")
    shares = sorted({100 * float(point["nominal"]) for point in points})
    axes.set_xticks(shares, [f"{share:g}%" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("trained share of all parameters")
    axes.set_ylabel("step over the floor's")
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink)
    return figure


def _ratio_axis(axes: Axes, heading: str, theme: Theme) -> None:
    style(axes, theme)
    axes.set_axisbelow(True)
    title(axes, heading, theme)
