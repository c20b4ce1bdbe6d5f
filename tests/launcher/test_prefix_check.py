"""Is a run refused that cannot have the frozen-prefix cache that it asks for, before anything is written?"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import prefix_check
from launcher.config import RunConfig, parse_config
from launcher.prefix_caching import PrefixCacheWarning, _remove, _take_folder, remove_left_cache
from launcher.prefix_check import FORMAT, META, check_prefix_cache, reserve_bytes
from launcher.run_folder import RunFolder, RunLock
from launcher.world import World
from sparse_zero.errors import InputError
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES


def make(place: Path, batching: str = "pad", **cache: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": "model"},
            "data": {"train": "train.json", "batching": batching},
            "selection": {"regions": [{"kind": "row", "modules": ["*.q_proj"], "per_matrix": 1}]},
            "training": {"steps": 2, "prefix_cache": cache},
            "zero": {},
            "output": {"folder": str(place / "run")},
        }
    )


def dropping_llama() -> Any:
    model = tiny_llama()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    return model


WORLD = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), launcher="none")
# No disk has room for so many tokens.
MANY = (10**15,)


@pytest.mark.parametrize(
    ("make_model", "lengths", "settings", "says"),
    [
        (tiny_llama, MANY, {}, ("1,000,000,000,000,000 tokens of 256 bytes", "max_gib", "float8")),
        (tiny_llama, MANY, {"dtype": "float8"}, ("tokens of 68 bytes",)),
        (dropping_llama, (3,), {}, ("model.layers.0.self_attn.attention_dropout = 0.1", "set it to 0")),
        (FAMILIES["mamba"].make, (3,), {}, ("mamba models", "leave training.prefix_cache out")),
        (tiny_llama, (3,), {"folder": __file__}, ("training.prefix_cache.folder is", "is a file")),
    ],
)
def test_what_cannot_be_is_refused(make_model, lengths, settings, says, tmp_path):
    with pytest.raises(InputError) as error:
        check_prefix_cache(make(tmp_path, **settings), make_model(), lengths)
    assert all(each in str(error.value) for each in says), str(error.value)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rank-00000.bin", "rank-00017.done"])
def test_files_of_something_else_are_refused_and_stay(name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(b"shards of a data set")
    config = make(tmp_path, folder=str(folder))
    with pytest.raises(InputError, match=f"has no meta.json but {name}.* of something else: name another folder"):
        check_prefix_cache(config, tiny_llama(), (3,))
    with pytest.raises(InputError, match="of something else"):
        _take_folder(folder, {"format": FORMAT})
    assert [path.read_bytes() for path in folder.iterdir()] == [b"shards of a data set"]
    # Of the cache itself, what a killed start has left half removed is gone on with.
    (folder / META).write_text('{"format": "' + FORMAT + '", "layers": 1}')
    check_prefix_cache(config, tiny_llama(), (3,))
    with pytest.warns(PrefixCacheWarning, match="of another layers: it is thrown away"):
        _take_folder(folder, {"format": FORMAT, "layers": 2})
    assert [path.name for path in folder.iterdir()] == [META]


def test_a_reserve_of_the_disk_is_asked_for(tmp_path, monkeypatch):
    config, total = make(tmp_path), shutil.disk_usage(tmp_path).total
    assert 2**30 <= reserve_bytes(config) <= max(2**30, total * 0.05)
    other = Path("/dev/shm")
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
        assert reserve_bytes(make(tmp_path, folder=str(other / "not-there"))) == 2**26
    monkeypatch.setattr(prefix_check, "_LEAST_RESERVE", 2**60)
    with pytest.raises(InputError, match=r"needs 768 B.* and leaves .* free, and .* has"):
        check_prefix_cache(config, tiny_llama(), (3,))


@pytest.mark.parametrize(
    ("changes", "is_on", "stays"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"keep": True}, False, True),
        ({"folder": "elsewhere"}, True, False),
        (None, False, False),
    ],
)
def test_what_an_earlier_start_has_left_is_removed_at_the_end(changes, is_on, stays, tmp_path):
    config = make(tmp_path, **(changes or {}))
    if changes is None:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, prefix_cache=None))
    folder = RunFolder(config.output.folder).prefix_cache
    folder.mkdir(parents=True)
    (folder / META).write_text('{"format": "' + FORMAT + '"}')
    (folder / "rank-00000.bin").touch()
    remove_left_cache(config, dataclasses.replace(WORLD, keepers=(1,)), is_on=is_on)
    assert folder.exists()
    remove_left_cache(config, WORLD, is_on=is_on)
    assert folder.exists() == stays


def test_what_is_not_the_runs_own_or_is_in_use_stays_and_is_said(tmp_path):
    config = make(tmp_path)
    folder = RunFolder(config.output.folder).prefix_cache
    folder.mkdir(parents=True)
    (folder / "rank-00000.bin").touch()
    with pytest.warns(PrefixCacheWarning, match="prefix_cache stays: .*of something else"):
        remove_left_cache(config, WORLD, is_on=False)
    (folder / META).write_text('{"format": "' + FORMAT + '"}')
    with RunLock(folder) as lock:
        lock.take()
        with pytest.warns(PrefixCacheWarning, match="prefix_cache stays: .*in use by another run"):
            remove_left_cache(config, WORLD, is_on=False)
    assert len(list(folder.iterdir())) == 2


def test_what_cannot_be_removed_is_said(tmp_path):
    (tmp_path / "rank-00000.bin").mkdir()  # Cannot be unlinked.
    with pytest.warns(PrefixCacheWarning, match="cannot be removed .*delete it by hand"):
        _remove(tmp_path)
    assert (tmp_path / "rank-00000.bin").is_dir()


def test_what_can_be_is_not(tmp_path):
    check_prefix_cache(make(tmp_path), tiny_llama(), (3, 4))
    check_prefix_cache(make(tmp_path, max_gib=0.001), tiny_llama(), (3, *MANY))
    check_prefix_cache(make(tmp_path), FAMILIES["bloom"].make(), (3,))
    assert not any(tmp_path.iterdir())
