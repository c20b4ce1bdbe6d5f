"""How is what a sweep has reached written down: for a program, for a document, for a terminal?"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.summary import ABSENT, TABLE_WIDTH
from launcher.sweep.collecting import Group, Mean
from launcher.sweep.points import short_keys
from launcher.sweep.sweep_folder import Listed
from sparse_zero.files import atomic_path, atomic_write_text, to_json

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table


class Shown(NamedTuple):
    """How a number is shown."""

    header: str
    # What the number is multiplied with, and digits after the point.
    scale: float
    digits: int


# In the order of the columns. The first three are what a sweep is for, and fit a terminal.
SHOWN: Mapping[str, Shown] = {
    "final_loss": Shown("loss", 1, 4),
    "validation_loss_best": Shown("best val. loss", 1, 4),
    "accuracy_tuned": Shown("accuracy %", 100, 1),
    "forgetting_change": Shown("forgetting", 1, 4),
    "parameters_fraction": Shown("trained %", 100, 3),
    "peak_memory_bytes": Shown("peak GiB", 2**-30, 2),
    "tokens_per_second": Shown("tokens/s", 1, 0),
    "total_seconds": Shown("seconds", 1, 1),
    "adapter_bytes": Shown("adapter MiB", 2**-20, 2),
}
_IN_TERMINAL = ("final_loss", "validation_loss_best", "accuracy_tuned")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def format_mean(mean: Mean | None, shown: Shown, between: str = " ± ") -> str:
    """A mean, its standard deviation where there is one, and of how many where some lack it."""
    if mean is None:
        return ABSENT
    text = f"{mean.mean * shown.scale:.{shown.digits}f}"
    if mean.deviation is not None:
        text += f"{between}{mean.deviation * shown.scale:.{shown.digits}f}"
    return text if mean.num_points is None else f"{text} (n={mean.num_points})"


def write_csv(path: "Path", rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for every point; lists and mappings as JSON, nothing for what was not measured."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow("" if value is None else _text(value) for value in row.values())
    atomic_write_text(path, buffer.getvalue())


def write_parquet(path: "Path", rows: Sequence[Mapping[str, Any]]) -> None:
    """The same as a parquet file; a column of settings that are not all numbers or truth values is text."""
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kinds = {float if isinstance(value, int) and not isinstance(value, bool) else type(value) for value in values}
        is_plain = kinds - {type(None)} in ({float}, {bool}, set())
        columns[name] = values if is_plain else [None if value is None else _text(value) for value in values]
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def markdown(groups: Sequence[Group], keys: Sequence[str], repeats: Sequence[str]) -> str:
    """The means over repeats as a Markdown table, with the columns that have numbers."""
    kept = [key for key in keys if key not in repeats]
    columns = [name for name in SHOWN if any(name in each.numbers for each in groups)]
    over = f" Mean ± standard deviation (of the sample) over {', '.join(repeats)}." if repeats else ""
    head = [*kept, "finished", *(SHOWN[name].header for name in columns)]
    fewer = any(
        each.numbers[name].num_points is not None for each in groups for name in columns if name in each.numbers
    )
    note = " n: how many have the number, where not all have." if fewer else ""
    lines = [f"Numbers of the finished points.{over}{note}", "", _line(head), _line(["---"] * len(head))]
    for each in groups:
        numbers = [format_mean(each.numbers.get(name), SHOWN[name]) for name in columns]
        lines.append(_line([*(_text(each.settings[key]) for key in kept), _finished(each), *numbers]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    safe = (" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(safe)} |"


def _finished(group: Group) -> str:
    failed = f" ({group.num_failed} failed)" if group.num_failed else ""
    return f"{group.num_finished}/{group.num_points}{failed}"


def describe(settings: Mapping[str, Any]) -> str:
    """Settings in words: ``method=rows learning_rate=0.001``."""
    keys = short_keys(list(settings))
    return " ".join(f"{key}={_text(value)}" for key, value in zip(keys, settings.values(), strict=True))


def means_table(groups: Sequence[Group], repeats: Sequence[str]) -> "Table":
    """The means over repeats, for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = [name for name in _IN_TERMINAL if any(name in each.numbers for each in groups)]
    over = f", mean±deviation over {', '.join(repeats)}" if repeats else ""
    table = Table(box=box.SIMPLE_HEAD, title=Text(f"Sweep{over}"), title_justify="left", pad_edge=False)
    table.add_column("setting", overflow="fold")
    table.add_column("finished", max_width=9)
    for name in columns:
        table.add_column(SHOWN[name].header, justify="right", no_wrap=True)
    for each in groups:
        numbers = [format_mean(each.numbers.get(name), SHOWN[name], "±") for name in columns]
        table.add_row(Text(describe(each.settings) or "all"), _finished(each), *numbers)
    return table


def points_table(listed: Sequence[Listed], states: Sequence[str]) -> "Table":
    """What a dry run shows: number, name and state of every point."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("point", justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("state", no_wrap=True)
    for each, state in zip(listed, states, strict=True):
        # A name with a hash does not say everything.
        told = f"{each.name}\n  {describe(each.settings)}" if "~" in each.name else each.name
        table.add_row(str(each.index), Text(told), state)
    return table


def print_table(table: "Table") -> None:
    """To standard output, at most as wide as the narrowest terminal in common use."""
    from rich.console import Console

    console = Console()
    console.print(table, width=min(TABLE_WIDTH, console.width))
