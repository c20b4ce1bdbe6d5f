"""What is seen of a run where it was launched: one picture of all ranks in a terminal, and their words elsewhere?"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from launcher.starting.failures import RankReport
from launcher.summary import ABSENT, as_number, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

# As many ranks are listed one by one; of more, each node has a line, and so many lines are shown, the worst first.
MOST_RANKS, MOST_LINES = 16, 16
# What a terminal would obey, and not show. Colours are kept.
_CONTROLS = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\x1b"}
# A rank whose forward pass takes so many times the median is slow.
SLOW_FACTOR = 1.25
# Redrawn so often: what it shows comes twice a second.
_PER_SECOND = 4


class View(Protocol):
    """A context manager around a run."""

    # Whether it draws, so that nothing else may write to the terminal.
    is_picture: bool

    def say(self, stream: str, text: str) -> None:
        """Pass on what rank 0, or the launcher, has written to its "out" or "err"."""

    def update(self, reports: Sequence[RankReport]) -> None:
        """Show how far all ranks are."""

    def __enter__(self) -> "View": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainView:
    """Words only, each where it was meant to go; and a line for a rank that is stopped."""

    is_picture = False

    def __init__(self) -> None:
        self._told: set[tuple[int, str]] = set()

    def say(self, stream: str, text: str) -> None:
        """Pass on what was written."""
        with suppress(OSError, ValueError):  # The reader may be gone.
            target = sys.stdout if stream == "out" else sys.stderr
            target.write(text)
            target.flush()

    def update(self, reports: Sequence[RankReport]) -> None:
        """Say of ranks, once, that they do not run."""
        for report in reports:
            if report.frozen and (report.rank, report.frozen) not in self._told:
                self._told.add((report.rank, report.frozen))
                self.say("err", f"sparse-zero: {report} {report.frozen}\n")

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""


def slow_ranks(reports: Sequence[RankReport]) -> set[int]:
    """Ranks whose forward pass takes much longer than is usual in this run."""
    seconds = {report.rank: as_number(report.status.get("forward_seconds")) for report in reports}
    known = {rank: found for rank, found in seconds.items() if found}
    # Of two, nobody can say which one is unusual, but the slower one is what both wait for.
    usual = statistics.median_low(known.values()) if len(known) > 1 else 0.0
    return {rank for rank, found in known.items() if usual and found > SLOW_FACTOR * usual}


def headline(reports: Sequence[RankReport], seconds_of_step: float | None) -> str:
    """Step, loss, speed, time left and last checkpoint of the run, or the phase before there is any.

    Args:
        reports: of all ranks.
        seconds_of_step: as it was lately; None before it is known.
    """
    first = min(reports, key=lambda report: report.rank, default=None)
    status: Mapping[str, Any] = {} if first is None else first.status
    step, last = status.get("step"), status.get("num_steps")
    if step is None or last is None:
        return str(status.get("phase", "starting"))
    loss = as_number(status.get("loss"))
    left = None if seconds_of_step is None else seconds_of_step * (last - step)
    checkpoint = status.get("checkpoint")
    share = as_number(status.get("mfu"))
    return (
        f"step {step}/{last}  loss {ABSENT if loss is None else f'{loss:.4f}'}  "
        f"{format_count(status.get('tokens_per_second'))} tok/s  {'' if share is None else f'{share:.0%} MFU  '}"
        f"{format_duration(left)} left  "
        f"checkpoint {ABSENT if checkpoint is None else checkpoint}"
    )


def _seconds(value: object) -> str:
    number = as_number(value)
    return ABSENT if number is None else f"{number:.2f} s" if number >= 1 else f"{1000 * number:.0f} ms"


def _state(report: RankReport, is_slow: bool) -> tuple[str, str]:
    """(words, style) of how a rank is."""
    if report.frozen:
        return report.frozen, "bold red"
    if report.state == "lost":
        return "lost", "bold red"
    if isinstance(report.state, int):
        return ("ended", "dim") if report.state == 0 else (f"ended with {report.state}", "bold red")
    return ("slow", "yellow") if is_slow else ("", "")


def ranks_table(reports: Sequence[RankReport]) -> "Table":
    """A line for each rank, or for each node where there are many."""
    from rich.table import Table
    from rich.text import Text

    slow = slow_ranks(reports)
    table = Table(box=None, pad_edge=False, header_style="dim")
    one_by_one = len(reports) <= MOST_RANKS
    for name in ("rank" if one_by_one else "ranks", "node", "phase", "step", "forward", "memory", ""):
        table.add_column(name, justify="left" if name in ("node", "phase", "") else "right", no_wrap=True)
    groups: dict[object, list[RankReport]] = {}
    for report in sorted(reports, key=lambda report: report.rank):
        groups.setdefault(report.rank if one_by_one else report.node, []).append(report)
    lines = []
    for group in groups.values():
        states = [(*_state(each, each.rank in slow), each.rank) for each in group]
        lines.append((group, min(states, key=_badness)))
    shown = lines if len(lines) <= MOST_LINES else sorted(lines, key=lambda line: _badness(line[1]))[:MOST_LINES]
    for group, (words, style, rank) in shown:
        # Of a node: its slowest rank, the one that needs most, the one that is least far, and the worst state.
        behind = min(group, key=lambda each: each.status.get("ticks", 0))
        table.add_row(
            str(group[0].rank) if one_by_one else str(len(group)),
            Text(behind.node),
            str(behind.status.get("phase", "start")),
            str(behind.status.get("step", ABSENT)),
            _seconds(_most(group, "forward_seconds")),
            format_bytes(_most(group, "memory_bytes")),
            Text(words if one_by_one or not words or style == "dim" else f"rank {rank} {words}", style=style),
        )
    if len(shown) < len(lines):
        table.add_row("", f"and {len(lines) - len(shown)} nodes more")
    return table


def _badness(state: tuple[str, str, int]) -> int:
    """The lower, the worse."""
    return ("bold red", "yellow", "dim", "").index(state[1])


def _most(group: Sequence[RankReport], name: str) -> float | None:
    found = (as_number(each.status.get(name)) for each in group)
    return max((value for value in found if value is not None), default=None)


def shown_line(line: str) -> "Text":
    """What a terminal shows of a line that a rank has written: its colours, and nothing else that it would obey."""
    from rich.text import Text

    # Of a progress bar, which goes back to the start of its line, the last state.
    return Text.from_ansi(line.rstrip("\r").rpartition("\r")[2].translate(_CONTROLS))


class TerminalView:
    """A bar and a table at the bottom of the terminal; words scroll above them.

    Args:
        console: of standard error.
        title: names the run.
    """

    is_picture = True

    def __init__(self, console: "Console", title: str) -> None:
        from rich.live import Live

        self._console, self._title, self._plain = console, title, PlainView()
        self._reports: Sequence[RankReport] = ()
        # When steps were seen: the time that is left is reckoned from the last ones.
        self._seen: list[tuple[float, int]] = []
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip

    def _draw(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        reports = self._reports
        first = min(reports, key=lambda report: report.rank, default=None)
        status = {} if first is None else first.status
        parts: list[RenderableType] = [Text(self._title, style="bold", no_wrap=True, overflow="ellipsis")]
        parts.append(Text(headline(reports, self._seconds_of_step()), no_wrap=True, overflow="ellipsis"))
        if status.get("num_steps"):
            bar = Table.grid(expand=True)  # By itself it does not end its line.
            bar.add_row(ProgressBar(total=status["num_steps"], completed=status.get("step", 0)))
            parts.append(bar)
        if reports:
            parts.append(ranks_table(reports))
        return Group(*parts)

    def _seconds_of_step(self) -> float | None:
        if len(self._seen) < 2 or self._seen[-1][1] <= self._seen[0][1]:
            return None
        (since, before), (now, step) = self._seen[0], self._seen[-1]
        return (now - since) / (step - before)

    def say(self, stream: str, text: str) -> None:
        """Show what was written, above the picture; or write it where standard output goes, if that is elsewhere."""
        if stream == "out" and not sys.stdout.isatty():
            self._plain.say(stream, text)
            return
        for line in text.rstrip("\n").split("\n"):
            self._console.print(shown_line(line), soft_wrap=True)

    def update(self, reports: Sequence[RankReport]) -> None:
        """Show how far all ranks are."""
        self._reports = reports
        step = next((report.status.get("step") for report in reports if report.rank == 0), None)
        if step is not None and (not self._seen or step != self._seen[-1][1]):
            if self._seen and step < self._seen[-1][1]:  # Another start.
                self._seen.clear()
            self._seen = [*self._seen[-50:], (time.monotonic(), step)]

    def __enter__(self) -> "TerminalView":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def make_view(title: str) -> View:
    """The view that suits this process's standard error.

    Args:
        title: names the run.
    """
    if not sys.stderr.isatty():
        return PlainView()
    from rich.console import Console

    return TerminalView(Console(stderr=True), title)
