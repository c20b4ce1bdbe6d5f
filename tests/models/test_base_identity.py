"""Is a base model named by the content of its files, quickly and whatever the cache holds?"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from models.base_identity import base_identity, begin_base_identity, default_hash_cache
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model.safetensors").write_bytes(b"weights")
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes.json"


def test_hash_is_over_sorted_names_and_hashes(folder: Path, cache: Path) -> None:
    lines = [
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    expected = BaseIdentity(name="model", sha256=hashlib.sha256("".join(lines).encode()).hexdigest())
    assert base_identity(folder, cache=cache) == expected
    assert base_identity(folder, cache=cache) == expected, "the second time from the cache"


def test_hash_follows_content_not_place(folder: Path, cache: Path, tmp_path: Path) -> None:
    before = base_identity(folder, cache=cache).sha256
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "tokenizer.json").write_text("{}")
    assert base_identity(moved, cache=cache).sha256 == before
    (moved / "config.json").write_text('{"model_type": "qwen2"}')
    assert base_identity(moved, cache=cache).sha256 != before


def test_changed_weights_of_the_same_size_are_noticed(folder: Path, cache: Path) -> None:
    before = base_identity(folder, cache=cache).sha256
    weights = folder / "model.safetensors"
    changed = weights.stat().st_mtime_ns + 1
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(changed, changed))
    assert base_identity(folder, cache=cache).sha256 != before


def test_cache_is_used(folder: Path, cache: Path) -> None:
    base_identity(folder, cache=cache)
    known = json.loads(cache.read_text())
    assert len(known) == 2
    cache.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    lines = "".join(f"{name} {'0' * 64}\n" for name in ("config.json", "model.safetensors"))
    assert base_identity(folder, cache=cache).sha256 == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("content", ["", "{broken", "[]", '{"a": 3}', "\x00\x01"])
def test_broken_cache_is_replaced(folder: Path, cache: Path, tmp_path: Path, content: str) -> None:
    expected = base_identity(folder, cache=tmp_path / "other.json")
    cache.parent.mkdir()
    cache.write_text(content)
    assert base_identity(folder, cache=cache) == expected
    assert len(json.loads(cache.read_text())) == 2


def test_cache_that_cannot_be_written_is_not_used(folder: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert base_identity(folder, cache=blocker / "hashes.json").name == "model"


def test_default_cache_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_hash_cache() == tmp_path / ".cache/sparse_zero/hashes.json"


def test_hub_snapshot_has_the_hub_name(folder: Path, cache: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny-model" / "snapshots" / "0a1b2c"
    blobs = tmp_path / "models--owner--tiny-model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    found = base_identity(snapshot, cache=cache)
    assert found.name == "owner/tiny-model"
    assert found.sha256 == base_identity(folder, cache=cache).sha256


def test_shards_and_gguf(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(b"more")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = base_identity(folder, cache=cache)
    (folder / "q.gguf").write_bytes(b"GGUF")
    assert base_identity(folder, cache=cache) == sharded
    assert base_identity(folder, "q.gguf", cache=cache) != sharded


def test_folder_without_weights_is_refused(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        base_identity(folder, cache=cache)
    assert not cache.exists()


def test_begun_beside_other_work(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait before it is asked; then it tells, or raises, each time."""
    go = threading.Event()
    digest = hashlib.file_digest

    def slow(*given: Any) -> Any:
        assert go.wait(10.0)
        return digest(*given)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    wait = begin_base_identity(folder, cache=cache)
    assert not cache.exists()
    go.set()
    assert wait() == wait() == base_identity(folder, cache=cache)
    wait = begin_base_identity(folder.with_name("missing"), cache=cache)
    for _ in range(2):
        with pytest.raises(InputError, match="missing"):
            wait()
