"""How is a table of numbers shown: in a terminal, and in a Markdown file?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first columns are words, aligned left, the others numbers, aligned right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_words: int = 1

    def part(self, title: str, columns: Sequence[int]) -> Table:
        """Some of the columns, such as ``[0, 3]``, under a title of their own; the first is of words."""
        rows = [[row[column] for column in columns] for row in self.rows]
        return Table(title, [self.headings[column] for column in columns], rows)

    def markdown(self) -> str:
        """As a section of a Markdown file."""
        line = "|---" * self.num_words + "|---:" * (len(self.headings) - self.num_words) + "|"
        rows = ["| " + " | ".join(map(_one_line, row)) + " |" for row in (self.headings, *self.rows)]
        return "\n".join([f"## {self.title}", "", rows[0], line, *rows[1:], ""])

    def show(self) -> None:
        """Into the terminal; 140 wide where there is none."""
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, box=SIMPLE, padding=(0, 1, 0, 0))
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if number < self.num_words else "right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def _one_line(cell: str) -> str:
    """A cell that is broken for a terminal, as Markdown can have it."""
    return cell.replace("-\n", "-").replace("\n", " ")
