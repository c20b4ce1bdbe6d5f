"""Does a reader find the old file or the new one, never a part?"""

import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_zero.errors import InputError
from sparse_zero.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_json,
    read_safetensors,
    to_json,
    write_safetensors,
)


def test_writing_replaces_and_creates_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    atomic_write_text(path, "one\nä\r\n")
    assert path.read_bytes() == "one\nä\r\n".encode()
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_files_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_json_has_null_for_what_it_cannot_say(tmp_path: Path) -> None:
    value = {
        "a": math.nan,
        "b": [math.inf, 1, True, None],
        3: np.float32(0.5),
        "n": np.int64(7),
        "s": ("ä", -math.inf),
    }
    assert to_json(value) == '{"a": null, "b": [null, 1, true, null], "3": 0.5, "n": 7, "s": ["ä", null]}'
    atomic_write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json")["b"] == [None, 1, True, None]
    with pytest.raises(TypeError, match="object is no JSON value"):
        to_json({"a": object()})


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"{", "no valid JSON"), (b"\xff", "no valid JSON")]
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.json .*{message}|x\.json is {message}"):
        read_json(path)


def test_safetensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.zeros(0, dtype=torch.bfloat16)}
    write_safetensors(path, tensors, {"format": "test", "more": "ä"})
    loaded, metadata = read_safetensors(path, "test")
    assert metadata == {"format": "test", "more": "ä"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_what_was_read_of_safetensors_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(10_000)}, {"format": "test"})
    loaded, _ = read_safetensors(path, "test")
    with path.open("r+b") as file:
        file.seek(-40_000, 2)
        file.write(bytes(40_000))
    assert bool((loaded["a"] == 1.0).all())
    # A view of the mapped file would end the process here.
    path.write_bytes(b"")
    assert bool((loaded["a"] == 1.0).all())


def test_safetensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        read_safetensors(path, "test")
    write_safetensors(path, {"a": torch.zeros(100)}, {"format": "test"})
    with pytest.raises(InputError, match="has format 'test', not 'other'"):
        read_safetensors(path, "other")
    whole = path.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is no complete safetensors file"):
            read_safetensors(path, "test")
