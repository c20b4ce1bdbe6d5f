"""How is a selection shown in a terminal of 80 columns: tables, maps of layers, histograms?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.selection_map import PLURALS, LayerGrid, short_names
from launcher.selection_overlap import Overlap, jaccard_grid
from launcher.selection_stats import (
    By,
    Histogram,
    budget_curves,
    count_regions,
    histograms,
    kinds_and_scores,
    mass_shares,
    trained_shares,
)
from launcher.selection_tables import Sheet, budget_sheet, counts_sheet, facts, overlap_sheet
from launcher.summary import TABLE_WIDTH, format_percent
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.selection import Selection

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Viridis without its darkest part, from low to high: seen on black and on white, told apart in colour blindness.
_COLOURS = ("#433e85", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
_SHADES, _ASCII_SHADES = "░▒▓█", ".:*#"
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
# Columns of a histogram; with names it fits the table's width.
HISTOGRAM_BINS = 48
_MIN_NAME_WIDTH = 14
# Columns of a table of weights where no terminal says how wide it is: no weight's name is folded.
_FILE_WIDTH = 160


def new_console() -> "Console":
    """Standard output; as wide as a table of weights where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def print_sheet(console: "Console", sheet: Sheet, *, wide: bool = False) -> None:
    """Print a table, at most ``TABLE_WIDTH`` columns wide unless ``wide``."""
    from rich.measure import Measurement

    width = console.width if wide else min(TABLE_WIDTH, console.width)
    table = _table(sheet, 1, frozenset())
    for padding, left_out in ((0, frozenset[int]()), (1, sheet.optional), (0, sheet.optional)):
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum > width:
            table = _table(sheet, padding, left_out)
    console.print(table, width=width)


def _table(sheet: Sheet, padding: int, left_out: frozenset[int]) -> "Table":
    """The sheet with further spaces between the columns, and without some of them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, padding, 0, 0),
        title=sheet.title,
        title_justify="left",
        title_style="bold",
        caption=sheet.note or None,
        caption_justify="left",
        pad_edge=False,
    )
    longest = max((len(cells[0]) for cells in sheet.rows), default=0)
    kept = [number for number in range(len(sheet.head)) if number not in left_out]
    for number in kept:
        is_word = number < sheet.num_words
        table.add_column(
            sheet.head[number],
            justify="left" if is_word else "right",
            no_wrap=number > 0,
            overflow="fold",
            min_width=min(longest, _MIN_NAME_WIDTH) if number == 0 else None,
        )
    for row, cells in enumerate(sheet.rows):
        following = row + 1 in sheet.sums and row not in sheet.sums
        style = "bold" if row in sheet.sums else None
        table.add_row(*(Text(cells[number]) for number in kept), style=style, end_section=following)
    return table


def print_facts(console: "Console", heading: str, selection: Selection, scores: RegionScores | None) -> None:
    """Print what is known of a selection as a whole, below a heading."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, title=heading, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(selection, scores):
        table.add_row(Text(name), Text(value))
    console.print(table, width=min(TABLE_WIDTH, console.width))
    console.print(f"digest {selection.digest()}", soft_wrap=True)


def print_counts(console: "Console", selection: Selection, scores: RegionScores | None, by: By) -> None:
    """Print how much is chosen, by module, layer or weight."""
    sheet = counts_sheet(count_regions(selection, scores, by), by, has_scores=scores is not None)
    print_sheet(console, sheet, wide=by == "weight")


def save_choice(selection: Selection, scores: RegionScores | None, out: Path, scores_out: Path | None) -> None:
    """Write a selection and the scores that it was chosen by, and print what it holds.

    Args:
        selection: what was chosen.
        scores: of all candidates, if there are any.
        out: the file of the selection.
        scores_out: the file of the scores; None: they are not written.
    """
    selection.save(out)
    if scores is not None and scores_out is not None:
        scores.save(scores_out)
    console = new_console()
    print_facts(console, "Selection", selection, scores)
    console.print()
    print_counts(console, selection, scores, "module")
    console.print(f"selection written to {out}", soft_wrap=True)
    if scores is not None and scores_out is not None:
        console.print(f"scores written to {scores_out}; choose again from them with --from-scores", soft_wrap=True)


def print_selection(console: "Console", name: str, selection: Selection, scores: RegionScores | None, by: By) -> None:
    """Print what a selection holds: by module with maps and histograms, or a table by layer or by weight."""
    print_facts(console, f"Selection {name}", selection, scores)
    console.print()
    print_counts(console, selection, scores, by)
    if by != "module":
        return
    layers = selection.metadata.get("num_layers")
    num_layers = layers if isinstance(layers, int) else None
    maps = [("Share of each matrix that is trained", trained_shares(selection, scores, num_layers))]
    if scores:
        for kind, score in kinds_and_scores(scores):
            heading = f"Share of the score mass of {PLURALS[kind]} ({score})"
            maps.append((heading, mass_shares(scores, kind, score, num_layers)))
    for title, grid in maps:
        if grid.modules:
            console.print()
            _print_lines(console, layer_map(console, grid, title))
    if scores:
        console.print()
        curves = budget_curves(selection, scores)
        if curves:
            print_sheet(console, budget_sheet(curves))
        console.print()
        _print_lines(console, histogram_lines(console, histograms(selection, scores, HISTOGRAM_BINS)))


def print_overlap(console: "Console", compared: Mapping[str, list[Overlap]], by: By, num_layers: int | None) -> None:
    """Print what two selections have in common."""
    print_sheet(console, overlap_sheet(compared, by), wide=by == "weight")
    if by == "module":
        console.print()
        _print_lines(console, layer_map(console, jaccard_grid(compared, num_layers), "Jaccard index", largest=1.0))


def _print_lines(console: "Console", lines: "Sequence[Text]") -> None:
    for line in lines:
        console.print(line, soft_wrap=True)


def _is_ascii(console: "Console") -> bool:
    return console.options.ascii_only


def layer_map(console: "Console", grid: LayerGrid, title: str, *, largest: float | None = None) -> "list[Text]":
    """Module types by layers, a cell for each, darker or brighter with its number.

    Where colours are not shown, shades stand for them. Neighbouring layers share a cell (their mean) if there are more
    of them than columns.

    Args:
        console: says how wide it is and what it can show.
        grid: shares; empty cells are left blank.
        title: what they are.
        largest: the share of the strongest colour; None: the largest one there is.
    """
    from rich.text import Text

    width = min(TABLE_WIDTH, console.width)
    names = short_names(grid.modules)
    label = max(map(len, names), default=0) + 2
    num_columns = grid.num_layers + grid.has_outside
    merged = max(1, -(-grid.num_layers // max(width - label - 3 * grid.has_outside, 1)))
    groups = [range(start, min(start + merged, grid.num_layers)) for start in range(0, grid.num_layers, merged)]
    cell_width = max(1, min(3, (width - label - 2 * grid.has_outside) // max(len(groups) + grid.has_outside, 1)))
    if grid.has_outside:
        groups.append(range(num_columns - 1, num_columns))
    known = [value for row in grid.cells for value in row if value is not None]
    top = largest if largest is not None else max(known, default=0.0)
    in_colour = console.color_system is not None and not console.no_color
    shades = _ASCII_SHADES if _is_ascii(console) else _SHADES
    block = "#" if _is_ascii(console) else "█"

    def cell(value: float | None) -> tuple[str, str]:
        if value is None:
            return " " * cell_width, ""
        if value <= 0.0 or top <= 0.0:
            return ".".center(cell_width), "dim"
        level = min(value / top, 1.0)
        if in_colour:
            return block * cell_width, _COLOURS[min(int(level * len(_COLOURS)), len(_COLOURS) - 1)]
        return shades[min(int(level * len(shades)), len(shades) - 1)] * cell_width, ""

    lines = [Text(title, style="bold")]
    for name, values in zip(names, grid.cells, strict=True):
        line = Text(name.ljust(label))
        for group in groups:
            if grid.has_outside and group.start == num_columns - 1:
                line.append("  " if len(groups) > 1 else "")
            inside = [value for value in (values[column] for column in group) if value is not None]
            line.append(*cell(sum(inside) / len(inside) if inside else None))
        lines.append(line)
    axis = Text("layer".ljust(label), style="dim")
    spans = groups[:-1] if grid.has_outside else groups
    position, numbers = 0, ""
    every = next(gap for gap in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if gap * cell_width >= 4 * merged)
    for number, group in enumerate(spans):
        first = next((layer for layer in group if layer % every == 0), None)
        if first is not None and number * cell_width >= position:
            numbers = numbers.ljust(number * cell_width) + str(first)
            position = len(numbers) + 1
    axis.append(numbers.ljust(len(spans) * cell_width))
    if grid.has_outside:
        axis.append("  none" if spans else "none")
    lines.append(axis)
    scale = Text(" " * label + "0 ")
    for step in range(len(_COLOURS) if in_colour else len(shades)):
        scale.append(block if in_colour else shades[step], style=_COLOURS[step] if in_colour else "")
    scale.append(f" {format_percent(top)}   . none" + (f"   each cell: mean of {merged} layers" if merged > 1 else ""))
    lines.append(scale)
    return lines


def _bars(counts: Sequence[int], top: int, bars: str) -> str:
    """Bars as high as the logarithm of the counts."""
    return "".join(
        " " if not count else bars[min(int(math.log1p(count) / math.log1p(top) * len(bars)), len(bars) - 1)]
        for count in counts
    )


def histogram_lines(console: "Console", found: Sequence[Histogram]) -> "list[Text]":
    """Two rows of bars for each module type: all candidate regions above, the chosen ones below."""
    from rich.text import Text

    bars = _ASCII_BARS if _is_ascii(console) else _BARS
    lines: list[Text] = []
    previous: tuple[str, str] | None = None
    groups = {(each.kind, each.score): each for each in found}
    names = short_names(list(dict.fromkeys(each.module for each in found)))
    short = dict(zip(dict.fromkeys(each.module for each in found), names, strict=True))
    label = max(max(map(len, names), default=0) + 2, 12)

    def axis(each: Histogram) -> Text:
        low, high = f"{float(each.edges[0]):.1e}", f"{float(each.edges[-1]):.1e}"
        middle = "score, logarithmic" if each.is_log else "score"
        return Text(" " * (label + 8) + low + middle.center(HISTOGRAM_BINS - len(low) - len(high)) + high, style="dim")

    for number, each in enumerate(found):
        if (each.kind, each.score) != previous:
            if previous is not None:
                lines += [axis(groups[previous]), Text()]  # type: ignore[index]
            lines.append(
                Text(f"Scores of {each.kind}s ({each.score}); heights are logarithms of numbers", style="bold")
            )
            previous = (each.kind, each.score)
        top = int(each.every.max()) or 1
        line = Text(short[each.module].ljust(label) + "all     ")
        line.append(_bars(each.every.tolist(), top, bars), style="dim")
        lines.append(line)
        line = Text(" " * label + "chosen  ")
        line.append(_bars(each.chosen.tolist(), top, bars), style="green")
        lines.append(line)
        if number == len(found) - 1:
            lines.append(axis(each))
    left_out = sum(each.num_left_out for each in found)
    if left_out:
        lines.append(Text(f"{left_out:,} regions with a score of 0 or less, or excluded, are not shown", style="dim"))
    return lines
