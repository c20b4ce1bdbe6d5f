"""Do the documents name what is there: files, pages, headings, and names of Python; and do their short snippets run?

The snippets of docs/integrations.md and docs/precision.md run in tests/integrations/test_docs.py, those of docs/adapters.md
in tests/integrations/test_peft.py.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from tests.models.tiny import CORPUS, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("launcher", "models", "scripts", "sparse_zero")
# Paths as a checkout has them.
_PATH = re.compile(r"(?<![\w./~<-])(?:configs|docs|launcher|models|scripts|sparse_zero|tests)/[\w./*{},-]*")
_CODE = re.compile(r"```.*?```|`[^`]+`", re.S)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return _CODE.sub("", text)


def alternatives(path: str) -> Iterator[str]:
    """A path with {a,b} as several."""
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        yield path
        return
    for choice in found[1].split(","):
        yield from alternatives(path[: found.start()] + choice + path[found.end() :])


def missing_paths(text: str) -> list[str]:
    """Paths of the checkout that the code of a page names, and that are not there; NAME in one stands for any name."""
    found = [path.rstrip(".,") for code in _CODE.findall(text) for path in _PATH.findall(code)]
    each = dict.fromkeys(alternative for path in found for alternative in alternatives(path))
    return [path for path in each if not re.search(r"[A-Z]{3,}", path) and not any(ROOT.glob(path))]


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links and pictures of a page that lead to no file, or to no heading, of the checkout."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            found.append(target)
    return found


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.M | re.S)


def missing_names(code: str) -> list[str]:
    """What a snippet takes from the project, and is not there."""
    tree = ast.parse(code)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sz":
            found += [] if hasattr(sz, node.attr) else [f"sz.{node.attr}"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            module = importlib.import_module(node.module or "")
            found += [f"{node.module}.{each.name}" for each in node.names if not hasattr(module, each.name)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_links_are_there(page: Path) -> None:
    assert missing_paths(read(page)) == []
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_snippets_name_what_is_there(page: Path) -> None:
    for code in snippets(page):
        assert missing_names(code) == [], code


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    text = "`scripts/{bench,gone}.py` and `python scripts/bench_*.py`, `tests/NAME.py`, (`models/*.gone`)\n```\ndocs/gone.md\n```"
    assert missing_paths(text) == ["scripts/gone.py", "models/*.gone", "docs/gone.md"]
    page = tmp_path / "page.md"
    page.write_text(
        "# A word: two\n[1](#a-word-two) [2](#gone) [3](gone.md) [4](page.md#a-word-two) [5](https://a.b) `[6](g)`"
    )
    assert broken_links(page) == ["#gone", "gone.md"]
    assert missing_names("import sparse_zero as sz\nfrom models.data import gone\nsz.select, sz.gone") == [
        "models.data.gone", "sz.gone",
    ]  # fmt: skip


# --- snippets that take no ranks and no seconds ----------------------------------------------------------------------


def only_snippet(page: str) -> str:
    (code,) = snippets(ROOT / "docs" / page)
    return code


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("\n".join(CORPUS))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny_llama(layers=1), "tokenizer": tiny_tokenizer()}
    exec(only_snippet("data.md"), names)
    assert capsys.readouterr().out.split() == [str(names["found"].loss), str(names["found"].num_labels)]


def test_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "score_of_the_page.py").write_text(only_snippet("selection.md"))
    monkeypatch.syspath_prepend(tmp_path)
    region = sz.RegionConfig(kind="row", modules=("*.q_proj",), per_matrix=2)
    config = sz.SelectionConfig(regions=(region,), score="score_of_the_page:signal_to_noise")
    tokens = torch.arange(3, 27).reshape(2, 12)
    selection = sz.select(tiny_llama(layers=2), [{"input_ids": tokens, "labels": tokens}], config)
    assert selection.num_parameters == 2 * 2 * 64


def test_a_step_within_backward() -> None:
    model = tiny_llama(layers=2)
    region = sz.RegionConfig(kind="row", modules=("*.q_proj",), per_matrix=2)
    sz.sparsify(model, sz.select(model, None, sz.SelectionConfig(regions=(region,), score="magnitude")))
    before = {name: value.detach().clone() for name, value in sz.trainable_parameters(model).items()}
    tokens = torch.arange(3, 27).reshape(2, 12)
    names: dict[str, Any] = {
        "sz": sz, "torch": torch, "model": model, "batches": [tokens] * 2,
        "loss_of": lambda model, batch: model(input_ids=batch, labels=batch).loss,
    }  # fmt: skip
    exec(only_snippet("speed/around_the_step.md"), names)
    assert not any(torch.equal(value, before[name]) for name, value in sz.trainable_parameters(model).items())
