"""What does a benchmark leave? Its tables in the terminal, and one JSON, from which the page of results is made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.plots import LIGHT, Theme
from scripts.benchmarking import machine
from scripts.benchmarks.plots import draw_bars, draw_budget, save_png
from scripts.benchmarks.ratios import Ratio
from scripts.benchmarks.tables import Table
from scripts.commands import of_this_machine
from sparse_zero.files import atomic_write_json, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "sparse_zero.benchmark"
# Where the numbers go is no part of what is measured.
_OUTPUTS = ("--json", "--plot")


@dataclass(frozen=True)
class Chart:
    """A picture as its numbers: ``bars`` of :func:`draw_bars`, or ``budget`` of :func:`draw_budget`."""

    kind: str
    heading: str
    numbers: Mapping[str, Any]

    def draw(self, theme: Theme) -> Figure:
        """The picture in the colours of ``theme``."""
        if self.kind == "bars":
            ratios = {name: Ratio(**each) for name, each in self.numbers["ratios"].items()}
            groups, floor = self.numbers["groups"], self.numbers["floor"]
            return draw_bars(ratios, groups=groups, heading=self.heading, floor=floor, theme=theme)
        return draw_budget(self.numbers["points"], self.heading, theme=theme)


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What a benchmark has found, for people and for files."""

    question: str
    command: str
    settings: Mapping[str, Any]
    machine: Mapping[str, str]
    tables: Sequence[Table]
    remarks: Sequence[str] = ()
    chart: Chart | None = None
    # By names of the benchmark's own: what the tables were made of, such as all raw seconds.
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """As it is written; the numbers stand beside the rest."""
        told = {"format": FORMAT, **{name: each for name, each in asdict(self).items() if name != "numbers"}}
        clash = told.keys() & self.numbers.keys()
        assert not clash, f"{sorted(clash)} have names of what every benchmark writes"
        # As they are read again: without tuples, and with names for keys.
        written: dict[str, Any] = json.loads(to_json({**told, **self.numbers}))
        return written

    def show(self) -> None:
        """Into the terminal."""
        for table in self.tables:
            table.show()
        if self.remarks:
            print("\n".join(self.remarks))


def read_benchmark(content: Mapping[str, Any]) -> BenchmarkResult:
    """What :meth:`BenchmarkResult.content` has given."""
    names = [each.name for each in fields(BenchmarkResult) if each.name != "numbers"]
    known = {name: content[name] for name in names}
    known["tables"] = [Table(**each) for each in known["tables"]]
    known["chart"] = None if known["chart"] is None else Chart(**known["chart"])
    numbers = {name: each for name, each in content.items() if name not in names and name != "format"}
    return BenchmarkResult(**known, numbers=numbers)


def command_of(script: str, arguments: Sequence[str]) -> str:
    """What repeats a benchmark: ``python scripts/NAME.py`` and its flags, but not where the numbers went."""
    words, given = [], iter(arguments)
    for word in given:
        name, joined, _ = word.partition("=")
        if name in _OUTPUTS:
            if not joined:
                next(given, None)
            continue
        words.append(of_this_machine(word))
    return " ".join(["python", f"scripts/{Path(script).name}", *words])


def finish(
    options: argparse.Namespace,
    *,
    script: str,
    doc: str | None,
    settings: Any,
    tables: Sequence[Table],
    numbers: Mapping[str, Any],
    remarks: Sequence[str] = (),
    chart: Chart | None = None,
) -> None:
    """Show what was found, and write what ``--json`` and ``--plot`` ask for.

    Args:
        options: of :func:`scripts.benchmarking.parse_flags`.
        script: ``__file__`` of the benchmark.
        doc: its docstring, whose first sentence is the question.
        settings: a dataclass.
        tables: for the terminal and the page.
        numbers: all that the tables were made of.
        remarks: what a reader of the tables must know.
        chart: what ``--plot`` draws.
    """
    found = BenchmarkResult(
        question=(doc or "").strip().splitlines()[0],
        command=command_of(script, options.given),
        settings=asdict(settings),
        machine=machine(),
        tables=tables,
        remarks=remarks,
        chart=chart,
        numbers=numbers,
    )
    found.show()
    if options.json is not None:
        atomic_write_json(options.json, found.content())
    if chart is not None and options.plot is not None:
        save_png(chart.draw(LIGHT), options.plot)
