#!/usr/bin/env python3
"""What have studies and benchmarks shown? docs/results.md and a page of HTML, from saved numbers and nothing else.

  python scripts/results.py runs/studies/plateau runs/studies/words    take these in, then write the page
  python scripts/results.py runs/step.json                              the same of what --json of a benchmark wrote
  python scripts/results.py                                             write the page anew from docs/results/
  python scripts/results.py --check                                     is docs/results.md what it would be?

A study is a folder that scripts/accuracy_study.py or scripts/ntk_study.py has written, or its JSON. What is taken in
is that JSON: numbers, no prediction, no text of any data. Shipped studies without one are listed as not run. A
benchmark has the name of its JSON: step.json becomes bench-step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.plots import LIGHT, to_png
from scripts.benchmarking import exit_code
from scripts.report.page import markdown, pictures, write_html
from scripts.report.source import read_source, stored
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_bytes, atomic_write_json, atomic_write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
DEFAULT_HTML = Path("runs/results.html")


def run(options: argparse.Namespace) -> None:
    """Take in what is named, and write the pages."""
    if options.check and options.studies:
        raise InputError(f"--check takes in nothing, and {options.studies[0]} is named: leave out one of them")
    store: Path = options.docs / "results"
    for place in options.studies:
        found = read_source(place)
        atomic_write_json(store / f"{found.name}.json", found.content)
    sources = stored(store)
    text = markdown(sources)
    page = options.docs / "results.md"
    if options.check:
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            raise InputError(f"{page} is not what {store} gives: write it anew by python scripts/results.py")
        print(f"{page} is what {store} gives")
        return
    drawn = pictures(sources)
    for name, (_, draw) in drawn.items():
        atomic_write_bytes(options.docs / "pictures" / f"{name}.png", to_png(draw(LIGHT)))
    atomic_write_text(page, text)
    write_html(options.html, sources)
    print(f"{page}, {options.html}: {len(sources)} results, {len(drawn)} pictures in {options.docs / 'pictures'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("studies", nargs="*", type=Path, help="folders of studies, or JSON files, to take in")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results.md, results/ and pictures/ are")
    parser.add_argument("--html", type=Path, default=DEFAULT_HTML, help=f"the page of HTML (default: {DEFAULT_HTML})")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 where results.md is another")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
