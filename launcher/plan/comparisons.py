"""What would the same job take by another method, and which of the built-in models fits?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.plan.defaults import LORA_RANK, PEERS, default_run, described, peer_changes
from launcher.plan.planned_run import Gpu, PlannedRun, plan_run
from launcher.plan.questions import Gpus, at_stage, check_lora_rank, fewest, gpus_needed
from launcher.plan.settings import judge
from models.decoder_shapes import CHECKED_FAMILIES
from models.known_shapes import KNOWN_SHAPES, KnownShape
from sparse_zero.errors import InputError

# Those whose closed form is held against simulations; what an encoder takes depends on its task, too.
_CHECKED = tuple(shape for shape in KNOWN_SHAPES if shape.config["model_type"] in CHECKED_FAMILIES)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The same job by another method."""

    name: str
    run: PlannedRun
    gpus: Gpus | None

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "method": self.name,
            "trained": self.run.num_trained,
            "peak_bytes": self.run.peak_bytes,
            "gpus": None if self.gpus is None else self.gpus.to_json(),
        }


def compared(run: PlannedRun, name: str, gpu: Gpu | None, lora_rank: int = LORA_RANK) -> list[Compared]:
    """The run, and the same job by full fine-tuning, LoRA, DoRA and QLoRA."""
    family = run.shapes.shape.model_type
    runs = {name: run}
    for peer in PEERS:
        if peer != name:
            changes = peer_changes(peer, family, lora_rank)
            base: dict[str, Any] = {"quantization": "none"} if "quantization" not in changes else {}
            runs[peer] = run.but(**base, **changes, calibration=None)
            check_lora_rank(runs[peer])
    return [
        Compared(name=each, run=other, gpus=None if gpu is None else fewest(gpus_needed(other, gpu)))
        for each, other in runs.items()
    ]


@dataclass(frozen=True, kw_only=True)
class ModelFit:
    """How a built-in model goes with some GPUs."""

    name: str
    num_parameters: int
    # As it fits, or as it needs the least; None: the method's modules are not in this model.
    run: PlannedRun | None
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """For files."""
        found: dict[str, Any] = {"model": self.name, "parameters": self.num_parameters, "fits": self.fits}
        if self.run is not None:
            found["stage"] = self.run.job.stage
            found["gradient_checkpointing"] = self.run.job.gradient_checkpointing
            found["needed_bytes"] = self.run.needed_bytes
        return found


def _as_fast_as_it_fits(run: PlannedRun, gpu: Gpu) -> tuple[PlannedRun, bool]:
    tried = [at_stage(run, stage).but(gradient_checkpointing=each) for stage in (2, 3) for each in (True, False)]
    fitting = [each for each in tried if each.fits(gpu)]
    if not fitting:  # On few ranks stage 3 may take more than stage 2, for what it gathers.
        return min(tried, key=lambda each: each.needed_bytes), False
    return min(fitting, key=lambda each: judge(each).seconds), True


def models_that_fit(
    method: str,
    world_size: int,
    gpu: Gpu,
    overrides: Sequence[str] = (),
    models: Sequence[KnownShape] = _CHECKED,
    lora_rank: int = LORA_RANK,
) -> list[ModelFit]:
    """Built-in models by a method's recipe on so many GPUs, the largest first, each as fast as it fits.

    Stage 2, or 3 where it must be; checkpointing where it must be.

    Args:
        method: one of ``launcher.plan.defaults.PLAN_METHODS``.
        world_size: GPUs.
        gpu: each of them.
        overrides: as of a config file.
        models: to look at.
        lora_rank: of the methods with adapters.

    Raises:
        InputError: an override does not hold.
    """
    found = []
    for known in sorted(models, key=lambda each: -each.num_parameters):
        config = default_run(known.name, method, overrides)
        changes = peer_changes(method, str(described(known.name)["model_type"]), lora_rank)
        planned = plan_run(config, world_size, **changes)
        check_lora_rank(planned)
        try:
            run, fits = _as_fast_as_it_fits(planned, gpu)
        except InputError:
            found.append(ModelFit(name=known.name, num_parameters=known.num_parameters, run=None, fits=False))
        else:
            found.append(ModelFit(name=known.name, num_parameters=known.num_parameters, run=run, fits=fits))
    return found
