"""What does the page of results tell of a benchmark?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.accuracy.study_plots import Drawing
from scripts.benchmarks.results import BenchmarkResult, read_benchmark
from scripts.benchmarks.tables import Table


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """See :class:`scripts.report.source.Source`."""

    name: str
    content: Mapping[str, Any]

    @property
    def _found(self) -> BenchmarkResult:
        return read_benchmark(self.content)

    def question(self) -> str:
        """What the script asks."""
        return self._found.question

    def words(self) -> str:
        """Its remarks, each a sentence."""
        return "\n\n".join(f"{each[:1].upper()}{each[1:]}." for each in self._found.remarks)

    def tables(self) -> list[Table]:
        """As the script has shown them."""
        return list(self._found.tables)

    def pictures(self) -> dict[str, tuple[str, Drawing]]:
        """The one that it drew."""
        chart = self._found.chart
        return {} if chart is None else {self.name: (chart.heading, chart.draw)}

    def made(self) -> str:
        """Command, machine and versions."""
        machine = self._found.machine
        told = [machine["cpu"], f"{machine['cores']} cores", *([machine["gpu"]] if "gpu" in machine else [])]
        told += [f"Python {machine['python']}", f"torch {machine['torch']}"]
        return f"`{self._found.command}`; {', '.join(told)}"
