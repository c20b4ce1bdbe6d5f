"""By which method does a run train its model: what is chosen, what the engine trains, and what is saved of it?"""

from __future__ import annotations

from typing import Any, Protocol

from launcher.config import RunConfig
from launcher.exporting import record_labels, save_model_folder
from launcher.memory.measuring import RunMemory
from launcher.memory.notes import MemoryNotes
from launcher.preparing import Prepared, check_can_select, choose_selection, make_engine
from launcher.world import World
from models.heads import fresh_head
from sparse_zero.checkpoint.adapter import save_adapter
from sparse_zero.checkpoint.checkpoint import Checkpoint
from sparse_zero.collectives import failing_together
from sparse_zero.layers.merge import merge
from sparse_zero.layers.sparsify import num_retired, selection_of
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.communication import engine_communication
from sparse_zero.zero.compat import detach_engine, has_shards, make_plain


class Method(Protocol):
    """What a run asks of the way in which it trains; all else of a run is the same for every method."""

    # Whether the run writes checkpoints, and continues from them.
    has_checkpoints: bool
    # Whether memory is forecast and simulated for it, see launcher.memory.notes.
    has_forecasts: bool

    def check_model(
        self, config: RunConfig, model: Any, family: ModuleMap, checkpoint: Checkpoint | None, *, sharded: bool
    ) -> None:
        """Raise where the loaded model does not have what is to be trained, see :func:`launcher.preparing.prepare`."""

    def choose(self, prepared: Prepared, world: World, memory: RunMemory, notes: MemoryNotes | None) -> int:
        """Choose what is trained; its number of parameters. Collective."""

    def make_engine(self, prepared: Prepared, world: World, memory: RunMemory) -> Any:
        """The engine that trains what was chosen; None where that is nothing. Collective."""

    def counts(self, engine: Any) -> dict[str, int]:
        """Parameters by what has become of them at the end: ``trained`` and ``retired``, at least."""

    def communication(self, engine: Any) -> dict[str, int]:
        """Bytes of a step's collectives on a rank, see :mod:`sparse_zero.zero.communication`."""

    def save_adapter(self, prepared: Prepared, engine: Any) -> None:
        """Write to the run folder what was trained. Collective."""

    def adapter_bytes(self, prepared: Prepared) -> int:
        """Size of what was trained, on a disk."""

    def tuned_model(self, prepared: Prepared, engine: Any) -> Any:
        """The model that has learned, to evaluate and to save; nothing is trained after it. Collective."""

    def save_merged(self, prepared: Prepared, world: World, model: Any) -> None:
        """Write the plain model. Collective."""


class SelectedParts:
    """Trains selected parts of the weights."""

    has_checkpoints = has_forecasts = True

    def __init__(self) -> None:
        self._selection: Selection | None = None

    def check_model(
        self, config: RunConfig, model: Any, family: ModuleMap, checkpoint: Checkpoint | None, *, sharded: bool
    ) -> None:
        """That there is what the selection chooses among."""
        check_can_select(config, model, family, checkpoint, sharded=sharded)

    def choose(self, prepared: Prepared, world: World, memory: RunMemory, notes: MemoryNotes | None) -> int:
        """The checkpoint's selection, or a new one; written to the run folder."""
        checkpoint = prepared.checkpoint
        if checkpoint is None:
            selection, scores = choose_selection(prepared, world)
        else:
            selection, scores = checkpoint.selection, None
        if prepared.labels is not None:
            record_labels(selection.metadata, prepared.labels)
        if world.keeps_folder:
            if scores is not None:
                scores.save(prepared.folder.scores)
            selection.save(prepared.folder.selection)
        self._selection = memory.selection = selection
        if notes is not None:
            notes.selected(selection, prepared.folder.selection)
        return selection.num_parameters

    def make_engine(self, prepared: Prepared, world: World, memory: RunMemory) -> Any:
        """Over the values."""
        assert self._selection is not None
        return make_engine(prepared, self._selection, world, memory)

    def counts(self, engine: Any) -> dict[str, int]:
        """Of the selection that training ended with; ``head``: of the trained ones, those that the base lacked."""
        selection = selection_of(engine.module)
        head = sum(selection.weights[name].num_parameters for name in fresh_head(engine.module))
        return {"trained": selection.num_parameters, "retired": num_retired(engine.module), "head": head}

    def communication(self, engine: Any) -> dict[str, int]:
        """Of the values."""
        return engine_communication(engine)

    def save_adapter(self, prepared: Prepared, engine: Any) -> None:
        """Values and selection."""
        save_adapter(engine, prepared.folder.adapter, base=prepared.base)

    def adapter_bytes(self, prepared: Prepared) -> int:
        """Of its folder."""
        return prepared.folder.size_of(prepared.folder.adapter)

    def tuned_model(self, prepared: Prepared, engine: Any) -> Any:
        """The plain model with the trained values in its weights; at stage 3 in shards, as it was trained.

        A quantized one keeps the values beside its weights, whole at every stage: dense, it might not fit any more.
        """
        model = engine.module
        if prepared.config.model.quantization != "none":
            return make_plain(engine) if prepared.config.zero.stage == 3 else model
        if prepared.config.zero.stage == 3:
            model = detach_engine(engine)
        merge(model)
        return model

    def save_merged(self, prepared: Prepared, world: World, model: Any) -> None:
        """Write the plain model; a quantized one is made dense on the host, when the device is needed no more."""
        if prepared.config.model.quantization == "none" or has_shards(model):
            save_plain(prepared, world, model)
            return
        with failing_together():
            if world.is_main:
                merge(model.to("cpu"))
                save_model_folder(model, prepared.tokenizer, prepared.folder.merged)


def save_plain(prepared: Prepared, world: World, model: Any) -> None:
    """Write a model that is plain already, whole or in shards. Collective."""
    if has_shards(model):
        save_model_folder(model, prepared.tokenizer, prepared.folder.merged)
        return
    with failing_together():
        if world.is_main:
            save_model_folder(model, prepared.tokenizer, prepared.folder.merged)
