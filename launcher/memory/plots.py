"""How does a run's memory look? Pure functions from forecasts and timelines to matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, style, title
from launcher.summary import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparse_zero.memory.closed_form.forecast import Forecast

# Okabe and Ito's colours, and lighter and darker ones of them: neighbours differ in lightness, too.
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#56b4e9",
    "#d55e00",
    "#cc79a7",
    "#f0e442",
    "#7a5195",
    "#9a6324",
    "#4d9de0",
)
_OTHER = "other"
# Terms with colours of their own; the rest is summed.
_MAX_TERMS = len(_COLOURS)
GIB = 2**30


def _largest_terms(phases: Mapping[str, Mapping[str, int]]) -> list[str]:
    most: dict[str, int] = {}
    for terms in phases.values():
        for name, num_bytes in terms.items():
            most[name] = max(most.get(name, 0), num_bytes)
    return sorted(most, key=lambda name: -most[name])


def phases_figure(
    phases: Mapping[str, Mapping[str, int]],
    *,
    heading: str,
    simulated: Mapping[str, int] | None = None,
    usable_bytes: int | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Stacked bars of what a rank holds at the peak of each phase.

    Args:
        phases: bytes by the terms' names for each phase, in the order of a run.
        heading: what is planned.
        simulated: bytes of the peaks by the simulation, drawn as marks.
        usable_bytes: of a GPU, drawn as a line.
        theme: colours.
    """
    names = list(phases)
    largest = _largest_terms(phases)
    # What takes so little that its bar would be a hair goes to the others.
    most = max((sum(terms.values()) for terms in phases.values()), default=0)
    own = [
        name for name in largest if max(terms.get(name, 0) for terms in phases.values()) >= 0.005 * most
    ][: _MAX_TERMS]  # fmt: skip
    figure = new_figure(WIDTH_INCHES, 0.62 * len(names) + 1.5 + 0.24 * ((len(own) + 2) // 2), theme)
    axes = figure.subplots()
    style(axes, theme)
    axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    places = range(len(names))
    starts = [0.0] * len(names)
    for name, colour in [*zip(own, _COLOURS, strict=False), (_OTHER, theme.muted)]:
        widths = [
            (sum(num for term, num in terms.items() if term not in own) if name == _OTHER else terms.get(name, 0)) / GIB
            for terms in phases.values()
        ]
        if any(widths):
            axes.barh(
                places, widths, left=starts, height=0.66, color=colour, label=name, edgecolor=theme.background,
                linewidth=0.6,
            )  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    reach = max([*starts, *(value / GIB for value in (simulated or {}).values()), 1e-9])
    for place, end in zip(places, starts, strict=True):
        axes.text(end + 0.01 * reach, place, format_bytes(round(end * GIB)), va="center", color=theme.ink, fontsize=9)
    if simulated:
        known = [(place, simulated[name] / GIB) for place, name in enumerate(names) if name in simulated]
        axes.plot(
            [value for _, value in known], [place for place, _ in known], linestyle="none", marker="|", markersize=22,
            markeredgewidth=2.2, color=theme.ink, label="simulated",
        )  # fmt: skip
    if usable_bytes is not None:
        axes.axvline(usable_bytes / GIB, color=theme.warning, linewidth=1.6, linestyle="--", label="usable on a GPU")
        reach = max(reach, min(usable_bytes / GIB, 1.6 * reach))
    axes.set_xlim(0, 1.16 * reach)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of one rank")
    title(axes, heading, theme)
    legend: Any = figure.legend(
        loc="outside lower center", ncols=2, fontsize=8.5, frameon=False, labelcolor=theme.ink
    )  # fmt: skip
    legend.set_zorder(5)
    return figure


def terms_by_phase(forecast: Forecast) -> dict[str, dict[str, int]]:
    """The terms on the device at the peak of each phase of a forecast, as :func:`phases_figure` takes them."""
    return {phase: forecast.peak(phase).by_name("device") for phase in forecast.phases()}
