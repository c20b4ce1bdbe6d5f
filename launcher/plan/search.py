"""Which changes of a run would make it fit into a memory, the cheapest first?"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.config import RunConfig, apply_override, parse_config, resolved_yaml
from launcher.config_checks import check_config
from launcher.plan.forecasting import Shapes, job_of, planned_selection
from launcher.plan.options import Option, dimensions
from launcher.run_folder import FREE_KEYS
from launcher.yaml_files import parse_yaml
from models.families import can_pack
from sparse_zero.errors import InputError
from sparse_zero.memory.closed_form.forecast import Forecast
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.selection.selection import Selection

# Forecasts that a search may make; one takes milliseconds.
_MAX_FORECASTS = 300


def bytes_needed(forecast: Forecast, *, on_host: bool = False) -> int:
    """The most that a rank's tensors take in the memory that is asked about.

    Args:
        forecast: of the run.
        on_host: on a CPU, where what is offloaded lies in the same memory.
    """
    if on_host:
        return max(moment.num_bytes("device") + moment.num_bytes("host") for moment in forecast.moments)
    return forecast.peak_bytes


def fits(forecast: Forecast, memory_bytes: float, *, overhead_bytes: float = 0, on_host: bool = False) -> bool:
    """Whether a rank has room for its tensors.

    Args:
        forecast: of the run.
        memory_bytes: that one rank has.
        overhead_bytes: what else lies there: context, interpreter, what an allocator loses.
        on_host: see :func:`bytes_needed`.
    """
    return bytes_needed(forecast, on_host=on_host) + overhead_bytes <= memory_bytes


def largest_that_fits(least: int, most: int, fits_with: Callable[[int], bool]) -> int | None:
    """The largest whole number in [least, most] that fits, where every smaller one does, too; None: not even the least.

    Args:
        least: of the numbers.
        most: of the numbers.
        fits_with: says of a number whether it fits; asked about log2(most - least) times.
    """
    if not fits_with(least):
        return None
    good, bad = least, most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits_with(middle) else (good, middle)
    return good


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a run, in one or more of its settings, with which it fits."""

    # As the command line takes them: "--training.gradient_checkpointing=true".
    overrides: tuple[str, ...]
    # In words, what it costs.
    cost: str
    # Seconds of a step, expected, as a multiple of those before.
    slowdown: float
    # Whether other numbers come out of the training.
    changes_result: bool
    # Whether a run that has begun can go on with it; else it starts anew, in another output.folder.
    can_continue: bool
    config: RunConfig
    job: MemoryJob
    forecast: Forecast


def _batch_of(
    config: RunConfig, changed: RunConfig, shape: Mapping[str, Any], filled_fraction: float
) -> dict[str, Any]:
    """A micro-batch that was looked at, as the changed run would make it; fields of MemoryJob."""
    found = dict(shape)
    if not {"micro_batch", "length"} <= found.keys():
        return found
    rows, length = int(found["micro_batch"]), int(found["length"])
    smaller = changed.training.micro_batch_size / config.training.micro_batch_size
    shorter = changed.data.max_length / config.data.max_length
    if config.data.batching == "pack":
        length = math.ceil(length * smaller * shorter)
    else:
        rows, length = math.ceil(rows * smaller), min(length, changed.data.max_length)
        if changed.data.batching == "pack":
            length = math.ceil(length * filled_fraction)
    found.update(micro_batch=rows, length=length)
    if found.get("label_positions") is not None:
        most = length if changed.data.batching == "pad" else rows * length
        found["label_positions"] = max(1, min(int(found["label_positions"]), most - 1))
    return found


def _can_continue(overrides: tuple[str, ...]) -> bool:
    names = [override.removeprefix("--").partition("=")[0] for override in overrides]
    return all(name in FREE_KEYS or name.partition(".")[0] in FREE_KEYS for name in names)


class _Search:
    """Looks at combinations of options in the order of their cost."""

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        shapes: Shapes,
        selection: Selection | None,
        on_host: bool,
        job: Mapping[str, Any],
        filled_fraction: float,
    ) -> None:
        self._config, self._world_size, self._shapes, self._selection = config, world_size, shapes, selection
        self._job, self._filled = job, filled_fraction
        self._mapping: dict[str, Any] = parse_yaml(resolved_yaml(config), "the run")
        # By the selections' configs; the run's own is used for the run's own config.
        self._selections: dict[str, Selection] = {}
        self._looked: dict[tuple[int, ...], Change | None] = {}
        self.dimensions = dimensions(config, world_size, on_host, can_pack=can_pack(shapes.model))

    def options(self, point: tuple[int, ...]) -> list[Option]:
        """Those of a point: for each setting, 0 or the number of its option."""
        return [self.dimensions[index][number - 1] for index, number in enumerate(point) if number]

    def cost(self, point: tuple[int, ...]) -> float:
        """For the order."""
        # A setting more is a change more, be it free.
        return sum(math.log(option.slowdown) + option.penalty + 0.01 for option in self.options(point))

    def _selection_of(self, changed: RunConfig) -> Selection | None:
        if changed.selection == self._config.selection:
            return self._selection
        key = repr(changed.selection)
        if key not in self._selections:
            self._selections[key] = planned_selection(changed, self._shapes)
        return self._selections[key]

    @property
    def num_forecasts(self) -> int:
        """Points that were looked at."""
        return len(self._looked)

    def furthest(self, point: tuple[int, ...]) -> tuple[int, ...]:
        """The point with the same settings changed, each as far as it goes."""
        return tuple(len(options) if number else 0 for number, options in zip(point, self.dimensions, strict=True))

    def look(self, point: tuple[int, ...]) -> Change | None:
        """The run with these options; None where they do not go together, or with its other settings."""
        if point not in self._looked:
            self._looked[point] = self._look(point)
        return self._looked[point]

    def _look(self, point: tuple[int, ...]) -> Change | None:
        options = self.options(point)
        overrides = tuple(override for option in options for override in option.overrides)
        mapping = copy.deepcopy(self._mapping)
        try:
            for override in overrides:
                apply_override(mapping, override)
            changed = parse_config(mapping)
            check_config(changed)
            selection = self._selection_of(changed)
            job = job_of(changed, self._world_size, **_batch_of(self._config, changed, self._job, self._filled))
            forecast = self._shapes.forecast(job, selection)
        except InputError:
            return None
        return Change(
            overrides=overrides,
            cost="; ".join(dict.fromkeys(option.cost for option in options)),
            slowdown=math.prod(option.slowdown for option in options),
            changes_result=any(option.penalty for option in options),
            can_continue=_can_continue(overrides),
            config=changed,
            job=job,
            forecast=forecast,
        )


def changes_that_fit(
    config: RunConfig,
    world_size: int,
    memory_bytes: float,
    shapes: Shapes,
    selection: Selection | None = None,
    *,
    overhead: Callable[[MemoryJob], float] = lambda job: 0.0,
    on_host: bool = False,
    most: int = 3,
    filled_fraction: float = 1.0,
    **job: Any,
) -> list[Change]:
    """Changes with which a run fits, the cheapest first: those that slow it down least, and leave its result alone.

    None contains another one. A search of a few hundred forecasts: empty means that none was found among them.

    Args:
        config: of the run that does not fit.
        world_size: ranks.
        memory_bytes: that one rank has.
        shapes: of the run's model.
        selection: the run's; None: one as large, at random.
        overhead: what else lies there beside a job's tensors, see :func:`fits`.
        on_host: the run is on a CPU.
        most: changes to find.
        filled_fraction: of the tokens of a padded micro-batch, those that are no padding.
        job: fields of :class:`~sparse_zero.memory.closed_form.job.MemoryJob` in which the run differs from its
            config: the micro-batch that was looked at (micro_batch, length, label_positions), no calibration.
    """
    if selection is None and job.get("method", "selection") == "selection":
        selection = planned_selection(config, shapes)
    search = _Search(config, world_size, shapes, selection, on_host, job, filled_fraction)

    def has_room(point: tuple[int, ...]) -> bool:
        change = search.look(point)
        return change is not None and fits(
            change.forecast, memory_bytes, overhead_bytes=overhead(change.job), on_host=on_host
        )

    start = (0,) * len(search.dimensions)
    waiting, seen = [(0.0, start)], {start}
    found: list[tuple[int, ...]] = []
    while waiting and len(found) < most and search.num_forecasts < _MAX_FORECASTS:
        _, point = heapq.heappop(waiting)
        if any(all(had <= has for had, has in zip(other, point, strict=True)) for other in found):
            continue
        # Every option takes less than the one before: where the last ones do not do, none does.
        if any(point) and has_room(search.furthest(point)) and has_room(point):
            found.append(point)
            continue
        for index, options in enumerate(search.dimensions):
            if point[index] < len(options):
                after = (*point[:index], point[index] + 1, *point[index + 1 :])
                if after not in seen:
                    seen.add(after)
                    heapq.heappush(waiting, (search.cost(after), after))
    return [change for point in found if (change := search.look(point)) is not None]
