"""Folders appear whole or not at all, whatever interrupts their writer."""

import os
from pathlib import Path

import pytest

from sparse_zero.checkpoint.checkpoint import read_checkpoint
from sparse_zero.checkpoint.folders import check_folder, moved_aside, new_folder, set_aside
from sparse_zero.errors import InputError


def write(folder, text: str) -> None:
    with new_folder(folder) as temporary:
        (temporary / "file").write_text(text)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "adapter"
    for text in ("one", "two"):
        write(folder, text)
        assert (folder / "file").read_text() == text
        check_folder(folder, "adapter")
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_inside_the_block_changes_nothing(tmp_path, error):
    folder = tmp_path / "adapter"
    write(folder, "one")
    with pytest.raises(type(error)), new_folder(folder) as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert (folder / "file").read_text() == "one"
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_error_in_either_rename_keeps_the_old_folder(tmp_path, monkeypatch, failing_call):
    folder = tmp_path / "adapter"
    write(folder, "one")
    real, calls = os.replace, 0

    def replace(source, target):
        nonlocal calls
        if str(source).startswith(str(tmp_path / ".adapter")) or str(source) == str(folder):
            calls += 1
            if calls == failing_call:
                raise OSError("no more renames")
        real(source, target)

    monkeypatch.setattr("sparse_zero.checkpoint.folders.os.replace", replace)
    with pytest.raises(OSError, match="no more renames"):
        write(folder, "two")
    assert (folder / "file").read_text() == "one"
    check_folder(folder, "adapter")
    assert names(tmp_path) == {"adapter"}


def test_what_a_killed_writer_left_is_cleared_or_put_back(tmp_path):
    folder = tmp_path / "merged"
    write(tmp_path / "elsewhere", "one")
    # Killed between the two renames: the old folder had been moved aside, the new one was not yet in place.
    os.replace(tmp_path / "elsewhere", tmp_path / ".merged.123.old")
    (tmp_path / ".merged.123.tmp").mkdir()
    (tmp_path / ".merged.123.tmp" / "file").write_text("half")
    with pytest.raises(RuntimeError, match="again"), new_folder(folder):
        assert (folder / "file").read_text() == "one"
        raise RuntimeError("again")
    assert names(tmp_path) == {"merged"}


def test_what_others_wrote_is_not_replaced(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="was not written by this program"):
        write(results, "adapter")
    with pytest.raises(InputError, match="was not written by this program"):
        write(results / "thesis.txt", "adapter")
    assert (results / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": {"file": {}}}', "no json"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    write(tmp_path / "adapter", "one")
    (tmp_path / "adapter" / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        check_folder(tmp_path / "adapter", "adapter")


def test_what_is_damaged_moves_aside_and_what_is_whole_stays(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    set_aside(folder)
    for number in (1, 2):
        folder.mkdir()
        (folder / "masters").write_text("x")
        set_aside(folder)
        assert (tmp_path / f"damaged-step-1.{number}" / "masters").is_file()
    with new_folder(folder) as temporary:
        (temporary / "masters").write_text("y")
    set_aside(folder)
    assert (folder / "masters").read_text() == "y"


def test_an_old_folder_that_a_killed_save_has_moved_aside_is_found(tmp_path: Path) -> None:
    folder, old = tmp_path / "ckpt", tmp_path / ".ckpt.12.old"
    assert moved_aside(folder) is None
    old.mkdir()
    assert moved_aside(folder) == old
    with pytest.raises(InputError, match=r"a save was killed while it replaced it; rename .*\.ckpt\.12\.old to it"):
        read_checkpoint(folder)
    folder.mkdir()
    assert moved_aside(folder) is None
