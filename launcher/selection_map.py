"""Where in the model is trained? A map of modules by layers, as a matplotlib figure."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.plots import LIGHT, WIDTH_INCHES, Theme, new_figure, say_empty, style, theme_colours, title
from launcher.summary import format_count
from sparse_zero.selection.config import KINDS, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Weight name -> region kind -> parameters trained.
Counts = Mapping[str, Mapping[Kind, int]]

# Cells are labelled with their numbers up to so many layers: beyond, the text does not fit.
_MAX_LABELLED_LAYERS = 12
# Region kinds in text.
PLURALS: Mapping[Kind, str] = {"block": "blocks", "row": "rows", "column": "columns", "whole": "whole vectors"}
_MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def locate_weight(name: str) -> tuple[str, int | None]:
    """Module and layer of a weight: ``model.layers.3.self_attn.q_proj.weight`` gives ``self_attn.q_proj``, 3.

    The first number in the name is the layer; later ones (experts) are folded into ``*``, and the number of a
    matrix in a stack (``gate_up_proj[3]``) is left out. A weight outside the layers keeps its full module name
    and has layer None.
    """
    parts = re.sub(r"\[\d+\]$", "", name).removesuffix(".weight").split(".")
    index = next((i for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)), None)
    if index is None:
        return ".".join(parts), None
    inside = ["*" if re.fullmatch(r"\d+", part) else part for part in parts[index + 1 :]]
    return ".".join(inside) or parts[index - 1], int(parts[index])


def module_order(module: str) -> tuple[int, str]:
    """Sorts the modules of a layer: Llama's in the order of the computation, then the others by name."""
    last = module.rsplit(".", 1)[-1]
    return (_MODULE_ORDER.index(last) if last in _MODULE_ORDER else len(_MODULE_ORDER)), module


def short_names(modules: Sequence[str]) -> list[str]:
    """The last part of each module name where that is unambiguous, else the whole name."""
    last = [module.rsplit(".", 1)[-1] for module in modules]
    return [name if last.count(name) == 1 else module for name, module in zip(last, modules, strict=True)]


@dataclass(frozen=True, kw_only=True)
class LayerGrid:
    """A number for every module type and layer."""

    # Name within a layer, or the full name of what lies outside the layers.
    modules: tuple[str, ...]
    num_layers: int
    # Whether one more column, after the layers, holds what lies outside them.
    has_outside: bool
    # [module][layer, then outside]; None where there is nothing to tell.
    cells: tuple[tuple[float | None, ...], ...]


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

    inside = {module for module, layer in places.values() if layer is not None}
    modules = tuple(
        sorted({module for module, _ in places.values()}, key=lambda name: (name not in inside, module_order(name)))
    )
    present = {kind for kinds in counts.values() for kind, count in kinds.items() if count}
    kinds = tuple(kind for kind in KINDS if kind in present)
    table = {kind: [[0] * (width + has_outside) for _ in modules] for kind in kinds}
    for name, (module, layer) in places.items():
        for kind, count in counts[name].items():
            if count:
                table[kind][modules.index(module)][width if layer is None else layer] += count
    return SelectionGrid(kinds=kinds, modules=modules, num_layers=width, has_outside=has_outside, counts=table)


def short_count(value: float) -> str:
    """A count without the zeros that say nothing on an axis: ``20k``, ``1.5M``."""
    text = format_count(value)
    return re.sub(r"\.?0+(?=[kMBT]$)", "", text) if "." in text else text


def draw_layers(
    axes: "Axes",
    cells: Sequence[Sequence[float | None]],
    modules: Sequence[str],
    num_layers: int,
    heading: str,
    theme: Theme,
    write: Callable[[float], str],
) -> None:
    """Modules by layers, a cell for each, coloured from zero to the largest number; empty cells for None and 0.

    Args:
        axes: where.
        cells: [module][layer, then what lies outside the layers, if a row is longer than ``num_layers``].
        modules: names of the rows.
        num_layers: layers of the model.
        heading: what the numbers are.
        theme: colours.
        write: a number as text, for few layers in its cell.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    has_outside = len(cells[0]) > num_layers
    colours = theme_colours(theme)
    largest = max((number or 0 for row in cells for number in row), default=0) or 1
    shown = [[float(number) if number else math.nan for number in row] for row in cells]
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
    axes.set_yticks([row + 0.5 for row in range(len(cells))], short_names(modules))
    every = next(gap for gap in (1, 2, 5, 10, 20, 50, 100, 1000) if num_layers <= 20 * gap)
    columns = list(range(0, num_layers, every))
    labels = [str(column) for column in columns]
    if has_outside:
        # The last label makes room, so that the two do not run into each other.
        while columns and num_layers - columns[-1] < 0.08 * (num_layers + 1):
            columns.pop(), labels.pop()
        columns.append(num_layers)
        labels.append("none")
    axes.set_xticks([column + 0.5 for column in columns], labels)
    title(axes, heading, theme)
    if len(cells[0]) <= _MAX_LABELLED_LAYERS:
        for row, numbers in enumerate(cells):
            for column, number in enumerate(numbers):
                if number:
                    red, green, blue, _ = colours(norm(number))
                    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                    axes.text(
                        column + 0.5, row + 0.5, write(number), ha="center", va="center", fontsize=8,
                        color="#101418" if is_light else "#ffffff",
                    )  # fmt: skip
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=12, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _panels(num_modules: Sequence[int], theme: Theme) -> "tuple[Figure, list[Axes]]":
    """A figure with axes for maps of so many modules, one above the other, their rows equally high."""
    heights = [0.24 * number + 0.75 for number in num_modules]
    figure = new_figure(WIDTH_INCHES, sum(heights) + 0.35, theme)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def selection_figure(counts: Counts, num_layers: int | None = None, theme: Theme = LIGHT) -> "Figure":
    """Modules by layers, coloured by the parameters trained in each weight.

    With several kinds, a panel of the totals comes first and one panel per kind follows, with the modules
    that have such regions. Each panel has its own colour scale, from zero to its largest weight: a row counts
    a hundredth of a block, and would vanish on the blocks' scale.

    Args:
        counts: weight name to kind to parameters trained; at least one weight.
        num_layers: layers of the model; None ends the map at the last layer with a trained weight.
        theme: colours.
    """
    grid = selection_grid(counts, num_layers)
    panels: list[tuple[str, Sequence[str], list[list[int]]]] = []
    if len(grid.kinds) > 1:
        panels.append(("all kinds", grid.modules, grid.totals))
    for kind in grid.kinds:
        rows = [row for row, cells in enumerate(grid.counts[kind]) if any(cells)]
        cells = [list(grid.counts[kind][row]) for row in rows]
        panels.append((PLURALS[kind], [grid.modules[row] for row in rows], cells))
    figure, all_axes = _panels([len(modules) for _, modules, _ in panels] or [1], theme)
    if not panels:
        style(all_axes[0], theme)
        all_axes[0].set_xticks([])
        say_empty(all_axes[0], "nothing selected", theme)
        return figure
    for axes, (name, modules, cells) in zip(all_axes, panels, strict=True):
        heading = f"Parameters trained: {name} ({format_count(sum(map(sum, cells)))})"
        draw_layers(axes, cells, modules, grid.num_layers, heading, theme, short_count)
    all_axes[-1].set_xlabel("layer")
    return figure


def shares_figure(grids: Sequence[tuple[str, LayerGrid]], theme: Theme = LIGHT) -> "Figure":
    """Modules by layers, coloured by a share: a panel for each heading and grid; at least one.

    Panels with the same modules and layers look alike; each has its own colour scale.
    """
    figure, all_axes = _panels([len(grid.modules) for _, grid in grids], theme)
    for axes, (heading, grid) in zip(all_axes, grids, strict=True):
        if grid.modules:
            draw_layers(axes, grid.cells, grid.modules, grid.num_layers, heading, theme, _percent)
        else:
            style(axes, theme)
            axes.set_xticks([])
            title(axes, heading, theme)
            say_empty(axes, "nothing to show", theme)
    all_axes[-1].set_xlabel("layer")
    return figure


def _percent(share: float) -> str:
    """A share in at most four characters: ``0%``, ``.25%``, ``.5%``, ``4.2%``, ``31%``."""
    percent = 100 * share
    if percent == 0 or percent >= 9.95:
        return f"{percent:.0f}%"
    text = f"{percent:.1f}" if percent >= 0.995 else f"{percent:.2f}".removeprefix("0")
    return text.rstrip("0").rstrip(".") + "%"
