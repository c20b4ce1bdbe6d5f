#!/usr/bin/env python3
"""Which settings has a run? docs/settings.md, from the dataclasses of its config and the comments of their fields.

python scripts/settings_page.py             write the page anew
python scripts/settings_page.py --check     is docs/settings.md what it would be?
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.config import RunConfig
from scripts.benchmarking import exit_code
from scripts.setting_fields import REQUIRED, Section, Setting, as_yaml, in_words, purpose, sections
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
_WIDTH = 120
_INTRODUCTION = """\
# Settings

Every setting of a run's YAML. The page is made from the code by `python scripts/settings_page.py`: what it says of a
setting is the comment above its field.

- A name is a path: `training.learning_rate` is the key `learning_rate` of the section `training`. On the command line
  it is `--training.learning_rate=1e-4`. A number is an entry of a list: `--selection.regions.0.block_size=64`.
- What is **required** has no default. All else may be left out, whole sections too.
- `null` is nothing. A number may be written `1e-4`. `yes` and `on` are words: write `true`.
- An unknown key is refused, and the nearest known one is named.
- `extends`, a file name or a list of them, may stand at the top of a file and of no section: what these files say is
  merged underneath. A file's name is relative to the file that says it; `configs/` composes its runs so.
- The file `config.yaml` of a run folder has every setting with its value.

[Sweeps](sweeps.md) and [studies](studies.md) have sections of their own besides."""


def page() -> str:
    """The text of docs/settings.md."""
    top, *rest = sections(RunConfig)
    parts = [_INTRODUCTION, _contents(top, rest), *(part for section in rest for part in _of_section(section))]
    return "\n\n".join(parts) + "\n"


def _contents(top: Section, rest: Sequence[Section]) -> str:
    """The sections and those inside them, each with a link."""
    rows = []
    for setting in top.settings:
        inner = [section for section in rest if section.places[0].startswith(f"{setting.name}.")]
        links = "; ".join(_link(section) for section in inner)
        needed = "yes" if setting.default is REQUIRED else ""
        rows.append([f"[{setting.name}](#{setting.name})", _text(setting.meaning), needed, links])
    return _table(("section", "what it holds", "needed", "inside it"), rows)


def _of_section(section: Section) -> list[str]:
    """Heading, purpose and table."""
    heading = "###" if "." in section.places[0] else "##"
    text = _text(purpose(section.kind))
    if section.is_list:
        text += "\n\nA list; these are the settings of each entry."
    paragraphs = [textwrap.fill(each, _WIDTH, break_on_hyphens=False) for each in text.split("\n\n")]
    rows = [
        [f"`{each.name}`", in_words(each.annotation), _default(each), _text(each.meaning)] for each in section.settings
    ]
    table = _table(("setting", "type", "default", "meaning"), rows)
    return [f"{heading} {_title(section)}", *paragraphs, table]


def _title(section: Section) -> str:
    first, *others = section.places
    return ", ".join([first, *(place.rpartition(".")[2] for place in others)])


def _link(section: Section) -> str:
    title = _title(section)
    # As GitHub makes anchors of headings.
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title.partition('.')[2]}](#{anchor})"


def _default(setting: Setting) -> str:
    if setting.default is REQUIRED:
        return "**required**"
    # The settings inside say theirs.
    if isinstance(setting.default, setting.section or ()):
        return ""
    return f"`{as_yaml(setting.default)}`"


def _text(text: str) -> str:
    """A text of the code as Markdown: signs outside of its code mean themselves, Python's constants are YAML's."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*|<~])", r"\\\1", piece) for piece in pieces[::2]]
    as_constant = {"None": "`null`", "True": "`true`", "False": "`false`"}
    # As a value that is explained: not every "None" is one.
    return re.sub(r"\b(None|True|False)\b(?=:| for both)", lambda found: as_constant[found[0]], "`".join(pieces))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def run(options: argparse.Namespace) -> None:
    """Write the page, or compare it."""
    path: Path = options.page
    if not options.check:
        atomic_write_text(path, page())
        print(f"{path}: {sum(len(section.settings) for section in sections(RunConfig))} settings")
        return
    if not path.is_file() or path.read_text(encoding="utf-8") != page():
        raise InputError(f"{path} is not what the code gives: write it anew by python scripts/settings_page.py")
    print(f"{path} is what the code gives")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 where the page is another, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (default: docs/settings.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 where the page is another")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
