"""How do the results of all studies and benchmarks become one page of Markdown and one of HTML?"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from launcher.page import note, picture, section, table, write_page
from scripts.accuracy.study_plots import Drawing
from scripts.report.source import Source, shipped_studies


def pictures(sources: Sequence[Source]) -> dict[str, tuple[str, Drawing]]:
    """Of all of them, by the names of their files."""
    return {name: each for source in sources for name, each in source.pictures().items()}


def _question(source: Source) -> str:
    return source.question() or shipped_studies().get(source.name, source.name)


def _not_run(sources: Sequence[Source]) -> list[tuple[str, str]]:
    known = {source.name for source in sources}
    return [(name, question) for name, question in shipped_studies().items() if name not in known]


def markdown(sources: Sequence[Source]) -> str:
    """The page for the documents; pictures stand beside it in ``pictures/``."""
    lines = [
        "# Results",
        "",
        "<!-- made by `python scripts/results.py` from docs/results/: change nothing here -->",
        "",
        "Every number here is from the JSON of a study or a benchmark in `docs/results/`, and nothing else is",
        "claimed. Beside each stand its command, the machine and the versions; [studies](studies.md) and",
        "[benchmarks](speed/benchmarks.md) say how they are run and read.",
        "",
    ]
    for source in sources:
        lines += [f"## {source.name}", "", _question(source), "", *source.words().split("\n"), ""]
        for each in source.tables():
            lines += ["#" + each.markdown()]
        for name, (what, _) in source.pictures().items():
            lines += [f"![{what}](pictures/{name}.png)", ""]
        lines += [f"{source.made()}.", ""]
    left = _not_run(sources)
    if left:
        lines += ["## Not run", "", "These studies have a config in `configs/studies/`, and no result here:", ""]
        lines += [f"- `{name}`: {question}" for name, question in left] + [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def write_html(path: Path, sources: Sequence[Source]) -> None:
    """The same as one page with nothing beside it."""
    sections = []
    for source in sources:
        body = f"<p>{escape(_question(source))}</p>"
        for each in source.tables():
            body += f"<h3>{escape(each.title)}</h3>{table(each.rows, head=each.headings)}"
        body += "".join(picture(what, draw)[0] for what, draw in source.pictures().values())
        body += "".join(note(text) for text in (*source.words().split("\n\n"), source.made()))
        sections.append(section(source.name, body, identifier=source.name))
    left = _not_run(sources)
    if left:
        sections.append(section("Not run", table(left, head=("study", "question")), identifier="not-run"))
    write_page(path, "Results of the studies", sections)
