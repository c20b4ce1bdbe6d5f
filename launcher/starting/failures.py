"""Of many ranks that ended, which one tells why; and which one holds up the others?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.starting.rank_logs import ERROR_SIGNS
from launcher.stopping import EXIT_LOST

# Threads' stacks, as Python's faulthandler writes them, that are shown of a rank; all are in its log.
_STACK_LINES = 14
# Many may be frozen at once, as when a batch system suspends a node.
_MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What is known of one rank."""

    rank: int
    node: str
    # "running", "lost", or an exit code.
    state: int | str
    # Why it does not run, whatever it would like to do; empty if it does.
    frozen: str = ""
    # See :data:`launcher.pulse.FIELDS`; empty before it has said anything.
    status: Mapping[str, Any] = field(default_factory=dict)
    # What it said last, if it has failed.
    words: str = ""
    # Of its threads, if it was asked for them.
    stacks: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether it ended, and not well."""
        return self.state not in ("running", 0)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


def ended_first(reports: Sequence[RankReport], order: Mapping[int, float]) -> RankReport | None:
    """The rank whose last words explain the end of the others; None where nobody has said anything that does.

    Ranks that only lost the connection to another one are heard if there are no others. One that says an error comes
    before one that does not.

    Args:
        reports: of all ranks.
        order: when each was seen to have ended.
    """

    def key(report: RankReport) -> tuple[bool, float, int]:
        is_error = any(sign in report.words for sign in ERROR_SIGNS)
        return not is_error, order.get(report.rank, 0.0), report.rank

    failed = [report for report in reports if report.has_failed]
    causes = [report for report in failed if report.state != EXIT_LOST] or failed
    return min((report for report in causes if report.words.strip()), key=key, default=None)


class HangWatch:
    """Notices that no rank goes on.

    A run hangs if, for too long, no rank has told of a micro-batch, while all of them are in phases that tell such
    things, or one of them does not run at all. Loading, evaluating and saving may take as long as they like.

    Args:
        seconds: how long is too long; None: it is never noticed.
        now: of the monotonic clock.
    """

    # The one who looks was itself stopped, or had no time, if it looked so many seconds ago; what it sees is old.
    PAUSE_SECONDS = 5.0

    def __init__(self, seconds: float | None, now: float) -> None:
        self._seconds, self._since, self._looked = seconds, now, now
        self._ticks: dict[int, Any] = {}

    def look(self, reports: Iterable[RankReport], now: float) -> bool:
        """Whether the run hangs, by what is known of all ranks now."""
        running = [report for report in reports if report.state == "running"]
        ticks = {report.rank: report.status.get("ticks") for report in running}
        could_hang = any(report.frozen for report in running) or (
            bool(running) and all(report.status.get("is_ticking") for report in running)
        )
        if ticks != self._ticks or not could_hang or now - self._looked > self.PAUSE_SECONDS:
            self._ticks, self._since = ticks, now
        self._looked = now
        return self._seconds is not None and now - self._since > self._seconds


def holding_up(reports: Sequence[RankReport]) -> list[RankReport]:
    """The ranks that the others may be waiting for: those that do not run, else those that have come less far."""
    running = [report for report in reports if report.state == "running"]
    frozen = [report for report in running if report.frozen]
    if frozen:
        return frozen
    # Elsewhere ranks have shares of different size.
    if not running or any(report.status.get("phase") != "train" for report in running):
        return []
    least = min(map(_done, running))
    behind = [report for report in running if _done(report) == least]
    return behind if len(behind) < len(running) else []


def _done(report: RankReport) -> tuple[int, int]:
    """Steps, and micro-batches of the next one."""
    return report.status.get("step", 0), report.status.get("micro_batch", 0)


def describe_hang(reports: Sequence[RankReport], seconds: float) -> str:
    """In one line, that and why a run hangs, as far as it can be told."""
    found = holding_up(reports)
    shown = [f"{report} {report.frozen or _place(report)}" for report in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        shown.append(f"{len(found) - _MOST_NAMED} more")
    why = "; ".join(shown) or "all ranks wait"
    return f"no step for {seconds:g} seconds (cluster.hang_timeout): {why}"


def _place(report: RankReport) -> str:
    step, micro_batch = _done(report)
    return f"is behind ({step} steps and {micro_batch} micro-batches done)"


def hung_stack(reports: Sequence[RankReport]) -> tuple[RankReport, str] | None:
    """Of a rank that holds up others, or of the first one: the stack of its main thread; None if nobody gave one."""
    candidates = [*holding_up(reports), *sorted(reports, key=lambda report: report.rank)]
    for report in candidates:
        # Threads are told one by one, after an empty line, the main one last.
        blocks = [block for block in report.stacks.split("\n\n") if "(most recent call first)" in block]
        if blocks:
            lines = blocks[-1].strip().splitlines()
            return report, "\n".join(lines if len(lines) <= _STACK_LINES else [*lines[:_STACK_LINES], "  ..."])
    return None
