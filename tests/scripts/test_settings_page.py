"""Does the page of settings have every setting of a run, as the code has it?"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from launcher.config import RunConfig, _all_keys
from launcher.yaml_files import parse_yaml
from scripts import settings_page
from scripts.setting_fields import REQUIRED, as_yaml, comments, in_words, sections, settings_of

SETTINGS = {setting.name: setting for section in sections(RunConfig) for setting in section.settings}


def test_the_page_of_the_documents_is_what_the_code_gives() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "python scripts/settings_page.py"


def test_every_setting_is_on_the_page() -> None:
    names = set(_all_keys(RunConfig, ()))
    assert set(SETTINGS) == names
    shown = re.findall(r"^\| `([\w.]+)` \| ", settings_page.page(), re.M)
    assert len(shown) == len(set(shown))
    # The sections of the top have no row of a setting.
    assert set(shown) == {name for name in names if "." in name}


def test_every_setting_has_a_meaning() -> None:
    assert [name for name, setting in SETTINGS.items() if not setting.meaning] == []


def test_defaults_can_be_pasted() -> None:
    values = [setting for setting in SETTINGS.values() if setting.default is not REQUIRED]
    for setting in values:
        if not isinstance(setting.default, setting.section or ()):
            read = parse_yaml(as_yaml(setting.default), setting.name)
            assert read == (list(setting.default) if isinstance(setting.default, tuple) else setting.default)
            assert type(read) is type(setting.default) or isinstance(setting.default, tuple)


def test_tables_are_whole() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", settings_page.page(), re.M)
    assert len(tables) == len(list(sections(RunConfig)))
    for table in tables:
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {5}


def test_check_says_where_the_page_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.md"
    assert settings_page.main(["--check", "--page", str(path)]) == 2
    assert settings_page.main(["--page", str(path)]) == 0
    assert settings_page.main(["--check", "--page", str(path)]) == 0
    path.write_text("other")
    assert settings_page.main(["--check", "--page", str(path)]) == 2
    assert path.read_text() == "other"
    assert "write it anew by python scripts/settings_page.py" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class _Inner:
    """Inside."""

    # Seconds.
    wait: float


@dataclass(frozen=True, kw_only=True)
class _Outer:
    """Two of one kind, and a list."""

    # One line
    # and another.
    first: _Inner | None = None
    second: _Inner | None = None
    # Of them.
    many: tuple[_Inner, ...] = field(default=())  # Not this.


def test_a_meaning_is_the_comment_above() -> None:
    assert comments(_Outer) == {"first": "One line and another.", "second": "", "many": "Of them."}
    top, pair, entries = sections(_Outer)
    assert [setting.section for setting in top.settings] == [_Inner] * 3
    assert pair.places == ("first", "second")
    assert [setting.name for setting in pair.settings] == ["first.wait", "second.wait"]
    assert [setting.name for setting in entries.settings] == ["many.0.wait"]
    assert [(each.default, each.meaning) for each in settings_of(_Inner, "")] == [(REQUIRED, "Seconds.")]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "integer or `null`"),
        (str | dict[str, Any] | None, "text, mapping or `null`"),
        (Literal["auto", True, False], "`auto`, `true` or `false`"),
        (Literal[2, 3], "`2` or `3`"),
        (tuple[str, ...] | None, "list of texts or `null`"),
        (tuple[_Inner, ...], "list of mappings"),
    ],
)  # fmt: skip
def test_types_are_in_words(annotation: Any, words: str) -> None:
    assert in_words(annotation) == words
