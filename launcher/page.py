"""Which pieces is a page of HTML made of, that needs nothing but itself?"""

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import plots
from launcher.report_style import PAGE
from launcher.selection_tables import Sheet
from sparse_zero.files import atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """An HTML table whose first column names the row. Cells are plain text and are escaped here."""
    parts = ['<div class="scroll"><table>']
    if head:
        parts.append("<thead><tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr></thead>")
    parts.append("<tbody>")
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        parts.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "".join(parts) + "</tbody></table></div>"


def sheet_html(sheet: Sheet) -> str:
    """A table of numbers under its title, with its note below; sums stand out."""

    def cells(row: Sequence[str], tag: str) -> str:
        parts = []
        for number, cell in enumerate(row):
            text = escape(cell.lstrip(" ")).replace("\n", " ")
            indent = ' class="indented"' if cell.startswith(" ") and text else ""
            number_class = "" if number < sheet.num_words else ' class="number"'
            parts.append(f"<{tag}{indent or number_class}>{text}</{tag}>")
        return "".join(parts)

    body = ""
    for number, row in enumerate(sheet.rows):
        style = ' class="sum"' if number in sheet.sums else ""
        body += f"<tr{style}>{cells(row, 'td')}</tr>"
    head = f"<thead><tr>{cells(sheet.head, 'th')}</tr></thead>"
    below = note(sheet.note[:1].upper() + sheet.note[1:] + ".") if sheet.note else ""
    inner = f'<table class="sheet">{head}<tbody>{body}</tbody></table>'
    return f'<h3>{escape(sheet.title)}</h3><div class="scroll">{inner}</div>{below}'


def section(heading: str, body: str, *, identifier: str) -> str:
    """A part of the page; ``body`` is HTML."""
    return f'<section id="{identifier}"><h2>{escape(heading)}</h2>{body}</section>'


def note(text: str) -> str:
    """A remark in smaller, muted text."""
    return f'<p class="note">{escape(text)}</p>'


def picture(description: str, draw: Callable[[plots.Theme], "Figure"]) -> tuple[str, bytes]:
    """A picture for the page, in a light and a dark form, and the light one as PNG."""
    light, dark = plots.to_png(draw(plots.LIGHT)), plots.to_png(draw(plots.DARK))
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for png in (light, dark)]
    html = (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{escape(description)}"></picture>'
        f"<figcaption>{escape(description)}</figcaption></figure>"
    )
    return html, light


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write the page in one step."""
    atomic_write_text(path, PAGE.substitute(title=escape(title), sections="\n".join(sections)))
