"""What did a run reach, and what did it cost? One table, and the words for its numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_zero.errors import InputError
from sparse_zero.files import read_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_NAME = "summary.json"
# What stands for a number that was not measured.
ABSENT = "–"
# The table's width in characters: the narrowest terminal in common use.
TABLE_WIDTH = 80
# As many ranks as are listed one by one; of more, only the range is told.
_MAX_LISTED_RANKS = 4

_PHASE_NAMES = {
    "load": "loading",
    "evaluate_base": "evaluation before",
    "forgetting": "other text, both",
    "calibrate": "calibration",
    "train": "training",
    "evaluate_tuned": "evaluation after",
    "save": "saving",
}


def as_number(value: object) -> float | None:
    """``value`` as a number; None when it is missing, no number or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def as_mapping(value: object) -> Mapping[str, Any]:
    """``value`` if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def format_bytes(value: object) -> str:
    """Bytes in the binary unit that leaves three digits or four: ``1.37 GiB``, ``512 KiB``."""
    number = as_number(value)
    if number is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1000 or unit == "GiB":
            break
        number /= 1024
    digits = 0 if unit == "B" or abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    return f"{number:.{digits}f} {unit}"


def format_count(value: object) -> str:
    """A count in at most five characters: ``940``, ``12.3k``, ``1.24M``, ``6.74B``."""
    number = as_number(value)
    if number is None:
        return ABSENT
    unit = ""
    for larger in ("k", "M", "B", "T"):
        if abs(number) < 999.5:
            break
        number, unit = number / 1000, larger
    if not unit:
        return f"{number:.0f}"
    return f"{number:.{2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0}f}{unit}"


def format_flops(flops_per_second: object, mfu: object = None) -> str:
    """What a rank computes: ``412 TFLOP/s``, and if it is known what share that is of its device, ``, 41.7 % MFU``."""
    number, share = as_number(flops_per_second), as_number(mfu)
    if number is None:
        return ABSENT
    unit = "FLOP/s"
    for larger in ("k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            break
        number, unit = number / 1000, f"{larger}FLOP/s"
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f} {unit}" + ("" if share is None else f", {100 * share:.1f} % MFU")


def format_duration(value: object) -> str:
    """Seconds as ``8.3 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    number = as_number(value)
    if number is None:
        return ABSENT
    if number < 59.95:
        return f"{number:.1f} s"
    seconds = round(number)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(number / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_percent(fraction: object) -> str:
    """A fraction in percent with at least three significant digits up to one percent: ``0.412 %``."""
    number = as_number(fraction)
    if number is None:
        return ABSENT
    percent = 100 * number
    return (
        f"{percent:.3f} %" if 0 < abs(percent) < 1 else f"{percent:.2f} %" if abs(percent) < 10 else f"{percent:.1f} %"
    )


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    base, tuned = as_number(accuracy.get("base")), as_number(accuracy.get("tuned"))
    if base is None and tuned is None:
        return "not evaluated"
    text = f"{format_percent(base)} → {format_percent(tuned)}"
    if base is not None and tuned is not None:
        text += f"  ({100 * (tuned - base):+.1f} points"
        problems = as_number(accuracy.get("num_problems"))
        text += f", {problems:.0f} problems)" if problems is not None else ")"
    return text


def _forgetting(forgetting: Mapping[str, Any]) -> str:
    base, tuned, tokens = (as_number(forgetting.get(name)) for name in ("base", "tuned", "num_tokens"))
    if base is None or tuned is None:
        return ABSENT
    return f"{base:.4f} → {tuned:.4f}  ({tuned - base:+.4f} a token, {tokens or 0:,.0f} tokens)"


def _parameters(parameters: Mapping[str, Any]) -> str:
    trained, total = as_number(parameters.get("trained")), as_number(parameters.get("total"))
    if trained is None or not total:
        return ABSENT if trained is None else f"{trained:,.0f}"
    retired = as_number(parameters.get("retired"))
    also = f", {retired:,.0f} retired" if retired else ""
    return f"{trained:,.0f} of {total:,.0f}  ({format_percent(trained / total)}){also}"


def _peak_memory(peaks: object) -> str:
    numbers = [as_number(peak) for peak in peaks] if isinstance(peaks, Sequence) and not isinstance(peaks, str) else []
    known = [number for number in numbers if number is not None]
    if not known:
        return ABSENT
    if len(numbers) <= _MAX_LISTED_RANKS:
        return ", ".join(format_bytes(number) for number in numbers)
    highest = max(known)
    return (
        f"{format_bytes(min(known))} to {format_bytes(highest)}  "
        f"({len(numbers)} ranks, most: rank {numbers.index(highest)})"
    )


def _communication(terms: Mapping[str, Any]) -> str:
    """Bytes by what they carry; the few bytes of flags and norms are in the sum only."""
    known = {name: as_number(terms.get(name)) for name in ("gradients", "values", "weights", "constants")}
    if any(number is None for number in known.values()):
        return ABSENT
    total = sum(number or 0 for number in known.values())
    if not total:
        return "none: one rank"
    parts = [f"{name} {format_bytes(number)}" for name, number in known.items() if number and name != "constants"]
    return f"{format_bytes(total)}  ({', '.join(parts)})"


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table's lines as (name, value); what the run did not measure is marked as absent."""
    loss, steps, ranks = (as_number(summary.get(name)) for name in ("final_loss", "steps", "world_size"))
    speed = as_number(summary.get("tokens_per_second"))
    forgetting = as_mapping(summary.get("forgetting"))
    rows = [
        ("Accuracy before → after", _accuracy(as_mapping(summary.get("accuracy")))),
        *([("Loss on other text", _forgetting(forgetting))] if forgetting else []),
        ("Parameters trained", _parameters(as_mapping(summary.get("parameters")))),
        ("Peak memory per rank", _peak_memory(summary.get("peak_memory_bytes_per_rank"))),
        ("Reduced, gathered a step", _communication(as_mapping(summary.get("communication_bytes_per_step")))),
        ("Tokens per second", ABSENT if speed is None else f"{speed:,.0f}"),
        ("Adapter", format_bytes(summary.get("adapter_bytes"))),
        ("Merged model", format_bytes(summary.get("merged_bytes"))),
        ("Steps", ABSENT if steps is None else f"{steps:,.0f}"),
        ("Ranks", ABSENT if ranks is None else f"{ranks:,.0f}"),
        ("Last training loss", ABSENT if loss is None else f"{loss:.4f}"),
    ]
    cache = as_mapping(summary.get("prefix_cache"))
    if cache:
        share, layers = format_percent(cache.get("hit_share")), as_number(cache.get("layers")) or 0
        what = f"{share} of the samples without {layers:.0f} layers; {format_bytes(cache.get('bytes'))}"
        rows.append(("Frozen-prefix cache", what))
    resumed = as_number(summary.get("resumed_after_step"))
    if resumed:
        rows.append(("Continued after step", f"{resumed:,.0f}; the times are those of the last start"))
    phases = as_mapping(summary.get("phases"))
    order = [
        *(name for name in _PHASE_NAMES if name in phases),
        *(name for name in phases if name not in _PHASE_NAMES),
    ]
    rows += [
        (f"Time, {_PHASE_NAMES.get(name, name.replace('_', ' '))}", format_duration(phases[name])) for name in order
    ]
    if phases:
        rows.append(("Time, total", format_duration(sum(as_number(seconds) or 0.0 for seconds in phases.values()))))
    return rows


def load_summary(run_folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``summary.json``.

    Raises:
        InputError: the folder or the file is missing or damaged.
    """
    if not run_folder.is_dir():
        raise InputError(f"the run folder {run_folder} does not exist: name the output.folder of a run")
    path = run_folder / FILE_NAME
    if not path.exists():
        raise InputError(f"{path} does not exist: the run has not ended; start it again to continue it")
    summary = read_json(path, strict=True)
    if not isinstance(summary, dict):
        raise InputError(f"{path} holds a {type(summary).__name__}, not a summary: run again or delete it")
    return summary


def summary_table(summary: Mapping[str, Any]) -> "Table":
    """The table, at most ``TABLE_WIDTH`` characters wide; sections follow the kinds of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="Run summary", title_justify="left", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = summary_rows(summary)
    for index, (name, value) in enumerate(rows):
        following = rows[index + 1][0] if index + 1 < len(rows) else ""
        ends_section = following in ("Adapter", "Steps") or (
            following.startswith("Time, ") and not name.startswith("Time, ")
        )
        table.add_row(Text(name), Text(value), end_section=ends_section, style="bold" if index == 0 else None)
    return table


def print_summary(run_folder: Path, console: "Console | None" = None) -> None:
    """Print the table of a run that has ended, to standard output unless a console is given.

    Raises:
        InputError: as :func:`load_summary`.
    """
    from rich.console import Console

    from launcher.memory.report import comparison_notes, is_worth_showing, load_memory, memory_table

    summary, memory = load_summary(run_folder), load_memory(run_folder)
    console = Console() if console is None else console
    width = min(TABLE_WIDTH, console.width)
    console.print(summary_table(summary), width=width)
    if memory is not None and is_worth_showing(memory):
        console.print(memory_table(memory), width=width)
        for note in comparison_notes(memory):
            console.print(note, width=width, highlight=False, markup=False)
