"""How much memory will each rank of a training job hold at most, as a sum of named terms?

The closed form: from shapes alone. :mod:`sparse_zero.memory.simulation.simulate_training` finds the same by running the
real code without data; ``scripts/verify_memory.py`` holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparse_zero.memory.closed_form.activations import activation_moments
from sparse_zero.memory.closed_form.calibration_memory import calibration_moments
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import PHASES, Moment, Phase
from sparse_zero.memory.closed_form.saving_memory import save_moments
from sparse_zero.memory.closed_form.states import held_states
from sparse_zero.memory.closed_form.trained import trained_of
from sparse_zero.memory.simulation.timeline import Place
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.selection import Selection


class Forecast:
    """What one rank will hold: moments of each phase, tensors only.

    Args:
        moments: at least one.
    """

    def __init__(self, moments: Sequence[Moment]) -> None:
        self.moments = tuple(moments)

    def phases(self) -> list[Phase]:
        """Those that have moments, in the order of a run."""
        present = {moment.phase for moment in self.moments}
        return [phase for phase in PHASES if phase in present]

    def peak(self, phase: Phase | None = None, place: Place = "device") -> Moment:
        """The moment with the largest sum, of one phase or of all.

        Raises:
            KeyError: the phase has no moment.
        """
        found = [moment for moment in self.moments if phase is None or moment.phase == phase]
        if not found:
            raise KeyError(phase)
        return max(found, key=lambda moment: moment.num_bytes(place))

    @property
    def peak_bytes(self) -> int:
        """The most on the device, over all phases."""
        return self.peak().num_bytes()

    def to_json(self) -> dict[str, Any]:
        """The peak of each phase with its terms, for files and tables."""
        return {
            phase: {
                "moment": peak.name,
                "peak_bytes": peak.num_bytes(),
                "host_bytes": self.peak(phase, "host").num_bytes("host"),
                "by_kind": peak.by_kind(),
                "terms": {f"{term.name} ({term.place})": term.num_bytes for term in peak.terms if term.num_bytes},
            }
            for phase in self.phases()
            for peak in [self.peak(phase)]
        }


def forecast_memory(
    shape: DecoderShape,
    job: MemoryJob,
    selection: Selection | None = None,
    *,
    module_map: ModuleMap | None = None,
    shared_inputs: Sequence[Sequence[str]] = (),
) -> Forecast:
    """Bytes of tensors that one rank holds, by phase, as sums of named terms; from shapes alone, in milliseconds.

    A shape is written down (see :class:`~sparse_zero.memory.closed_form.decoder_shape.DecoderShape`), or read off a
    model of transformers by ``models.decoder_shapes``, for which the model needs no weights::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.bfloat16)
        regions = (sz.RegionConfig(kind="block", modules=("*.q_proj", "*.k_proj", "*.v_proj"), block_size=256),)
        config = sz.SelectionConfig(regions=regions, budget=sz.BudgetConfig(fraction=0.0084), score="random")
        forecast = sz.forecast_memory(
            decoder_shape(model),
            sz.MemoryJob(world_size=8, stage=2, micro_batch=4, length=512, gradient_checkpointing=True),
            sz.select(model, None, config),
            module_map=sz.default_module_map(model),
        )
        forecast.peak().num_bytes(), forecast.peak("step").terms

    Not counted: the interpreter, the CUDA context, what kernels use inside of an operation, and what the allocator
    loses to fragments; see :mod:`sparse_zero.memory.device`.

    Args:
        shape: of the model.
        job: what trains it.
        selection: what is trained, for the method "selection". Regions chosen at random, as many and as large, serve as
            well.
        module_map: of the model: which linears read the same tensor, which backward then keeps once.
        shared_inputs: the groups of such linears, where there is no map; by their names.

    Returns:
        Moments of the phases load, calibration (if the job has one), engine, forward, backward, step and save.

    Raises:
        InputError: the method needs a selection, or adapters have no linear to go to.
    """
    if module_map is not None:
        shared_inputs = module_map.shared_inputs
    trained = trained_of(shape, job, selection, shared_inputs)
    held = held_states(shape, job, trained)
    moments = [*held.moments, *calibration_moments(shape, job), *save_moments(job, trained, held.between_steps)]
    for moment in activation_moments(shape, job, trained):
        moments.append(replace(moment, terms=(*held.during_training(moment), *moment.terms)))
    return Forecast(moments)
