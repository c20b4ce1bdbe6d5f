"""Where in the model is trained? A map of modules by layers, as a matplotlib figure."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, say_empty, style, title
from launcher.summary import format_count
from sparse_zero.optional import require
from sparse_zero.selection.config import KINDS, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Weight name -> region kind -> parameters trained.
Counts = Mapping[str, Mapping[Kind, int]]

# Cells are labelled with their numbers up to so many layers: beyond, the text does not fit.
_MAX_LABELLED_LAYERS = 12
_MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def locate_weight(name: str) -> tuple[str, int | None]:
    """Module and layer of a weight: ``model.layers.3.self_attn.q_proj.weight`` gives ``self_attn.q_proj``, 3.

    The first number in the name is the layer; later ones (experts) are folded into ``*``. A weight
    outside the layers keeps its full module name and has layer None.
    """
    parts = name.removesuffix(".weight").split(".")
    index = next((i for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)), None)
    if index is None:
        return ".".join(parts), None
    inside = ["*" if re.fullmatch(r"\d+", part) else part for part in parts[index + 1 :]]
    return ".".join(inside) or parts[index - 1], int(parts[index])


@dataclass(frozen=True, kw_only=True)
class SelectionGrid:
    """Parameters trained by kind, module and layer: what the selection map shows."""

    # Kinds that occur, in the order of ownership.
    kinds: tuple[Kind, ...]
    # Module names within a layer; the map's rows from top to bottom.
    modules: tuple[str, ...]
    # Layers of the map, empty ones included.
    num_layers: int
    # Whether some weights lie outside the layers: they get one more cell at the end of their row.
    has_outside: bool
    # Kind -> [module][layer, then outside]: parameters trained.
    counts: Mapping[Kind, Sequence[Sequence[int]]]

    @property
    def totals(self) -> list[list[int]]:
        """[module][layer, then outside]: parameters trained by all kinds together."""
        return [
            [sum(cells) for cells in zip(*(self.counts[kind][row] for kind in self.kinds), strict=True)]
            for row in range(len(self.modules))
        ]


def selection_grid(counts: Counts, num_layers: int | None = None) -> SelectionGrid:
    """Arrange counts per weight as modules by layers.

    Args:
        counts: weight name to kind to parameters trained.
        num_layers: layers of the model; None ends the map at the last layer with a trained weight.
    """
    places = {name: locate_weight(name) for name in counts}
    layers = [layer for _, layer in places.values() if layer is not None]
    width = max([(num_layers or 0) - 1, *layers], default=-1) + 1
    has_outside = any(layer is None for _, layer in places.values())

    def order(module: str) -> tuple[bool, int, str]:
        last = module.rsplit(".", 1)[-1]
        known = _MODULE_ORDER.index(last) if last in _MODULE_ORDER else len(_MODULE_ORDER)
        outside = all(layer is None for place, layer in places.values() if place == module)
        return outside, known, module

    modules = tuple(sorted({module for module, _ in places.values()}, key=order))
    present = {kind for kinds in counts.values() for kind, count in kinds.items() if count}
    kinds = tuple(kind for kind in KINDS if kind in present)
    table = {kind: [[0] * (width + has_outside) for _ in modules] for kind in kinds}
    for name, (module, layer) in places.items():
        for kind, count in counts[name].items():
            if count:
                table[kind][modules.index(module)][width if layer is None else layer] += count
    return SelectionGrid(kinds=kinds, modules=modules, num_layers=width, has_outside=has_outside, counts=table)


def _tick(value: float) -> str:
    """A count without the zeros that say nothing on an axis: ``20k``, ``1.5M``."""
    text = format_count(value)
    return re.sub(r"\.?0+(?=[kMBT]$)", "", text) if "." in text else text


def _short_names(modules: Sequence[str]) -> list[str]:
    """The last part of each module name where that is unambiguous, else the whole name."""
    last = [module.rsplit(".", 1)[-1] for module in modules]
    return [name if last.count(name) == 1 else module for name, module in zip(last, modules, strict=True)]


def _draw_map(
    axes: "Axes",
    cells: Sequence[Sequence[int]],
    grid: SelectionGrid,
    theme: Theme,
    colours: "Colormap",
    heading: str,
) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    largest = max((count for row in cells for count in row), default=0) or 1
    shown = [[math.nan if count == 0 else float(count) for count in row] for row in cells]
    norm = Normalize(0, largest)
    mesh = axes.pcolormesh(
        shown,
        cmap=colours,
        norm=norm,
        edgecolors=theme.background,
        linewidth=0.5 if len(cells[0]) > 40 else 1.2,
    )
    style(axes, theme)
    axes.set_facecolor(theme.empty)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_yticks([row + 0.5 for row in range(len(cells))], _short_names(grid.modules))
    every = next(gap for gap in (1, 2, 5, 10, 20, 50, 100, 1000) if grid.num_layers <= 20 * gap)
    columns = list(range(0, grid.num_layers, every))
    labels = [str(column) for column in columns]
    if grid.has_outside:
        # The last label makes room, so that the two do not run into each other.
        while columns and grid.num_layers - columns[-1] < 0.08 * (grid.num_layers + 1):
            columns.pop(), labels.pop()
        columns.append(grid.num_layers)
        labels.append("none")
    axes.set_xticks([column + 0.5 for column in columns], labels)
    title(axes, heading, theme)
    if len(cells[0]) <= _MAX_LABELLED_LAYERS:
        for row, counts in enumerate(cells):
            for column, count in enumerate(counts):
                if count:
                    red, green, blue, _ = colours(norm(count))
                    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                    axes.text(
                        column + 0.5, row + 0.5, format_count(count), ha="center", va="center", fontsize=8,
                        color="#101418" if is_light else "#ffffff",
                    )  # fmt: skip
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=12, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def selection_figure(counts: Counts, num_layers: int | None = None, theme: Theme = LIGHT) -> "Figure":
    """Modules by layers, coloured by the parameters trained in each weight.

    With several kinds, a panel of the totals comes first and one panel per kind follows. Each panel has
    its own colour scale, from zero to its largest weight: a row counts a hundredth of a block, and would
    vanish on the blocks' scale.

    Args:
        counts: weight name to kind to parameters trained; at least one weight.
        num_layers: layers of the model; None ends the map at the last layer with a trained weight.
        theme: colours.
    """
    matplotlib = require("matplotlib", extra="plots", purpose="draw the selection map")
    colors = require("matplotlib.colors", extra="plots", purpose="draw the selection map")
    grid = selection_grid(counts, num_layers)
    sampled = matplotlib.colormaps[theme.colour_map]
    low, high = theme.colour_range
    colours = colors.LinearSegmentedColormap.from_list(
        "trained", [sampled(low + (high - low) * i / 255) for i in range(256)]
    )
    panels: list[tuple[str, list[list[int]]]] = [("all kinds", grid.totals)]
    panels += [(f"{kind}s", [list(row) for row in grid.counts[kind]]) for kind in grid.kinds]
    if len(grid.kinds) <= 1:
        panels = [(panels[-1][0], panels[-1][1])]
    height = 0.24 * len(grid.modules) + 0.75
    figure = new_figure(WIDTH_INCHES, height * len(panels) + 0.35, theme)
    if not grid.modules:
        axes = figure.subplots()
        style(axes, theme)
        axes.set_xticks([])
        say_empty(axes, "nothing selected", theme)
        return figure
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (name, cells) in zip(all_axes, panels, strict=True):
        total = sum(map(sum, cells))
        _draw_map(axes, cells, grid, theme, colours, f"Parameters trained: {name} ({format_count(total)})")
    all_axes[-1].set_xlabel("layer")
    return figure
