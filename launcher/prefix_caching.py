"""How does a run keep the output of its frozen lowest layers, and is what lies in the folder its own?"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config import RunConfig
from launcher.prefix_check import FORMAT, META, cache_folder, check_not_random, read_meta, reserve_bytes, token_bytes
from launcher.preparing import Prepared
from launcher.run_folder import RunFolder, RunLock
from launcher.same_input import samples_digest
from launcher.saying import say
from launcher.shared_folder import folders_of_ranks
from launcher.summary import format_bytes
from launcher.world import World
from models.gather import gather_json
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from sparse_zero.layers.quantized import dtype_of
from sparse_zero.prefix.cache import PrefixCache
from sparse_zero.prefix.layers import PrefixLayers, lowest_trained
from sparse_zero.prefix.store import SampleStore, num_storable, remove_store


class PrefixCacheWarning(UserWarning):
    """The cache of the lowest layers is off, begins anew, does not grow any more, or stays; the message says why."""


class RunPrefixCache(AbstractContextManager["RunPrefixCache"]):
    """The cache of one start of a run, with what is told of it.

    Args:
        cache: of this rank.
        world: this process's place.
        folder: of the files.
        keepers: for each rank, the first one that sees the same folder.
        keep: leave the files when the run is finished.
        lock: on the folder, which the first rank of each has.
    """

    def __init__(
        self, cache: PrefixCache, world: World, folder: Path, keepers: Sequence[int], *, keep: bool, lock: RunLock
    ) -> None:
        self._cache, self._world, self._folder, self._keepers = cache, world, folder, keepers
        self._keep, self._lock = keep, lock
        self._totals = torch.zeros(3, dtype=torch.int64)
        self._told: set[int] = set()

    @property
    def num_storable(self) -> int:
        """The samples before this one may be stored."""
        return self._cache.store.num_storable

    def forward(self, indices: Sequence[int], input_ids: Tensor) -> AbstractContextManager[None]:
        """See :meth:`sparse_zero.prefix.cache.PrefixCache.forward`."""
        return self._cache.forward(indices, input_ids)

    def take_counts(self) -> list[int]:
        """Of the step: this rank's samples left out, computed and stored, and whether its disk takes no more."""
        return [*self._cache.take_counts(), self._cache.store.problem is not None]

    def tell(self, counts: Tensor) -> dict[str, int]:
        """The step's numbers for its row, of what all ranks' :meth:`take_counts` gave [ranks, 4]."""
        found = counts[:, :3].sum(0).long()
        self._totals += found
        failed = set(counts[:, 3].nonzero().flatten().tolist()) - self._told
        if failed:
            self._told |= failed
            why = f" ({error.strerror})" if (error := self._cache.store.problem) is not None else ""
            warnings.warn(
                f"training.prefix_cache.folder {self._folder} takes no more of rank {', '.join(map(str, failed))}"
                f"{why}: what is not stored is computed in every epoch",
                PrefixCacheWarning,
                stacklevel=2,
            )
        names = ("cached_samples", "computed_samples", "stored_samples")
        return dict(zip(names, found.tolist(), strict=True))

    def depth(self, told: Mapping[str, int]) -> dict[str, Any]:
        """How much of the layers a step has run, for :meth:`launcher.step_speed.StepSpeed.of_step`.

        Args:
            told: its numbers, see :meth:`tell`.
        """
        cached, computed = told["cached_samples"], told["computed_samples"]
        return {"first_layer": self._cache.layers.num_layers, "cached": cached / max(1, cached + computed)}

    def sync(self) -> None:
        """Let what this rank has stored be believed from now on, also by a later start."""
        self._cache.store.sync()

    def end_epoch(self) -> None:
        """Let every rank read what all have stored. Collective."""
        self._cache.store.sync()
        dist.barrier()
        self._cache.store.refresh()

    def finish(self, *, is_complete: bool) -> dict[str, Any]:
        """End with the last step of this start; what the summary says. Collective.

        Args:
            is_complete: whether the run is; its files are removed then, unless they are to be kept.
        """
        store, keeps = self._cache.store, self._world.rank in self._keepers
        store.sync()
        dist.barrier()
        num_bytes = sum(gather_json(store.num_bytes() if keeps else 0))
        store.close()
        if is_complete and not self._keep and keeps:
            _remove(self._folder)
        cached, computed, stored = self._totals.tolist()
        return {
            "layers": self._cache.layers.num_layers,
            "cached_samples": cached,
            "computed_samples": computed,
            "stored_samples": stored,
            "hit_share": cached / max(1, cached + computed),
            "bytes": num_bytes,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.store.close()
        self._lock.release()


def _clear(folder: Path) -> None:
    remove_store(folder)
    (folder / META).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Delete a cache; what cannot be deleted is no reason to lose the end of a run."""
    try:
        _clear(folder)
    except OSError as error:
        warnings.warn(
            f"the frozen-prefix cache in {folder} cannot be removed ({error.strerror}): delete it by hand",
            PrefixCacheWarning,
            stacklevel=3,
        )
        return
    with suppress(OSError):  # Something else lies there, too.
        folder.rmdir()


def remove_left_cache(config: RunConfig, world: World, *, is_on: bool) -> None:
    """Delete what earlier starts of a run, which is complete now, have left in its run folder.

    Such starts had the cache there, and this one had it elsewhere, or none.

    Args:
        config: of this start.
        world: this process's place.
        is_on: whether this start had a cache: of its own one :meth:`RunPrefixCache.finish` has taken care.
    """
    folder, settings = RunFolder(config.output.folder).prefix_cache, config.training.prefix_cache
    if not world.keeps_folder or not folder.is_dir():
        return
    is_own = settings is not None and cache_folder(config).resolve() == folder.resolve()
    if is_own and (is_on or (settings is not None and settings.keep)):
        return
    try:
        with RunLock(folder, "the frozen-prefix cache", "another run") as lock:
            lock.take()
            if read_meta(folder) is not None:
                _remove(folder)
                return
            why = f"it has no {META}"
    except (InputError, OSError) as error:
        why = str(error)
    warnings.warn(f"{folder} stays: {why}", PrefixCacheWarning, stacklevel=2)


def _identity(prepared: Prepared, num_layers: int, data: str) -> dict[str, Any]:
    """What the numbers depend on; not the selection, the batches or the ranks."""
    model = prepared.config.model
    assert prepared.config.training.prefix_cache is not None
    return {
        "format": FORMAT,
        "base_sha256": prepared.base.sha256,
        "data_sha256": data,
        "num_samples": len(prepared.train.samples),
        "layers": num_layers,
        "hidden": int(prepared.model.config.hidden_size),
        "dtype": prepared.config.training.prefix_cache.dtype,
        "compute_dtype": str(dtype_of(prepared.model)),
        "attention": model.attention,
        "quantization": [model.quantization, model.double_quantization],
    }


def _take_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder the cache of ``identity``: what lies there of another is thrown away.

    Raises:
        InputError: a file of somebody else is in the way.
    """
    found = read_meta(folder)
    if found is not None:
        if found == json.loads(json.dumps(identity)):
            return
        what = ", ".join(key for key in identity if found.get(key) != identity[key])
        warnings.warn(
            f"the frozen-prefix cache in {folder} is of another {what}: it is thrown away",
            PrefixCacheWarning,
            stacklevel=2,
        )
        _clear(folder)
    atomic_write_json(folder / META, identity)


def _why_off(prepared: Prepared, num_layers: int, lowest: str) -> str | None:
    """Why there is nothing to be kept, or nothing to be read."""
    config, num_samples = prepared.config.training, len(prepared.train.samples)
    if num_layers == 0:
        return (
            f"{lowest} is trained, in or before the lowest layer: set selection.min_depth, to 0.75 for the upper "
            "quarter of the layers"
        )
    assert config.prefix_cache is not None
    lengths, per_token = prepared.train.lengths, token_bytes(config.prefix_cache, prepared.model)
    if not num_storable(lengths, per_token, config.prefix_cache.max_bytes):
        return (
            f"training.prefix_cache.max_gib is {config.prefix_cache.max_gib:g}, which has no room for the first "
            f"sample of the data ({format_bytes(lengths[0] * per_token)}): raise it"
        )
    epochs = config.epochs
    if epochs is None:
        assert config.steps is not None
        epochs = config.steps / math.ceil(num_samples / config.global_batch_size)
    if epochs <= 1 and not config.prefix_cache.keep:
        return (
            "the run has no second epoch to read it in: raise training.epochs, or set training.prefix_cache.keep for "
            "other runs"
        )
    return None


def open_prefix_cache(prepared: Prepared, model: Any, world: World) -> RunPrefixCache | None:
    """The cache that the run's config asks for; None where it asks for none, or it would be of no use. Collective.

    Args:
        prepared: the run.
        model: its model with values.
        world: this process's place.

    Raises:
        InputError: the folder cannot be used, or the layers are random in training.
    """
    config = prepared.config
    settings = config.training.prefix_cache
    if settings is None:
        return None
    num_layers, lowest = lowest_trained(model)
    why_off = _why_off(prepared, num_layers, lowest)
    if why_off is not None:
        warnings.warn(f"training.prefix_cache is off: {why_off}", PrefixCacheWarning, stacklevel=2)
        return None
    check_not_random(model, num_layers)
    folder = cache_folder(config)
    keepers = [0]
    if world.world_size > 1:
        keepers = folders_of_ranks(folder, "training.prefix_cache.folder")
    lock = RunLock(folder, "training.prefix_cache.folder", "another run")
    # Every rank has the same samples: they were compared when they were read.
    data = str(gather_json(samples_digest(prepared.train) if world.is_main else None)[0])
    with failing_together():
        if world.rank in keepers:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.take()
                _take_folder(folder, _identity(prepared, num_layers, data))
            except OSError as error:
                raise InputError(
                    f"training.prefix_cache.folder is {folder}, which cannot be written to ({error.strerror}): name "
                    "another folder"
                ) from error
    per_token, reserve = token_bytes(settings, prepared.model), reserve_bytes(config)
    store = SampleStore(folder, world.rank, prepared.train.lengths, per_token, settings.max_bytes, reserve)
    cache = PrefixCache(
        PrefixLayers(model, num_layers),
        store,
        prepared.train.lengths,
        stored=settings.dtype,
        compute=dtype_of(model),
        is_packed=config.data.batching == "pack",
        together=config.zero.stage == 3,
    )
    if world.is_main:
        bound = ""
        if store.num_storable < len(prepared.train.samples):
            whole = format_bytes(sum(prepared.train.lengths) * per_token)
            bound = f" of {whole}, bounded by training.prefix_cache.max_gib"
        say(
            f"frozen-prefix cache: {num_layers} layers are computed once, {format_bytes(store.needed_bytes)}{bound} "
            f"in {folder}"
        )
    return RunPrefixCache(cache, world, folder, keepers, keep=settings.keep, lock=lock)
