"""How does a number of a sweep depend on a setting? A pure function from means to a matplotlib figure."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, style, title
from launcher.summary import as_number
from launcher.sweep.collecting import Group
from launcher.sweep.sweep_config import SweepConfig
from launcher.sweep.tables import SHOWN, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours (2008) without their yellow, which a white page swallows. The next line has the next of both:
# their numbers have no common divisor, so that all pairs come.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1f2328")
_MARKERS = ("o", "s", "^", "D", "v")
MAX_LINES = len(_COLOURS) * len(_MARKERS)
# Largest over smallest setting from which on a logarithmic axis shows more than a linear one.
_MIN_RATIO_FOR_LOG = 8.0
# Between ticks with labels, of the axis.
_MIN_TICK_GAP = 0.08
# What is drawn unless something else is asked for: the first that was measured.
_PREFERRED = ("accuracy_tuned", "validation_loss_best", "final_loss")


def numeric_key(sweep: SweepConfig) -> str | None:
    """The first key of the grid with several numbers, over which no mean is taken; None: there is none."""
    for key, values in sweep.grid.items():
        numbers = isinstance(values, list) and all(as_number(value) is not None for value in values)
        if numbers and len(values) > 1 and key not in sweep.repeats:
            return key
    return None


def default_metric(groups: Sequence[Group]) -> str | None:
    """What is drawn where nothing is asked for; None: nothing was measured."""
    return next((name for name in _PREFERRED if any(name in each.numbers for each in groups)), None)


def lines_of(groups: Sequence[Group], key: str, metric: str) -> dict[str, list[tuple[float, float, float]]]:
    """Setting, mean and deviation (0 of a single point) along ``key``, for all other settings, by their names."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for each in groups:
        if metric in each.numbers:
            others = {name: value for name, value in each.settings.items() if name != key}
            number = each.numbers[metric]
            point = (float(each.settings[key]), number.mean, number.deviation or 0.0)
            lines.setdefault(describe(others), []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


def sweep_figure(
    lines: Mapping[str, Sequence[tuple[float, float, float]]], key: str, metric: str, theme: Theme = LIGHT
) -> "Figure":
    """One line for each of ``lines``, with its deviations as bars.

    Args:
        lines: see :func:`lines_of`; at most :data:`MAX_LINES`.
        key: the setting along the horizontal axis.
        metric: the number, one of :data:`launcher.sweep.tables.SHOWN`.
        theme: colours.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    shown = SHOWN[metric]
    named = [name for name in lines if name]
    num_columns = 1 if max(map(len, named), default=0) > 34 else 2
    num_rows = -(-len(named) // num_columns)
    figure = new_figure(WIDTH_INCHES, 4.0 + 0.23 * num_rows, theme)
    axes = figure.subplots()
    style(axes, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    looks = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    for (name, points), (colour, marker) in zip(lines.items(), looks, strict=False):
        settings, means, deviations = zip(*points, strict=True)
        options: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
        options |= {"elinewidth": 1.2, "capsize": 3}
        axes.errorbar(
            settings,
            [mean * shown.scale for mean in means],
            yerr=[deviation * shown.scale for deviation in deviations] if any(deviations) else None,
            label=name or None,
            **options,
        )
    values = sorted({point[0] for points in lines.values() for point in points})
    if values and values[0] > 0 and values[-1] / values[0] >= _MIN_RATIO_FOR_LOG:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    places = [math.log(value) for value in values] if axes.get_xscale() == "log" else values
    gaps = [after - before for before, after in itertools.pairwise(places)]
    # Where their labels have room.
    if not gaps or min(gaps) > _MIN_TICK_GAP * (places[-1] - places[0]):
        axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(key)
    axes.set_ylabel(shown.header)
    has_bars = any(point[2] for points in lines.values() for point in points)
    title(axes, f"{shown.header} by {key}" + (", ± standard deviation" if has_bars else ""), theme)
    if named:
        # Below the axes, where no line runs through it.
        legend = figure.legend(loc="outside lower left", ncols=num_columns, fontsize=9, frameon=False)
        for text in legend.get_texts():
            text.set_color(theme.ink)
    return figure
