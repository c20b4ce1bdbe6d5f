"""Where do a forecast and a simulation of a job differ, by phase and by kind, and are the differences small enough?"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Of the peak over all phases: what the median and the worst case may be off by, as shares of the simulation.
MEDIAN_BOUND, WORST_BOUND = 0.02, 0.05
# Of the simulation of a model from this size on.
SIMULATION_SECONDS, SIMULATION_BYTES, LARGE_PARAMETERS = 60.0, 4 * 2**30, 6_000_000_000


@dataclass(frozen=True, kw_only=True)
class PhaseCompared:
    """The peaks of one phase, in bytes, and the kinds at them."""

    forecast: int
    simulated: int
    forecast_kinds: dict[str, int]
    simulated_kinds: dict[str, int]
    # What is held at the forecast's peak, and the module at the simulation's.
    moment: str
    module: str

    @property
    def error(self) -> float:
        """Relative."""
        return self.forecast / self.simulated - 1 if self.simulated else 0.0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One case."""

    name: str
    # Why there is nothing to compare.
    failed: str | None = None
    forecast: int = 0
    simulated: int = 0
    phases: dict[str, PhaseCompared] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    process_bytes: int = 0

    @property
    def error(self) -> float:
        """Relative, of the peak over all phases."""
        return self.forecast / self.simulated - 1 if self.simulated else 0.0

    @property
    def is_large(self) -> bool:
        """Whether the bounds on a simulation's cost hold for it."""
        return self.parameters >= LARGE_PARAMETERS


def compare(name: str, forecast: Any, row: dict[str, Any]) -> Compared:
    """One case compared.

    Args:
        name: of the case.
        forecast: :class:`sparse_zero.memory.closed_form.forecast.Forecast`, if there is one.
        row: the simulation's line.
    """
    if forecast is None or "failed" in row:
        return Compared(name=name, failed=row.get("failed", "no forecast"))
    simulated, phases = row["simulated"], {}
    known = set(forecast.phases())
    for phase, other in simulated["phases"].items():
        peak = forecast.peak(phase) if phase in known else None
        phases[phase] = PhaseCompared(
            forecast=peak.num_bytes() if peak else 0,
            simulated=other["peak_bytes"],
            forecast_kinds=peak.by_kind() if peak else {},
            simulated_kinds=other["by_kind"],
            moment=peak.name if peak else "not forecast",
            module=other["module"],
        )
    return Compared(
        name=name,
        forecast=forecast.peak_bytes,
        simulated=simulated["peak_bytes"],
        phases=phases,
        parameters=simulated["parameters"],
        seconds=row["seconds"],
        process_bytes=row["process_bytes"],
    )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _details(console: Any, case: Compared) -> None:
    """Phases of one case, each with the kinds that differ."""
    from rich.table import Table

    table = Table(title=f"{case.name}: MiB", title_justify="left")
    for heading in ("phase", "kind", "forecast", "simulated", "difference", "of the peak"):
        table.add_column(heading, justify="left" if heading in ("phase", "kind") else "right")
    for phase, found in case.phases.items():
        difference = found.forecast - found.simulated
        where = f"at {found.moment!r} / {found.module or 'no module'}"
        cells = (_mib(found.forecast), _mib(found.simulated), _mib(difference), f"{found.error:+.2%}")
        table.add_row(phase, f"[dim]{where}[/dim]", *cells, style="bold")
        for kind in dict.fromkeys([*found.simulated_kinds, *found.forecast_kinds]):
            ours, theirs = found.forecast_kinds.get(kind, 0), found.simulated_kinds.get(kind, 0)
            if ours != theirs:
                share = (ours - theirs) / max(found.simulated, 1)
                table.add_row("", kind, _mib(ours), _mib(theirs), _mib(ours - theirs), f"{share:+.2%}")
    console.print(table)


def _all_cases(console: Any, cases: Sequence[Compared]) -> None:
    from rich.table import Table

    table = Table(title="Peak of one rank: closed form against simulation")
    for heading in ("case", "forecast", "simulated", "error", "worst phase", "s", "process"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=heading != "case")
    for case in cases:
        worst = max(case.phases.items(), key=lambda each: abs(each[1].error))
        style = "red" if abs(case.error) > WORST_BOUND else "yellow" if abs(case.error) > MEDIAN_BOUND else None
        table.add_row(
            case.name,
            f"{case.forecast / 2**30:.3f} GiB",
            f"{case.simulated / 2**30:.3f} GiB",
            f"{case.error:+.2%}",
            f"{worst[0]} {worst[1].error:+.1%}",
            f"{case.seconds:.0f}",
            f"{case.process_bytes / 2**30:.1f} GiB",
            style=style,
        )
    console.print(table)


def _spread(errors: Iterable[float]) -> tuple[str, str, str]:
    """Median, ninth of ten, and largest of the absolute errors."""
    sizes = sorted(abs(error) for error in errors)
    return (
        f"{statistics.median(sizes):.2%}",
        f"{sizes[min(int(0.9 * len(sizes)), len(sizes) - 1)]:.2%}",
        f"{sizes[-1]:.2%}",
    )


def _summary(console: Any, cases: Sequence[Compared]) -> None:
    """Errors of the peak and of each phase; and, by kind, how much of the phases' peaks the differences are."""
    from rich.table import Table

    table = Table(title="Errors (absolute, relative to the simulation)")
    for heading in ("of", "cases", "median", "9 of 10", "worst"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    table.add_row("peak", str(len(cases)), *_spread(case.error for case in cases), style="bold")
    phases = dict.fromkeys(phase for case in cases for phase in case.phases)
    for phase in phases:
        found = [case.phases[phase] for case in cases if phase in case.phases]
        table.add_row(phase, str(len(found)), *_spread(each.error for each in found))
    for phase in phases:
        found = [case.phases[phase] for case in cases if phase in case.phases]
        for kind in dict.fromkeys(kind for each in found for kind in (*each.simulated_kinds, *each.forecast_kinds)):
            shares = [
                (each.forecast_kinds.get(kind, 0) - each.simulated_kinds.get(kind, 0)) / max(each.simulated, 1)
                for each in found
            ]
            if max(map(abs, shares)) >= 0.0005:
                table.add_row(f"{phase}: {kind}", str(len(found)), *_spread(shares), style="dim")
    console.print(table)


def print_comparison(compared: Sequence[Compared], *, details: bool) -> bool:
    """All cases, errors by phase and kind, and the bounds. Returns whether they are met."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    cases = [case for case in compared if case.failed is None]
    if details:
        for case in cases:
            _details(console, case)
    if cases:
        _all_cases(console, cases)
        _summary(console, cases)
    failed = [case for case in compared if case.failed is not None]
    for case in failed:
        told = str(case.failed).strip().splitlines()
        console.print(f"[red]failed[/red] {case.name}: {told[-1] if told else ''}", markup=True)
    if not cases:
        return False
    sizes = [abs(case.error) for case in cases]
    median, worst = statistics.median(sizes), max(sizes)
    large = [case for case in cases if case.is_large]
    slow = [case for case in large if case.seconds > SIMULATION_SECONDS or case.process_bytes > SIMULATION_BYTES]
    for case in slow:
        console.print(f"[red]too slow or large[/red] {case.name}: {case.seconds:.0f} s, {_mib(case.process_bytes)} MiB")
    passed = median <= MEDIAN_BOUND and worst <= WORST_BOUND and not failed and not slow
    console.print(
        f"{len(cases)} of {len(compared)} cases compared: median error of the peak {median:.2%} (allowed "
        f"{MEDIAN_BOUND:.0%}), worst {worst:.2%} (allowed {WORST_BOUND:.0%}); {len(large) - len(slow)} of {len(large)} "
        f"simulations of large models within {SIMULATION_SECONDS:.0f} s and {SIMULATION_BYTES / 2**30:.0f} GiB: "
        f"{'passed' if passed else 'not passed'}"
    )
    return passed
