"""Which state does every entry take over when the selection changes: kept, new, back from retirement, or dropped?

Everything is told by positions in a parameter's memory, so that it does not matter which region, or kind of region,
owns an entry before and after.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_zero.layers.carriers import carriers, parameter_name, values_name
from sparse_zero.layers.retired import RetiredEntries, find_positions
from sparse_zero.selection.config import Kind
from sparse_zero.zero.state import TrainingState

# What optimizers call their running mean of squared gradients: AdamW, its 8-bit form, Adafactor.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "state2", "variance"})


@dataclass(frozen=True, kw_only=True)
class LiveEntries:
    """The trained entries of one parameter, by ascending position; on the host."""

    positions: Tensor  # [n] int64
    masters: Tensor  # [n] fp32
    moments: Mapping[str, Tensor]  # of each moment [n] fp32; none before the first step


@dataclass(frozen=True, kw_only=True)
class NewValues:
    """What the values of one parameter and kind take over, in their order; on the host."""

    # [n] bool: entries that were trained already, and those of the others that were retired.
    kept: Tensor
    returned: Tensor
    # [n] fp32: masters of both; of entries that are simply new, zero.
    masters: Tensor
    # Of each moment [n] fp32; zero for all but the kept ones.
    moments: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EntryCounts:
    """How many entries of a model a change of the selection concerned."""

    # Trained before and after.
    kept: int
    # Trained only after; of them, those that had been retired.
    new: int
    returned: int
    # Trained only before: retired by this change.
    dropped: int
    # Retired ones in all, after the change.
    retired: int


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What becomes of all entries."""

    # By parameter and kind of the new selection.
    values: Mapping[str, Mapping[Kind, NewValues]]
    # By parameter; none of them empty.
    retired: Mapping[str, RetiredEntries]
    counts: EntryCounts


def live_entries(model: nn.Module, state: TrainingState) -> dict[str, LiveEntries]:
    """The state of the trained entries, by parameter."""
    found = {}
    for name, carrier in carriers(model):
        kinds = list(carrier.values())
        if not kinds:
            continue
        positions, order = torch.cat([carrier.positions(kind) for kind in kinds]).sort()
        names = [values_name(name, kind) for kind in kinds]
        found[parameter_name(name, carrier)] = LiveEntries(
            positions=positions,
            masters=torch.cat([state.masters[each] for each in names])[order],
            moments={key: torch.cat([moment[each] for each in names])[order] for key, moment in state.moments.items()},
        )
    return found


def _take_over(wanted: Tensor, live: LiveEntries, retired: RetiredEntries) -> NewValues:
    """State for the values at positions ``wanted`` [n]."""
    at, kept = find_positions(live.positions, wanted)
    masters = torch.zeros(len(wanted))
    masters[kept] = live.masters[at[kept]]
    moments = {key: torch.zeros(len(wanted)) for key in live.moments}
    for key, moment in moments.items():
        moment[kept] = live.moments[key][at[kept]]
    at, returned = find_positions(retired.positions, wanted)
    masters[returned] = retired.numbers[at[returned]]
    return NewValues(kept=kept, returned=returned, masters=masters, moments=moments)


def _retire(wanted: Tensor, live: LiveEntries, retired: RetiredEntries) -> tuple[RetiredEntries, int]:
    """The retired entries once ``wanted`` (ascending) are the trained ones, and how many were dropped just now."""
    remain = ~find_positions(wanted, retired.positions)[1]
    dropped = ~find_positions(wanted, live.positions)[1]
    positions = torch.cat([retired.positions[remain], live.positions[dropped]])
    numbers = torch.cat([retired.numbers[remain], live.masters[dropped]])
    positions, order = positions.sort()
    return RetiredEntries(positions=positions, numbers=numbers[order]), int(dropped.sum())


def plan_migration(
    live: Mapping[str, LiveEntries],
    retired: Mapping[str, RetiredEntries],
    wanted: Mapping[str, Mapping[Kind, Tensor]],
) -> Migration:
    """What becomes of every entry.

    Args:
        live: what is trained now, by parameter.
        retired: what earlier selections trained, in the form of the same placement.
        wanted: int64 positions of the new values, by parameter and kind, in the order of the values.
    """
    none = torch.empty(0, dtype=torch.int64)
    keys = next(iter(live.values())).moments if live else {}
    no_live = LiveEntries(positions=none, masters=torch.empty(0), moments={key: torch.empty(0) for key in keys})
    no_retired = RetiredEntries(positions=none, numbers=torch.empty(0))
    values: dict[str, dict[Kind, NewValues]] = {}
    remaining: dict[str, RetiredEntries] = {}
    num_dropped = 0
    for name in sorted({*live, *retired, *wanted}):
        before, old = live.get(name, no_live), retired.get(name, no_retired)
        values[name] = {kind: _take_over(at, before, old) for kind, at in wanted.get(name, {}).items()}
        everything = torch.cat([*wanted.get(name, {}).values(), none]).sort().values
        entries, dropped = _retire(everything, before, old)
        num_dropped += dropped
        if len(entries):
            remaining[name] = entries
    taken = [each for kinds in values.values() for each in kinds.values()]
    num_kept = sum(int(each.kept.sum()) for each in taken)
    counts = EntryCounts(
        kept=num_kept,
        new=sum(len(each.kept) for each in taken) - num_kept,
        returned=sum(int(each.returned.sum()) for each in taken),
        dropped=num_dropped,
        retired=sum(map(len, remaining.values())),
    )
    return Migration(values=values, retired=remaining, counts=counts)


def mean_second_moments(migration: Migration) -> dict[tuple[str, Kind], float]:
    """By parameter and kind: the mean of the second moment over the kept entries.

    Where none were kept, it is the mean over those of the whole model; zero if there are none either.
    """
    sums: dict[tuple[str, Kind], tuple[float, int]] = {}
    for name, kinds in migration.values.items():
        for kind, each in kinds.items():
            for key in SECOND_MOMENTS & each.moments.keys():
                # Entries that were not kept are zero.
                total = float(each.moments[key].sum(dtype=torch.float64))
                sums[name, kind] = (total, int(each.kept.sum()))
    everything, number = (sum(column) for column in zip(*sums.values(), strict=True)) if sums else (0.0, 0)
    overall = everything / number if number else 0.0
    return {key: total / kept if kept else overall for key, (total, kept) in sums.items()}
