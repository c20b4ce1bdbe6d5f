"""What does the page of results tell of an accuracy study?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.accuracy.study_plots import Drawing, drawings
from scripts.accuracy.study_tables import made_on, protocol_text, tables_of
from scripts.benchmarks.tables import Table


@dataclass(frozen=True, kw_only=True)
class AccuracyStudy:
    """See :class:`scripts.report.source.Source`."""

    name: str
    content: Mapping[str, Any]

    def question(self) -> str:
        """What the study asks."""
        return str(self.content.get("question") or "")

    def words(self) -> str:
        """Its protocol, and remarks."""
        return protocol_text(self.content)

    def tables(self) -> list[Table]:
        """One for each task."""
        return tables_of(self.content)

    def pictures(self) -> dict[str, tuple[str, Drawing]]:
        """Those that its numbers can fill."""
        return {f"{self.name}-{name}": each for name, each in drawings(self.content).items()}

    def made(self) -> str:
        """Command, machine and versions."""
        return f"`{self.content['command']}`; {made_on(self.content)}"
