"""How much memory would each rank of a run hold, by the closed form?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.loss_chunks import calibration_chunk
from launcher.plan.simulation import without_scores
from sparse_zero.errors import InputError
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.forecast import Forecast, forecast_memory
from sparse_zero.memory.closed_form.job import CalibrationJob, MemoryJob
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.unsupported import offload_device

# Of DeepSpeed's zero_optimization section: what a job has fields of its own for.
_OWN_FIELDS = ("stage", "offload_optimizer", "offload_param")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a forecast must know of a model: made once, used for many jobs."""

    shape: DecoderShape
    module_map: Any
    # On the meta device, dense.
    model: Any

    def forecast(self, job: MemoryJob, selection: Selection | None) -> Forecast:
        """Of a job; see :func:`~sparse_zero.memory.closed_form.forecast.forecast_memory`."""
        from models.chunked_loss import PLAIN_HEADS

        if self.shape.model_type not in PLAIN_HEADS:
            # As a run does it, with a warning.
            calibration = job.calibration and dataclasses.replace(job.calibration, loss_chunk=None)
            job = dataclasses.replace(job, loss_chunk=None, calibration=calibration)
        return forecast_memory(self.shape, job, selection, module_map=self.module_map)


def shapes_of(config: RunConfig) -> Shapes:
    """From the model's config.json, or the built-in shapes.

    Raises:
        InputError: the model has no closed form, or the run packs samples that it would mix.
    """
    from models.decoder_shapes import decoder_shape
    from models.families import check_can_pack, module_map
    from models.skeleton import load_shapes

    if config.model.classifies:
        raise InputError(
            "model.task is 'sequence_classification', of which memory has no closed form: sparse-zero plan --config "
            "simulates it"
        )
    model = load_shapes(config.model)
    if config.data.batching == "pack":
        check_can_pack(model)
    return Shapes(shape=decoder_shape(model), module_map=module_map(model), model=model)


def planned_selection(config: RunConfig, shapes: Shapes) -> Selection:
    """The run's own selection where it is given, else one as large, at random."""
    from sparse_zero.selection.select import select

    if config.selection.file is not None:
        return Selection.load(config.selection.file)
    return select(shapes.model, None, without_scores(config).selection, module_map=shapes.module_map)


def job_of(config: RunConfig, world_size: int, **changes: Any) -> MemoryJob:
    """The job that a run is on so many ranks; an own DeepSpeed config is read, too.

    Args:
        config: of the run.
        world_size: ranks.
        changes: fields of :class:`~sparse_zero.memory.closed_form.job.MemoryJob`. Where they leave it open, the
            micro-batches of a step follow from the global batch, and only the method "selection" calibrates.

    Raises:
        InputError: the job does not hold, or there is no such field.
    """
    unknown = [name for name in changes if name not in {each.name for each in dataclasses.fields(MemoryJob)}]
    if unknown:
        raise InputError(f"{unknown[0]} is no field of a memory job: see sparse_zero.memory.closed_form.job")
    selection, training = config.selection, config.training
    settings = deepspeed_config(config, None)
    section = settings.get("zero_optimization") or {}
    calibrates = changes.get("method", "selection") == "selection" and config.calibrates
    micro_batch = changes.get("micro_batch", training.micro_batch_size)
    fields: dict[str, Any] = {
        "world_size": world_size,
        "stage": config.zero.stage,
        "placement": config.zero.placement,
        "precision": training.precision,
        "micro_batch": micro_batch,
        "length": config.data.max_length,
        "batching": config.data.batching,
        "accumulation": -(-training.global_batch_size // max(micro_batch * world_size, 1)),
        "gradient_checkpointing": training.gradient_checkpointing,
        "loss_chunk": training.loss_chunk,
        "attention": config.model.attention,
        "quantization": config.model.quantization,
        "double_quantization": config.model.double_quantization,
        "optimizer": training.optimizer,
        "per_module": tuple(entry.modules for entry in training.per_module),
        "offload_optimizer": offload_device(settings, "offload_optimizer") or "none",
        "offload_base": offload_device(settings, "offload_param") or "none",
        "zero_options": {name: value for name, value in section.items() if name not in _OWN_FIELDS},
        "calibration": CalibrationJob(
            micro_batch=selection.calibration_batch_size,
            score=selection.score,
            weights=selection.calibration_weights,
            accumulate=selection.accumulate,
            accumulator_dtype=selection.accumulator_dtype,
            regions=selection.regions,
            min_depth=selection.min_depth,
            full=selection.full_calibration,
            loss_chunk=calibration_chunk(config),
        )
        if calibrates
        else None,
    }
    return MemoryJob(**{**fields, **changes})


def forecast_run(
    config: RunConfig,
    world_size: int,
    *,
    shapes: Shapes | None = None,
    selection: Selection | None = None,
    **changes: Any,
) -> Forecast:
    """What a run will hold, by the closed form.

    Args:
        config: of the run; its model's folder needs no weights.
        world_size: ranks.
        shapes: those of the config's model, if they are there already.
        selection: the run's, if it is there already.
        changes: fields of :class:`~sparse_zero.memory.closed_form.job.MemoryJob` that shall differ from the run's.

    Raises:
        InputError: the model has no closed form, or the config does not fit it.
    """
    shapes = shapes or shapes_of(config)
    job = job_of(config, world_size, **changes)
    if selection is None and job.method == "selection":
        selection = planned_selection(config, shapes)
    return shapes.forecast(job, selection)
