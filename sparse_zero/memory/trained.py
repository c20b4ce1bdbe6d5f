"""What is trained of each linear and of everything else, in the numbers that memory follows from?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparse_zero.memory.decoder_shape import DecoderShape
from sparse_zero.memory.job import MemoryJob
from sparse_zero.selection.config import Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection


@dataclass(frozen=True, kw_only=True)
class TrainedLinear:
    """What is trained of one linear; nothing by default."""

    # Trained entries by kind of region.
    entries: Mapping[Kind, int]
    # (height, width) of blocks, how many there are, and in how many distinct column strips they lie.
    block_shape: tuple[int, int] = (0, 0)
    num_blocks: int = 0
    num_strips: int = 0
    num_rows: int = 0
    num_columns: int = 0
    # Whether backward keeps the whole input instead of slices.
    keeps_input: bool = False


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a job trains."""

    # By the linear's full name; those without anything are absent.
    linears: Mapping[str, TrainedLinear]
    # Entries that are trained, each once.
    num_parameters: int
    # Of those, the ones outside of the layers' linears, by the name of their parameter.
    others: Mapping[str, int]


def _of(chosen: WeightSelection, keeps_input: bool) -> TrainedLinear:
    return TrainedLinear(
        entries=chosen.num_parameters_by_kind(),
        block_shape=chosen.block_shape,
        num_blocks=len(chosen.blocks),
        num_strips=len(chosen.blocks[:, 1].unique()),
        num_rows=len(chosen.rows),
        num_columns=len(chosen.columns),
        keeps_input=keeps_input,
    )


def trained_of(
    shape: DecoderShape, job: MemoryJob, selection: Selection | None, shared_inputs: Sequence[Sequence[str]]
) -> Trained:
    """See :func:`sparse_zero.memory.forecast.forecast_memory` for the arguments."""
    from sparse_zero.layers.sparsify import _keeps_input  # TODO: public, takes shared_inputs

    if job.method != "selection" or selection is None:
        raise NotImplementedError(job.method)
    names = {
        f"{shape.layers_name}.{index}.{linear.name}" for index in range(shape.num_layers) for linear in shape.linears
    }
    weights = {name.removesuffix(".weight"): chosen for name, chosen in selection.weights.items()}
    inside = {name: chosen for name, chosen in weights.items() if name in names}
    from sparse_zero.module_map import ModuleMap

    keeps = _keeps_input(
        inside,
        ModuleMap(matrices=(), layer_of={}, role_of={}, shared_inputs=tuple(tuple(each) for each in shared_inputs)),
    )
    return Trained(
        linears={name: _of(chosen, keeps[name]) for name, chosen in inside.items()},
        num_parameters=selection.num_parameters,
        others={name: chosen.num_parameters for name, chosen in weights.items() if name not in names},
    )
