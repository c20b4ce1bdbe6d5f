"""How much memory would each rank of a run hold, by the closed form?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from launcher.config import RunConfig
from launcher.deepspeed_config import accumulation_steps
from launcher.planning import without_scores
from sparse_zero.memory.decoder_shape import DecoderShape
from sparse_zero.memory.forecast import Forecast, forecast_memory
from sparse_zero.memory.job import CalibrationJob, MemoryJob
from sparse_zero.selection.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a forecast must know of a model: made once, used for many jobs."""

    shape: DecoderShape
    module_map: Any
    # On the meta device, dense.
    model: Any


def shapes_of(config: RunConfig) -> Shapes:
    """From the model's config.json.

    Raises:
        InputError: the model has no closed form.
    """
    from models.decoder_shapes import decoder_shape
    from models.families import module_map
    from models.skeleton import load_shapes

    model = load_shapes(config.model)
    return Shapes(shape=decoder_shape(model), module_map=module_map(model), model=model)


def planned_selection(config: RunConfig, shapes: Shapes) -> Selection:
    """The run's own selection where it is given, else one as large, at random."""
    from sparse_zero.selection.select import select

    if config.selection.file is not None:
        return Selection.load(config.selection.file)
    return select(shapes.model, None, without_scores(config).selection, module_map=shapes.module_map)


def job_of(config: RunConfig, world_size: int, **changes: Any) -> MemoryJob:
    """The job that a run is on so many ranks; ``changes`` are fields of :class:`MemoryJob`."""
    selection, training = config.selection, config.training
    calibrates = selection.file is None and selection.score not in ("random", "first")
    job = MemoryJob(
        world_size=world_size,
        stage=config.zero.stage,
        placement=config.zero.placement,
        precision=training.precision,
        micro_batch=training.micro_batch_size,
        length=config.data.max_length,
        batching=config.data.batching,
        accumulation=accumulation_steps(config, world_size),
        gradient_checkpointing=training.gradient_checkpointing,
        attention=config.model.attention,
        quantization=config.model.quantization,
        double_quantization=config.model.double_quantization,
        optimizer=training.optimizer,
        offload_optimizer=config.zero.offload_optimizer,
        offload_base=config.zero.offload_base,
        zero_options=config.zero.options,
        calibration=CalibrationJob(
            micro_batch=selection.calibration_batch_size, score=selection.score, weights=selection.calibration_weights
        ) if calibrates else None,
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


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
        changes: fields of :class:`~sparse_zero.memory.job.MemoryJob` that shall differ from the run's.

    Raises:
        InputError: the model has no closed form, or the config does not fit it.
    """
    shapes = shapes or shapes_of(config)
    job = job_of(config, world_size, **changes)
    if selection is None and job.method == "selection":
        selection = planned_selection(config, shapes)
    return forecast_memory(shapes.shape, job, selection, shared_inputs=shapes.module_map.shared_inputs)
