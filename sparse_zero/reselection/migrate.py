"""How does a running engine get another selection, with the state of every entry that both have?"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import check_equal_on_all_ranks, of_rank_zero
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers, parameter_name, values_name
from sparse_zero.layers.merge import remove_values
from sparse_zero.layers.retired import Retired
from sparse_zero.layers.sparsify import (
    ADAPTERS,
    by_parameter,
    check_fits,
    live_positions,
    placement_of,
    retired_of,
    selection_of,
    sparsify,
)
from sparse_zero.module_map import ModuleMap, default_module_map
from sparse_zero.reselection.migration import (
    SECOND_MOMENTS,
    EntryCounts,
    Migration,
    live_entries,
    mean_second_moments,
    plan_migration,
)
from sparse_zero.reselection.plain import without_values
from sparse_zero.selection.config import Kind, Moments
from sparse_zero.selection.selection import Selection
from sparse_zero.zero import compat
from sparse_zero.zero.optimizer_state import algorithm, check_optimizer
from sparse_zero.zero.state import TrainingState, read_training_state, write_training_state

# Builds an engine over a sparsified model, as the one before was built.
MakeEngine = Callable[[nn.Module], Any]


def _agreed_means(migration: Migration) -> dict[tuple[str, Kind], float]:
    """Second moments to begin with, of rank 0: sums depend on the number of threads, in their last bits. Collective."""
    means = mean_second_moments(migration)
    agreed = of_rank_zero(torch.tensor(list(means.values()), dtype=torch.float64))
    return dict(zip(means, agreed.tolist(), strict=True))


def _migrated_state(model: nn.Module, migration: Migration, step: int, moments: Moments) -> TrainingState:
    """The training state of the newly sparsified ``model``."""
    means = _agreed_means(migration) if moments == "mean" else {}
    masters: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, carrier in carriers(model):
        parameter = parameter_name(name, carrier)
        for kind, original in carrier.originals.items():
            new = migration.values[parameter][kind]
            start = original.float() if carrier.placement == "inplace" else torch.zeros(len(original))
            values = values_name(name, kind)
            masters[values] = torch.where(new.kept | new.returned, new.masters, start)
            for key, moment in new.moments.items():
                begin = means.get((parameter, kind), 0.0) if key in SECOND_MOMENTS else 0.0
                found.setdefault(key, {})[values] = moment.masked_fill(~new.kept, begin)
    return TrainingState(masters=masters, moments=found, step=step)


def kinds_of(selection: Selection) -> set[Kind]:
    """The kinds of region that a selection has."""
    return {kind for weight in selection.weights.values() for kind in weight.kinds()}


def check_kinds_can_change(optimizer: str, kinds: Iterable[Kind]) -> None:
    """Refuse an optimizer whose states of one kind of region cannot go on with another's.

    Args:
        optimizer: the name of its algorithm.
        kinds: that selections have, or may have.

    Raises:
        InputError: names the optimizer and the remedy.
    """
    if optimizer == "muon" and set(kinds) != {"block"}:
        raise InputError(
            "the optimizer muon keeps another state for blocks than for other kinds, so that no entry can go from one "
            "to the other: select blocks only, or use another optimizer"
        )


def check_can_migrate(engine: Any) -> None:
    """Refuse a change of the selection where values or states of the optimizer could not be read and replaced.

    Raises:
        InputError: names what is in the way, and the remedy.
    """
    check_optimizer(engine)
    if compat.states_on_disk(engine):
        raise InputError(
            "the optimizer's states are offloaded to nvme, where other values' states cannot be put: use "
            "zero.offload_optimizer cpu or none"
        )
    for name, carrier in carriers(engine.module):
        if any(compat.is_sharded(each) and compat.is_out_of_reach(each) for each in carrier.values().values()):
            raise InputError(
                f"the values of {parameter_name(name, carrier)} are on a disk, as the base that is offloaded to nvme, "
                "and cannot be exchanged there: use zero.offload_base cpu or none"
            )


def migrate(
    engine: Any,
    selection: Selection,
    make_engine: MakeEngine,
    *,
    moments: Moments = "zero",
    module_map: ModuleMap | None = None,
) -> tuple[Any, EntryCounts]:
    """Go on training with another selection. Collective; ``engine`` is at its end afterwards.

    Entries that both selections have keep their fp32 master and their moments bit for bit, whatever region owns them.
    New ones start from the base (inplace) or from zero (delta), or, if they were retired, from their retired number.
    Dropped ones are retired: they act on, frozen. The optimizer's step counter goes on; the learning rate and
    whatever else an optimizer is built with are those of the new engine.

    Args:
        engine: from :func:`sparse_zero.initialize`, between two steps.
        selection: what is trained from now on, equal on all ranks.
        make_engine: from the sparsified model to an engine like the one before, with a new optimizer over
            :func:`sparse_zero.parameter_groups`: it calls :func:`sparse_zero.initialize`.
        moments: how the second moment of new entries begins, see
            :class:`~sparse_zero.selection.config.ReselectConfig`.
        module_map: the model's family; default: read from module names.

    Returns:
        The new engine, over the same model, and how many entries the change concerned.

    Raises:
        InputError: the selection is empty or does not fit the model, or the optimizer's state cannot go to other
            entries; nothing has changed then.
        RuntimeError: the selections of the ranks differ.
    """
    model: nn.Module = engine.module
    if not selection.weights:
        raise InputError("the selection is empty: nothing would be trained")
    if dist.is_initialized():
        check_equal_on_all_ranks(selection.digest(), "the new selection")
    check_can_migrate(engine)
    check_kinds_can_change(algorithm(engine), [*kinds_of(selection), *kinds_of(selection_of(model))])
    placement = placement_of(model)
    with without_values(model):
        module_map = module_map or default_module_map(model)
        check_fits(model, selection, module_map, sharded=True, placement=placement)
    matrices = module_map.by_parameter()
    wanted = {name: live_positions(chosen, matrices.get(name)) for name, chosen in by_parameter(selection).items()}
    state = read_training_state(engine)
    migration = plan_migration(live_entries(model, state), retired_of(model).entries, wanted)
    step, loss_scale = state.step, state.loss_scale
    del state
    compat.detach_engine(engine)
    remove_values(model)
    # Adapters that were loaded go back to what they were; none of them is active any more.
    vars(model).pop(ADAPTERS, None)
    retired = Retired(placement=placement, entries=migration.retired)
    sparsify(model, selection, placement, retired=retired, module_map=module_map)
    engine = make_engine(model)
    write_training_state(engine, replace(_migrated_state(model, migration, step, moments), loss_scale=loss_scale))
    return engine, migration.counts
