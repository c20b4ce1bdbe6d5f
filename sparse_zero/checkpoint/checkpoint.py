"""What is kept so that training continues with the step that would have been, at any world size and stage?

Format 4, a folder: ``checkpoint.json`` (format, version, step counter, optimizer and the names of its states, loss
scale, schedule, placement, fingerprints of the base, digest of the selection, the run's config, what the caller adds),
``selection.safetensors``, ``masters.safetensors`` and ``moments.safetensors`` (whole 1-D fp32 tensors, those of the
optimizer named ``<state>/<values>``), ``retired.safetensors`` where re-selections dropped entries (see
:mod:`sparse_zero.checkpoint.retired_file`), ``random.safetensors`` where random streams are kept (see
:mod:`sparse_zero.checkpoint.random_states`), ``manifest.json``. Nothing but the random streams depends on the number
of ranks. ``docs/checkpoints.md`` has every field. Format 3 had no config, schedule and random streams, format 2 was
Adam's only, format 1 had no entries dropped; they are read.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_zero.checkpoint.conversion import (
    base_entries,
    check_base,
    convert_values,
    fingerprints,
    model_fingerprints,
    originals_by_name,
)
from sparse_zero.checkpoint.folders import check_folder, moved_aside, new_folder
from sparse_zero.checkpoint.headers import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    CheckpointHeader,
    check_belongs,
    check_fingerprints,
    check_names,
    check_states,
    check_values,
    parse_checkpoint_header,
    read_header,
    sealed,
)
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.checkpoint.random_states import gather_random_states, set_random_states, states_of_rank
from sparse_zero.checkpoint.retired_file import FILE_NAME as RETIRED_NAME
from sparse_zero.checkpoint.retired_file import read_retired, write_retired
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_safetensors, write_safetensors
from sparse_zero.layers.retired import Retired
from sparse_zero.layers.sparsify import placement_of, retired_of, selection_of
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import Placement
from sparse_zero.zero.optimizer_state import algorithm, check_optimizer, check_schedule, optimizer_step_count
from sparse_zero.zero.state import TrainingState, read_training_state, write_training_state

HEADER, SELECTION, MASTERS, MOMENTS, RANDOM = (
    "checkpoint.json",
    "selection.safetensors",
    "masters.safetensors",
    "moments.safetensors",
    "random.safetensors",
)
_ALWAYS = (HEADER, SELECTION, MASTERS, MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk. Selection and retired entries are in memory, the rest is read when asked for."""

    folder: Path
    selection: Selection
    # What sparsify needs besides the selection, and converts where the placement is another.
    retired: Retired
    header: CheckpointHeader

    @property
    def placement(self) -> Placement:
        """The form in which values and retired entries are stored."""
        return self.header.placement

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer had taken."""
        return self.header.optimizer_step

    @property
    def optimizers(self) -> tuple[str, ...]:
        """What the optimizer computes, see :func:`~sparse_zero.zero.optimizer_state.algorithm`; several: unrecorded."""
        return self.header.optimizers

    @property
    def extra(self) -> dict[str, Any]:
        """What the caller of :func:`save_checkpoint` added: JSON values, such as the step of the data order."""
        return self.header.extra

    @property
    def config(self) -> dict[str, Any] | None:
        """The run's config, where one was given."""
        return self.header.config

    @property
    def base(self) -> BaseIdentity | None:
        """Identity of the base's files, where it was given."""
        return self.header.base

    @property
    def base_fingerprints(self) -> dict[str, dict[str, str]]:
        """Hashes of the base's entries under the values, by parameter and kind."""
        return self.header.base_fingerprints

    def _read(self, name: str) -> dict[str, Tensor]:
        tensors, metadata = read_safetensors(self.folder / name, CHECKPOINT_FORMAT)
        check_belongs(metadata, self.header, self.folder / name)
        return tensors

    def read_state(self) -> TrainingState:
        """Masters and the optimizer's states, whole fp32 tensors on the host.

        Raises:
            InputError: a tensor is missing, too many, or of another form.
        """
        masters = self._read(MASTERS)
        check_values(masters, self.selection, self.folder / MASTERS, dtypes=(torch.float32,))
        moments: dict[str, dict[str, Any]] = {}
        for key, tensor in self._read(MOMENTS).items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = tensor
        check_states(moments, masters, self.header, self.folder / MOMENTS)
        return TrainingState(
            masters=masters,
            moments=moments,
            step=self.optimizer_step,
            loss_scale=self.header.loss_scale,
            schedule=self.header.schedule,
        )

    def read_random_states(self) -> dict[str, Tensor]:
        """The states of the random streams of all ranks; empty where they were not kept."""
        return self._read(RANDOM) if self.header.rng is not None else {}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a checkpoint will hold, in the host's memory and apart from the engine, which may train on."""

    selection: Selection
    retired: Retired
    state: TrainingState
    # [ranks, bytes] uint8 by stream; empty: not kept.
    random_states: dict[str, Tensor]
    # By parameter and kind; their fingerprints are made when the snapshot is written.
    base_entries: dict[str, dict[str, Tensor]]
    # The header's other fields.
    fields: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of the masters and states, in the host's memory until the snapshot is written."""
        held = [self.state.masters, *self.state.moments.values()]
        return sum(tensor.nbytes for tensors in held for tensor in tensors.values())


def take_snapshot(
    engine: Any,
    *,
    extra: dict[str, Any] | None = None,
    base: BaseIdentity | None = None,
    config: dict[str, Any] | None = None,
    random_states: bool = True,
    keep: bool | None = None,
) -> Snapshot | None:
    """Copy the canonical training state of ``engine`` to the host. Collective; training may go on afterwards.

    States that the optimizer keeps in 8 bits become fp32, and are quantized again when they are loaded.

    Args:
        engine: from :func:`sparse_zero.initialize`, between two steps.
        extra: JSON values to be found again in :attr:`Checkpoint.extra`.
        base: identity of the base's files.
        config: of the run, as JSON values; without secrets.
        random_states: whether the random streams of all ranks are kept; not needed where they are functions of the
            step.
        keep: whether this rank gets the snapshot; default: rank 0 only.

    Returns:
        The snapshot; None on ranks that do not get it.

    Raises:
        InputError: the optimizer has a state that is neither its step counter nor a number for each value, or keeps it
            on a disk.
    """
    if keep is None:
        keep = rank_and_world_size()[0] == 0
    check_optimizer(engine)
    state = read_training_state(engine, keep=keep)
    streams = gather_random_states(keep=keep) if random_states else {}
    if not keep:
        return None
    model = engine.module
    return Snapshot(
        selection=selection_of(model),
        retired=retired_of(model),
        state=state,
        random_states=streams,
        base_entries=base_entries(model),
        fields={
            "optimizer": {"name": algorithm(engine), "states": sorted(state.moments)},
            "placement": placement_of(model),
            "base": None if base is None else {"name": base.name, "sha256": base.sha256},
            # The caller's own, which may change before they are written.
            "config": deepcopy(config),
            "extra": deepcopy(extra or {}),
        },
    )


def _header(snapshot: Snapshot) -> dict[str, Any]:
    state, streams = snapshot.state, snapshot.random_states
    return sealed(
        {
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "optimizer_step": state.step,
            "loss_scale": state.loss_scale,
            "schedule": state.schedule,
            "rng": {"ranks": len(streams["torch"]), "streams": sorted(streams)} if streams else None,
            "selection_digest": snapshot.selection.digest(),
            "base_fingerprints": {name: fingerprints(entries) for name, entries in snapshot.base_entries.items()},
            **snapshot.fields,
        },
        state.masters,
    )


def write_snapshot_files(snapshot: Snapshot, folder: Path) -> None:
    """Write the files of a checkpoint, but its manifest, into an empty ``folder``; see :func:`write_snapshot`."""
    header = _header(snapshot)
    metadata = {"format": CHECKPOINT_FORMAT, "state_id": header["state_id"]}
    moments = {f"{key}/{name}": m for key, group in snapshot.state.moments.items() for name, m in group.items()}
    snapshot.selection.save(folder / SELECTION)
    write_safetensors(folder / MASTERS, snapshot.state.masters, metadata)
    write_safetensors(folder / MOMENTS, moments, metadata)
    write_retired(folder, snapshot.retired, metadata)
    if snapshot.random_states:
        write_safetensors(folder / RANDOM, snapshot.random_states, metadata)
    atomic_write_json(folder / HEADER, header)


def write_snapshot(snapshot: Snapshot, folder: str | Path) -> None:
    """Write a checkpoint: whole, or not at all. No collective, and in any thread.

    Args:
        snapshot: of :func:`take_snapshot`.
        folder: of this one checkpoint; replaced, if it exists.

    Raises:
        InputError: the folder is not a checkpoint's, or the header could not be read again.
        OSError: it cannot be written, for the disk is full, say; from safetensors as SafetensorError.
    """
    with new_folder(Path(folder)) as temporary:
        write_snapshot_files(snapshot, temporary)


def save_checkpoint(
    engine: Any,
    folder: str | Path,
    *,
    extra: dict[str, Any] | None = None,
    base: BaseIdentity | None = None,
    config: dict[str, Any] | None = None,
    random_states: bool = True,
) -> None:
    """Write the canonical training state of ``engine`` to ``folder``. Collective; see :func:`take_snapshot`.

    Args:
        engine: from :func:`sparse_zero.initialize`, between two steps.
        folder: of this one checkpoint; replaced atomically by rank 0, if it exists.
        extra: JSON values to be found again in :attr:`Checkpoint.extra`.
        base: identity of the base's files.
        config: of the run, as JSON values; without secrets.
        random_states: whether the random streams of all ranks are kept.

    Raises:
        InputError, OSError: see :func:`take_snapshot` and :func:`write_snapshot`; on all ranks together.
    """
    snapshot = take_snapshot(engine, extra=extra, base=base, config=config, random_states=random_states)
    with failing_together():
        if snapshot is not None:
            write_snapshot(snapshot, folder)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and verify a checkpoint. Not collective; :func:`sparsify` needs its ``selection`` and ``retired``.

    Raises:
        InputError: not a checkpoint, incomplete, damaged, or of a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        old = moved_aside(folder)
        remedy = "check the path" if old is None else f"a save was killed while it replaced it; rename {old} to it"
        raise InputError(f"no checkpoint folder {folder}: {remedy}")
    files = check_folder(folder, "checkpoint", reads=(*_ALWAYS, RETIRED_NAME, RANDOM))
    for name in _ALWAYS:
        if name not in files:
            raise InputError(f"{folder} is no checkpoint: it has no {name}; name a step-… folder of a run")
    header = parse_checkpoint_header(read_header(folder / HEADER), folder)
    selection = Selection.load(folder / SELECTION)
    if header.selection_digest not in (None, selection.digest()):
        raise InputError(f"{folder / SELECTION} belongs to another checkpoint: copy the folder again, or use another")
    retired = read_retired(folder, header.placement, header)
    check_fingerprints(header.base_fingerprints, selection, retired, folder / HEADER)
    return Checkpoint(folder=folder, selection=selection, retired=retired, header=header)


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


def _check_fits_engine(checkpoint: Checkpoint, engine: Any) -> None:
    """Raise unless the engine can go on from the checkpoint. Not collective."""
    folder, model = checkpoint.folder, engine.module
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


def load_checkpoint(engine: Any, folder: str | Path | Checkpoint) -> Checkpoint:
    """Continue ``engine`` from a checkpoint of the same selection, retired entries and base. Collective.

    The stored placement is converted when the engine has the other one; masters then differ by one rounding. Random
    streams go on where as many ranks wrote the checkpoint; else a
    :class:`~sparse_zero.checkpoint.random_states.RandomStatesWarning` says that they do not.

    Args:
        engine: from :func:`sparse_zero.initialize`, over a model with the checkpoint's selection.
        folder: of the checkpoint, or what :func:`read_checkpoint` gave for it, which is not verified again.

    Raises:
        InputError: see :func:`read_checkpoint`; also another selection, other retired entries, another base or another
            optimizer, or the other placement with weight decay (it pulls towards zero inplace, towards the base under
            delta). All ranks fail together, the first one with its error and the others with
            :class:`~sparse_zero.collectives.PeerError`; the engine is unchanged then, unless its optimizer calls itself
            as the checkpoint's and keeps other states.
    """
    with failing_together():
        checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
        _check_fits_engine(checkpoint, engine)
        if not checkpoint.optimizer_step and optimizer_step_count(engine):
            raise InputError(
                f"{checkpoint.folder} is from before the first step, and the engine has taken some, whose states would "
                "stay: load it into a new engine"
            )
        check_schedule(engine, checkpoint.header.schedule, checkpoint.folder / HEADER)
        state, model = checkpoint.read_state(), engine.module
        originals = originals_by_name(model)
        check_names(state.masters, originals, checkpoint.folder)
        masters = convert_values(state.masters, originals, checkpoint.placement, placement_of(model))
        streams = states_of_rank(checkpoint.read_random_states(), checkpoint.folder / RANDOM)
    write_training_state(engine, replace(state, masters=masters))
    if streams is not None:
        set_random_states(streams)
    return checkpoint
