"""How do the results of a study look? Pure functions from its JSON to matplotlib figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, style, theme_colours, title
from scripts.accuracy.study_results import share_of_row
from scripts.accuracy.study_tables import Results, budget_text, rows_of_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without their yellow, and two that stay apart from them.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#9a6324")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Most panels of learning rates beside each other.
_MAX_COLUMNS = 3
# Characters of titles that stand beside each other over the whole width.
_TITLE_WIDTH = 8 * WIDTH_INCHES
# Most layers whose shares are written into the cells of a picture.
_MAX_CELLS = 16
_BAR: dict[str, Any] = {"elinewidth": 1.2, "capsize": 3, "markersize": 5.5, "linewidth": 1.8}

Drawing = Callable[[Theme], "Figure"]


def scale_of(metric: str) -> float:
    """Accuracies are drawn in percent."""
    return 100.0 if metric == "accuracy" else 1.0


def _name(metric: str) -> str:
    return "accuracy, %" if metric == "accuracy" else "loss per token"


def _looks(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the same in every picture of a study."""
    names = dict.fromkeys(row["method"] for row in rows)
    return {name: (_COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]) for at, name in enumerate(names)}


def _axes(axes: Axes, theme: Theme) -> None:
    style(axes, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def _title_above(figure: Figure, text: str, theme: Theme) -> None:
    """Over the whole width: long labels may leave the axes less than a title needs."""
    figure.suptitle(text, x=0.02, ha="left", color=theme.ink, fontsize=11, fontweight="bold")


def _legend(figure: Figure, axes: Sequence[Axes], theme: Theme, columns: int = 3) -> None:
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        legend = figure.legend(
            list(found.values()), list(found), loc="outside lower left", ncols=columns, fontsize=9, frameon=False
        )
        for text in legend.get_texts():
            text.set_color(theme.ink)


def log_ticks(axes: Axes, values: Sequence[float], label: Callable[[float], str], *, room: float = 0.06) -> None:
    """A logarithmic axis with a label at each of these values, but where it has no room.

    Args:
        axes: to be labelled.
        values: in any order.
        label: text of one.
        room: share of the axis that a label needs.
    """
    from matplotlib.ticker import NullFormatter, NullLocator

    ordered = sorted(set(values))
    apart = (ordered[-1] / ordered[0]) ** room if ordered else 1.0
    kept: list[float] = []
    for value in ordered:
        if not kept or value / kept[-1] >= apart:
            kept.append(value)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(kept, [label(value) for value in kept])


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that have a score."""
    return [row for row in rows if row["score"] is not None]


def _is_far(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether values reach so far from all others that these would have two fifths of the axis or less."""
    if len(others) < 3:
        return False
    whole = max(*values, *others) - min(*values, *others)
    return max(others) - min(others) < 0.4 * whole


def _near(values: Sequence[float], best: Sequence[float], *, less_is_better: bool) -> tuple[float, float]:
    """The range of the best values and of all others that are not far worse: by three times what half of them span."""
    if len(values) < 4:
        return min(values, default=0.0), max(values, default=0.0)
    first, _, third = quantiles(values, n=4)
    reach = 3 * (third - first)
    kept = [value for value in values if (value <= third + reach if less_is_better else value >= first - reach)]
    return min(*kept, *best), max(*kept, *best)


def share_figure(results: Results, task: str, theme: Theme = LIGHT) -> Figure:
    """The result against the trained share, a line for each method with budgets; the others as bands."""
    metric = results["tasks"][task]["metric"]
    scale, rows = scale_of(metric), measured(rows_of_task(results, task))
    looks = _looks(results["rows"])
    figure = new_figure(WIDTH_INCHES, 4.9, theme)
    axes = figure.subplots()
    _axes(axes, theme)
    ticks: list[float] = []
    drawn = [scale * row["score"]["mean"] for row in rows if share_of_row(row)]
    for method, (colour, marker) in looks.items():
        own = [row for row in rows if row["method"] == method]
        shares = [share_of_row(row) or 0.0 for row in own]
        if any(row["budget"] is not None for row in own) or (own and 0 < shares[0] < 1):
            ordered = sorted(zip(shares, own, strict=True), key=lambda pair: pair[0])
            means = [scale * row["score"]["mean"] for _, row in ordered]
            deviations = [scale * (row["score"]["deviation"] or 0.0) for _, row in ordered]
            axes.errorbar(
                [100 * share for share, _ in ordered], means, yerr=deviations, color=colour, marker=marker,
                label=own[0]["label"], **_BAR,
            )  # fmt: skip
            ticks += [100 * row["budget"] if row["budget"] else 100 * share for share, row in ordered]
            continue
        for row in own:
            mean, deviation = scale * row["score"]["mean"], scale * (row["score"]["deviation"] or 0.0)
            if _is_far([mean], drawn):
                # It would press the others together: it is told, and not drawn.
                axes.plot([], [], " ", label=f"{row['label']}: {mean:.2f}")
                continue
            axes.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(mean, color=colour, linestyle=(0, (5, 2)), linewidth=1.4, label=row["label"])
    if ticks:
        log_ticks(axes, ticks, lambda value: f"{value:.3g}")
    axes.set_xlabel("trained share of the parameters, %")
    axes.set_ylabel(_name(metric))
    title(axes, f"{results['tasks'][task]['label']}: mean ± standard deviation over seeds", theme)
    _legend(figure, [axes], theme)
    return figure


def methods_figure(results: Results, task: str, theme: Theme = LIGHT) -> Figure:
    """The result of each line of the table, with the single seeds; for methods that are no lines over budgets."""
    metric = results["tasks"][task]["metric"]
    scale, rows = scale_of(metric), measured(rows_of_task(results, task))
    figure = new_figure(WIDTH_INCHES, 1.3 + 0.34 * len(rows), theme)
    axes = figure.subplots()
    _axes(axes, theme)
    axes.grid(False, axis="y")
    labels = []
    seeds = [[scale * value for value in row["scores"].values() if value is not None] for row in rows]
    for at, (row, values) in enumerate(zip(reversed(rows), reversed(seeds), strict=True)):
        mean, deviation = scale * row["score"]["mean"], scale * (row["score"]["deviation"] or 0.0)
        is_full = row["method"] == results["protocol"]["full"]
        # What was trained, which is not always the budget.
        share = share_of_row(row)
        labels.append(row["label"] + (f"  {100 * share:.3g} %" if share else ""))
        others = [value for each in seeds if each is not values for value in each]
        if _is_far([mean, *values], others):
            # It would press the others together: it is told, at the side where it lies.
            is_right = mean > max(others)
            told = f"{mean:.4g} ± {deviation:.2g}" if deviation else f"{mean:.4g}"
            axes.text(
                0.99 if is_right else 0.01, at, f"{told} →" if is_right else f"← {told}", va="center", fontsize=9,
                ha="right" if is_right else "left", color=theme.muted, transform=axes.get_yaxis_transform(),
            )  # fmt: skip
            continue
        if is_full:
            axes.axvspan(mean - deviation, mean + deviation, color=theme.secondary, alpha=0.12, linewidth=0)
        axes.plot(values, [at] * len(values), "o", color=theme.muted, markersize=3.5, alpha=0.7)
        axes.errorbar(
            [mean], [at], xerr=[deviation], color=theme.secondary if is_full else theme.primary, marker="o", **_BAR
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlabel(_name(metric))
    _title_above(figure, f"{results['tasks'][task]['label']}: mean ± standard deviation, and each seed", theme)
    return figure


def rates_figure(results: Results, task: str, theme: Theme = LIGHT) -> Figure:
    """What each candidate reached on the development data, a panel for each method, a line for each budget."""
    info = results["tasks"][task]
    by_loss = info["metric"] == "loss" or results["protocol"]["tuning_metric"] == "loss"
    name, scale = ("loss", 1.0) if by_loss else ("accuracy", 100.0)
    rows = [row for row in rows_of_task(results, task) if row["tried"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    num_columns = min(len(methods), _MAX_COLUMNS)
    num_rows = -(-len(methods) // num_columns)
    labels = {row["method"]: textwrap.fill(row["label"], int(_TITLE_WIDTH / num_columns)) for row in rows}
    num_lines = max(label.count("\n") for label in labels.values())
    figure = new_figure(WIDTH_INCHES, 0.7 + (2.3 + 0.15 * num_lines) * num_rows, theme)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    reached = [(row, each) for row in rows for each in row["tried"] if each[name] is not None]
    best = [scale * each[name] for row, each in reached if each["rate"] == row["rate"]]
    low, high = _near([scale * each[name] for _, each in reached], best, less_is_better=by_loss)
    margin = 0.05 * (high - low) or 0.5
    for at, method in enumerate(methods):
        axes = grid[at // num_columns][at % num_columns]
        _axes(axes, theme)
        own = [row for row in rows if row["method"] == method]
        rates = sorted({each["rate"] for row in own for each in row["tried"]})
        for row in own:
            colour = theme.ink if row["budget"] is None else _COLOURS[budgets.index(row["budget"]) % len(_COLOURS)]
            known = [(each["rate"], scale * each[name]) for each in row["tried"] if each[name] is not None]
            label = None if row["budget"] is None else f"{100 * row['budget']:g} %"
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
            ring = [point for point in known if point[0] == row["rate"]]
            axes.plot(*zip(*ring, strict=True), "o", color=colour, markersize=8, fillstyle="none")
            for rate, value in known:
                if not low <= value <= high:
                    # The line leaves the panel there.
                    place, side = ((0.0, 3.0), "bottom") if value < low else ((1.0, -3.0), "top")
                    axes.annotate(
                        f"{value:.3g}", (rate, place[0]), xycoords=axes.get_xaxis_transform(), xytext=(-4, place[1]),
                        textcoords="offset points", ha="right", va=side, fontsize=8, color=theme.muted,
                    )  # fmt: skip
        axes.set_ylim(low - margin, high + margin)
        log_ticks(axes, rates, lambda value: f"{value:.2g}", room=0.27)
        title(axes, labels[method], theme)
        if at % num_columns == 0:
            axes.set_ylabel("development " + ("loss" if by_loss else "accuracy, %"))
        if at // num_columns == num_rows - 1 or at + num_columns >= len(methods):
            axes.set_xlabel("learning rate")
    for at in range(len(methods), num_rows * num_columns):
        grid[at // num_columns][at % num_columns].set_visible(False)
    _legend(figure, [each for row in grid for each in row], theme, columns=6)
    return figure


def layers_figure(results: Results, task: str, theme: Theme = LIGHT) -> Figure:
    """The share of the values that lies in each layer, a line for each method that chooses regions."""
    rows = [row for row in rows_of_task(results, task) if row.get("places")]
    num_layers = max(len(row["places"]["layers"]) for row in rows)
    shares = [row["places"]["layers"] + [0.0] * (num_layers - len(row["places"]["layers"])) for row in rows]
    figure = new_figure(WIDTH_INCHES, 1.5 + 0.34 * len(rows), theme)
    axes = figure.subplots()
    style(axes, theme)
    # Cells without values are empty.
    percent = [[100 * share if share else math.nan for share in line] for line in shares]
    colours = theme_colours(theme).with_extremes(bad=theme.empty)
    highest = max(100 * share for line in shares for share in line)
    image = axes.imshow(percent, cmap=colours, vmin=0, vmax=highest, aspect="auto")
    if num_layers <= _MAX_CELLS:
        for at, line in enumerate(shares):
            for layer, share in enumerate(line):
                if share >= 0.005:
                    ink = theme.background if 100 * share > 0.55 * highest else theme.ink
                    axes.text(layer, at, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_xticks(range(num_layers))
    axes.set_yticks(range(len(rows)), [row["label"] + budget_text(row) for row in rows])
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=9)
    _title_above(figure, f"{results['tasks'][task]['label']}: trained values by layer, %", theme)
    return figure


def forgetting_figure(results: Results, task: str, theme: Theme = LIGHT) -> Figure:
    """What was added to the loss on other text against what was learned; the further left, the less was forgotten."""
    metric = results["tasks"][task]["metric"]
    scale, looks = scale_of(metric), _looks(results["rows"])
    rows = [row for row in measured(rows_of_task(results, task)) if row["forgetting_after"] is not None]
    figure = new_figure(WIDTH_INCHES, 4.7, theme)
    axes = figure.subplots()
    _axes(axes, theme)
    for method, (colour, marker) in looks.items():
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        axes.errorbar(
            [row["forgetting_after"]["mean"] - row["forgetting_before"]["mean"] for row in own],
            [scale * row["score"]["mean"] for row in own],
            xerr=[row["forgetting_after"]["deviation"] or 0.0 for row in own],
            yerr=[scale * (row["score"]["deviation"] or 0.0) for row in own],
            color=colour, marker=marker, label=own[0]["label"], **{**_BAR, "linewidth": 0.8},
        )  # fmt: skip
    axes.set_xlabel("added to the loss per token on other text")
    axes.set_ylabel(_name(metric))
    title(axes, f"{results['tasks'][task]['label']}: learned and forgotten", theme)
    _legend(figure, [axes], theme)
    return figure


def drawings(results: Results) -> dict[str, tuple[str, Drawing]]:
    """Every picture that the results have numbers for: what it shows and how it is drawn, by the name of its file."""
    found: dict[str, tuple[str, Drawing]] = {}
    for task, info in results["tasks"].items():
        rows = measured(rows_of_task(results, task))
        suffix = "" if len(results["tasks"]) == 1 else f"-{task}"
        label = info["label"]

        def drawing(draw: Callable[..., Figure], task: str = task) -> Drawing:
            return lambda theme: draw(results, task, theme)

        if len({row["budget"] for row in rows} - {None}) > 1:
            found[f"share{suffix}"] = f"{label}: {info['metric']} against the trained share", drawing(share_figure)
        elif rows:
            found[f"methods{suffix}"] = f"{label}: {info['metric']} of each method", drawing(methods_figure)
        if any(row["tried"] for row in rows):
            found[f"rates{suffix}"] = (
                f"{label}: development data by learning rate; ringed: chosen",
                drawing(rates_figure),
            )
        if any(row.get("places") for row in rows):
            found[f"layers{suffix}"] = f"{label}: where the trained values lie", drawing(layers_figure)
        if any(row["forgetting_after"] is not None for row in rows):
            found[f"forgetting{suffix}"] = f"{label}: forgetting against {info['metric']}", drawing(forgetting_figure)
    return found
