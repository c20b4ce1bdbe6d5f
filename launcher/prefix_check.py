"""Can a run keep the output of its lowest layers, and is there room for it?"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.run_folder import RunFolder, check_can_write_in
from launcher.summary import format_bytes
from models.families import is_known
from sparse_zero.errors import InputError
from sparse_zero.files import read_json
from sparse_zero.layers.quantized import dtype_of
from sparse_zero.prefix.config import PrefixCacheConfig
from sparse_zero.prefix.encoding import bytes_per_token
from sparse_zero.prefix.layers import layer_list, random_setting
from sparse_zero.prefix.store import num_storable, rank_files, stored_bytes

# What says whose the files in a folder are: written before the first of them, and removed after the last.
META, FORMAT = "meta.json", "sparse_zero prefix cache 1"
# What the cache leaves of the disk that checkpoints, metrics and logs go to, too: a share, but no less than the one and
# no more than the other, which is much on any disk. Of another disk: what keeps a system well that has its memory or
# its temporary files there.
_RESERVE_SHARE, _LEAST_RESERVE, _MOST_RESERVE, _OTHER_RESERVE = 0.05, 2**30, 100 * 2**30, 64 * 2**20


def cache_folder(config: RunConfig) -> Path:
    """Where the hidden states of a run lie."""
    assert config.training.prefix_cache is not None
    named = config.training.prefix_cache.folder
    return RunFolder(config.output.folder).prefix_cache if named is None else Path(named).expanduser()


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What the cache in ``folder`` is of; None where there is none, and nothing that is in the way of one.

    Raises:
        InputError: there are files of somebody else.
    """
    given = f"training.prefix_cache.folder is {folder}"
    path = folder / META
    if path.exists():
        found: Any = None
        with suppress(InputError):
            found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{given}, where {META} is of something else: name another folder")
        return found
    names = rank_files(folder)
    if names:
        raise InputError(
            f"{given}, which has no {META} but {names[0]}, so {len(names)} such file(s) are of something else: name "
            "another folder"
        )
    return None


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())


def reserve_bytes(config: RunConfig) -> int:
    """What the cache leaves free of the disk of its folder; see the top of this file."""
    existing, of_run = _existing(cache_folder(config)), _existing(Path(config.output.folder))
    if existing.stat().st_dev != of_run.stat().st_dev:
        return _OTHER_RESERVE
    share = int(shutil.disk_usage(existing).total * _RESERVE_SHARE)
    return max(_LEAST_RESERVE, min(share, _MOST_RESERVE))


def token_bytes(cache: PrefixCacheConfig, model: Any) -> int:
    """What one token of the training data takes."""
    return bytes_per_token(int(model.config.hidden_size), cache.dtype, dtype_of(model))


def check_not_random(model: Any, num_layers: int) -> None:
    """Raise if the lowest layers, or what comes before them, are random in training.

    Raises:
        InputError: names the setting.
    """
    random = random_setting(model, num_layers)
    if random is not None:
        raise InputError(
            f"training.prefix_cache is set, but the model has {random}, which makes its lowest layers give something "
            "else in every epoch: leave training.prefix_cache out, or set it to 0 in the model's config.json"
        )


def check_prefix_cache(config: RunConfig, model: Any, lengths: Sequence[int]) -> None:
    """Raise if the run cannot have the cache that it asks for. Nothing is written.

    Args:
        config: of the run.
        model: its base, before anything is trained.
        lengths: tokens of each training sample.

    Raises:
        InputError: the layers of the model are not known, or are random in training, the folder is of something else,
            or the disk is too small.
    """
    cache = config.training.prefix_cache
    if cache is None:
        return
    if not is_known(model):
        raise InputError(
            f"training.prefix_cache is set, but of {model.config.model_type} models it is not known whether their "
            "layers hand on nothing but hidden states: leave training.prefix_cache out"
        )
    layer_list(model)
    check_not_random(model, 1)
    folder, per_token = cache_folder(config), token_bytes(cache, model)
    check_can_write_in(folder, f"training.prefix_cache.folder is {folder}")
    read_meta(folder)
    needed = sum(lengths[: num_storable(lengths, per_token, cache.max_bytes)]) * per_token
    existing, reserve = _existing(folder), reserve_bytes(config)
    # What lies there is the run's own, or is thrown away.
    free = shutil.disk_usage(existing).free + stored_bytes(folder)
    if needed + reserve > free:
        raise InputError(
            f"training.prefix_cache needs {format_bytes(needed)} ({sum(lengths):,} tokens of {per_token:,} bytes) and "
            f"leaves {format_bytes(reserve)} free, and {existing} has {format_bytes(free)}: bound it by "
            "training.prefix_cache.max_gib, name another training.prefix_cache.folder, or set "
            "training.prefix_cache.dtype to float8"
        )
