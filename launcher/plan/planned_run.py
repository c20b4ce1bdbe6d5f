"""What does a planned run need as it is, and what with some of its settings changed?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from launcher.plan.forecasting import Shapes, job_of, planned_selection, shapes_of
from sparse_zero.memory.closed_form.forecast import Forecast
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.trained import trained_of
from sparse_zero.memory.device import DeviceOverhead, device_overhead
from sparse_zero.zero.communication import step_communication

if TYPE_CHECKING:
    from launcher.config import RunConfig
    from sparse_zero.selection.config import SelectionConfig
    from sparse_zero.selection.selection import Selection

# Of a GPU's memory; the rest is the driver's, or a little less than the name of the GPU says.
SAFE_SHARE = 0.98


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU by its memory."""

    gib: float

    @property
    def usable_bytes(self) -> int:
        """For a rank, everything counted."""
        return int(SAFE_SHARE * self.gib * 2**30)


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run on a number of ranks; everything about it is worked out when it is first asked for."""

    config: RunConfig
    world_size: int
    shapes: Shapes
    # Fields of MemoryJob that differ from the config's.
    changes: Mapping[str, Any] = field(default_factory=dict)
    # Made for the runs that came from this one, by what they were made from.
    selections: dict[SelectionConfig, Selection] = field(default_factory=dict, compare=False, repr=False)

    def but(
        self, *, world_size: int | None = None, selection: SelectionConfig | None = None, **changes: Any
    ) -> PlannedRun:
        """The same run with another number of ranks, another selection, or other fields of its job."""
        config = self.config if selection is None else dataclasses.replace(self.config, selection=selection)
        return dataclasses.replace(
            self,
            config=config,
            world_size=self.world_size if world_size is None else world_size,
            changes={**self.changes, **changes},
        )

    @cached_property
    def job(self) -> MemoryJob:
        """What it is for memory."""
        return job_of(self.config, self.world_size, **self.changes)

    @cached_property
    def selection(self) -> Selection | None:
        """What is trained, chosen at random; None for methods that select nothing."""
        if self.job.method != "selection":
            return None
        wanted = self.config.selection
        if wanted not in self.selections:
            self.selections[wanted] = planned_selection(self.config, self.shapes)
        return self.selections[wanted]

    @cached_property
    def num_trained(self) -> int:
        """Entries that are trained."""
        if self.selection is not None:
            return self.selection.num_parameters
        return trained_of(self.shapes.shape, self.job, None).num_parameters

    @cached_property
    def forecast(self) -> Forecast:
        """By the closed form."""
        return self.shapes.forecast(self.job, self.selection)

    @property
    def peak_bytes(self) -> int:
        """The most that a rank holds in tensors on its device."""
        return self.forecast.peak_bytes

    @cached_property
    def overhead(self) -> DeviceOverhead:
        """What a rank takes of its GPU beside tensors: an estimate."""
        return device_overhead(self.shapes.shape, self.job)

    @property
    def needed_bytes(self) -> int:
        """The most that a rank takes of its GPU, tensors and all else."""
        return self.peak_bytes + self.overhead.num_bytes

    @property
    def host_bytes(self) -> int:
        """The most that a rank holds in host memory of what is offloaded."""
        return max(self.forecast.peak(phase, "host").num_bytes("host") for phase in self.forecast.phases())

    def fits(self, gpu: Gpu) -> bool:
        """Whether each rank has room on such a GPU, by the closed form."""
        return self.needed_bytes <= gpu.usable_bytes

    @cached_property
    def communication(self) -> dict[str, int]:
        """Bytes of one optimizer step's collectives, by what they carry; see ``sparse_zero.zero.communication``."""
        shape, job = self.shapes.shape, self.job
        trained = self.num_trained
        layers = shape.num_layers * shape.layer_parameters
        # Full fine-tuning trains what stage 3 shards.
        base, ends = (0, 0) if job.method == "full" else (layers, shape.num_parameters - layers)
        # Forward, backward, and the forward that is repeated; embedding and head are gathered once.
        times = 2 + job.gradient_checkpointing
        itemsize = job.element_bytes
        gathered = times * base + ends
        if job.quantization != "none":
            # In codes: half a byte or one, of the layers' linears.
            itemsize, gathered = 1, gathered * (1 if job.quantization == "int8" else 0.5)  # type: ignore[assignment]
        return step_communication(
            stage=job.stage,
            world_size=job.world_size,
            num_values=trained,
            values_itemsize=job.element_bytes,
            weights_itemsize=itemsize,
            accumulation=job.accumulation,
            placement="delta" if job.method != "selection" else job.placement,
            gathered_values=times * trained,
            gathered_weights=round(gathered),
        )


def plan_run(config: RunConfig, world_size: int, **changes: Any) -> PlannedRun:
    """A run to ask about.

    Raises:
        InputError: the model has no closed form, or the config does not fit it.
    """
    return PlannedRun(config=config, world_size=world_size, shapes=shapes_of(config), changes=changes)
