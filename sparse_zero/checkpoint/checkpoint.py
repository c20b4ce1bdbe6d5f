"""What is kept so that training continues with the step that would have been, at any world size and stage?

Format 3, a folder: ``checkpoint.json`` (format, version, step counter, optimizer and the names of its states, loss
scale, placement, fingerprints of the base, what the caller adds), ``selection.safetensors``, ``masters.safetensors``
and ``moments.safetensors`` (whole 1-D fp32 tensors, those of the optimizer named ``<state>/<values>``),
``retired.safetensors`` where re-selections dropped entries (see :mod:`sparse_zero.checkpoint.retired_file`),
``manifest.json``. Nothing in it depends on the number of ranks. Format 2 was Adam's only, format 1 had no entries
dropped; both are read.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparse_zero.checkpoint.conversion import check_base, convert_values, model_fingerprints, originals_by_name
from sparse_zero.checkpoint.folders import check_folder, new_folder
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.checkpoint.retired_file import read_retired, write_retired
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json, read_safetensors, write_safetensors
from sparse_zero.layers.retired import Retired
from sparse_zero.layers.sparsify import placement_of, retired_of, selection_of
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import Placement
from sparse_zero.zero.optimizer_state import algorithm, check_optimizer
from sparse_zero.zero.state import TrainingState, read_training_state, write_training_state

FORMAT = "sparse_zero.checkpoint"
FORMAT_VERSION = 3
# What checkpoints were written of that do not name their optimizer.
_OPTIMIZERS_OF_FORMAT_2 = ("adamw", "adam")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk. Selection and retired entries are in memory, the rest is read when asked for."""

    folder: Path
    selection: Selection
    placement: Placement
    # What sparsify needs besides the selection, and converts where the placement is another.
    retired: Retired
    # Steps that the optimizer had taken.
    optimizer_step: int
    # What the optimizer computes, as sparse_zero.zero.optimizer_state names it; several where it was not recorded.
    optimizers: tuple[str, ...]
    # fp16: the dynamic loss scale and its counters.
    loss_scale: dict[str, float] | None
    # What the caller of save_checkpoint added: JSON values, such as the step of the data order.
    extra: dict[str, Any]
    base: BaseIdentity | None
    base_fingerprints: dict[str, dict[str, str]]

    def read_state(self) -> TrainingState:
        """Masters and the optimizer's states, whole fp32 tensors on the host."""
        masters, _ = read_safetensors(self.folder / "masters.safetensors", FORMAT)
        flat, _ = read_safetensors(self.folder / "moments.safetensors", FORMAT)
        moments: dict[str, dict[str, Any]] = {}
        for key, tensor in flat.items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = tensor
        return TrainingState(masters=masters, moments=moments, step=self.optimizer_step, loss_scale=self.loss_scale)


def save_checkpoint(
    engine: Any, folder: str | Path, *, extra: dict[str, Any] | None = None, base: BaseIdentity | None = None
) -> None:
    """Write the canonical training state of ``engine`` to ``folder``. Collective.

    States that the optimizer keeps in 8 bits are written in fp32, and quantized again when they are loaded.

    Args:
        engine: from :func:`sparse_zero.initialize`, between two steps.
        folder: of this one checkpoint; replaced atomically by rank 0, if it exists.
        extra: JSON values to be found again in :attr:`Checkpoint.extra`.
        base: identity of the base's files.

    Raises:
        InputError: the optimizer has a state that is neither a number nor one for each value.
    """
    folder = Path(folder)
    is_writer = rank_and_world_size()[0] == 0
    check_optimizer(engine)
    state = read_training_state(engine, keep=is_writer)
    with failing_together():
        if not is_writer:
            return
        with new_folder(folder) as temporary:
            selection_of(engine.module).save(temporary / "selection.safetensors")
            write_safetensors(temporary / "masters.safetensors", state.masters, {"format": FORMAT})
            moments = {f"{key}/{name}": m for key, group in state.moments.items() for name, m in group.items()}
            write_safetensors(temporary / "moments.safetensors", moments, {"format": FORMAT})
            write_retired(temporary, retired_of(engine.module))
            header = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "optimizer_step": state.step,
                "optimizer": {"name": algorithm(engine), "states": sorted(state.moments)},
                "loss_scale": state.loss_scale,
                "placement": placement_of(engine.module),
                "base": None if base is None else {"name": base.name, "sha256": base.sha256},
                "base_fingerprints": model_fingerprints(engine.module),
                "extra": extra or {},
            }
            atomic_write_json(temporary / "checkpoint.json", header)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and verify a checkpoint. Not collective; :func:`sparsify` needs its ``selection`` and ``retired``.

    Raises:
        InputError: not a checkpoint, incomplete, damaged, or of a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}: check the path")
    check_folder(folder, "checkpoint")
    header = read_json(folder / "checkpoint.json")
    if header.get("format") != FORMAT or header.get("version", 0) > FORMAT_VERSION:
        raise InputError(
            f"{folder} has checkpoint format {header.get('format')!r} version {header.get('version')}, "
            f"not {FORMAT!r} up to {FORMAT_VERSION}: update sparse-zero"
        )
    base = header["base"]
    return Checkpoint(
        folder=folder,
        selection=Selection.load(folder / "selection.safetensors"),
        placement=header["placement"],
        retired=read_retired(folder, header["placement"]),
        optimizer_step=header["optimizer_step"],
        optimizers=(header["optimizer"]["name"],) if "optimizer" in header else _OPTIMIZERS_OF_FORMAT_2,
        loss_scale=header.get("loss_scale"),
        extra=header["extra"],
        base=None if base is None else BaseIdentity(name=base["name"], sha256=base["sha256"]),
        base_fingerprints=header["base_fingerprints"],
    )


def _check_retired(checkpoint: Checkpoint, found: Retired) -> None:
    """Raise unless the model's retired entries are the checkpoint's (the numbers of another placement are rounded)."""
    stored, same_form = checkpoint.retired, checkpoint.retired.placement == found.placement
    same = stored.entries.keys() == found.entries.keys() and all(
        torch.equal(entries.positions, found.entries[name].positions)
        and (not same_form or torch.equal(entries.numbers, found.entries[name].numbers))
        for name, entries in stored.entries.items()
    )
    if not same:
        raise InputError(
            f"{checkpoint.folder} has {stored.num_entries:,} retired entries that are not those of the model "
            f"({found.num_entries:,}): sparsify with retired=read_checkpoint(folder).retired"
        )


def load_checkpoint(engine: Any, folder: str | Path) -> Checkpoint:
    """Continue ``engine`` from a checkpoint of the same selection, retired entries and base. Collective.

    The stored placement is converted when the engine has the other one; masters then differ by one rounding.

    Raises:
        InputError: see :func:`read_checkpoint`; also another selection, other retired entries, another base or another
            optimizer, or the other placement with weight decay (it pulls towards zero inplace, towards the base under
            delta).
    """
    checkpoint = read_checkpoint(folder)
    model = engine.module
    if checkpoint.selection != selection_of(model):
        raise InputError(
            f"{folder} has another selection than the model: sparsify with read_checkpoint(folder).selection"
        )
    _check_retired(checkpoint, retired_of(model))
    check_base(checkpoint.base_fingerprints, model_fingerprints(model), folder)
    stored, wanted = checkpoint.optimizers, algorithm(engine)
    if wanted not in stored:
        raise InputError(
            f"{folder} was trained with the optimizer {stored[0]!r}, and the engine has {wanted!r}, which keeps "
            f"another state: set training.optimizer to {stored[0]}, or start anew"
        )
    placement = placement_of(model)
    decays = any(group.get("weight_decay", 0.0) for group in engine.optimizer.param_groups)
    if checkpoint.placement != placement and decays:
        raise InputError(
            f"{folder} was trained with placement {checkpoint.placement!r}, the engine has {placement!r}, and weight "
            "decay means something else there: keep the placement, or set training.weight_decay to 0"
        )
    state = checkpoint.read_state()
    masters = convert_values(state.masters, originals_by_name(model), checkpoint.placement, placement)
    write_training_state(engine, replace(state, masters=masters))
    return checkpoint
