"""What is told of a run that has run out of memory: where, what was held, what was forecast, and what would fit?"""

from __future__ import annotations

import gc
import os
import re
import resource
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

from launcher.config import RunConfig
from launcher.memory.measuring import RunMemory
from launcher.memory.notes import forecast_measured, job_changes
from launcher.memory.room import Room, held_bytes, room_of
from launcher.memory.run_recorder import is_out_of_memory
from launcher.plan.search import Change, bytes_needed, changes_that_fit
from launcher.process_ranks import find_ranks
from launcher.summary import format_bytes
from sparse_zero.collectives import speaking_alone
from sparse_zero.memory.closed_form.forecast import Forecast
from sparse_zero.memory.closed_form.moments import Moment
from sparse_zero.memory.simulation.timeline import PLACES
from sparse_zero.selection.selection import Selection

_PHASES = {
    "load": "loading the model",
    "calibration": "calibration",
    "engine": "making the engine",
    "resume": "continuing from a checkpoint",
    "forward": "forward",
    "backward": "backward",
    "step": "the optimizer step",
    "save": "saving",
    "evaluate": "evaluation",
}
# As many kinds, terms and changes as are told.
_MOST_KINDS, _MOST_TERMS, _MOST_CHANGES = 4, 3, 2
_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Where memory ran out, as far as it is known."""

    phase: str
    # Full name of the module at work, and the operation; "" where nobody knows.
    module: str = ""
    operation: str = ""
    # What the allocation that failed wanted.
    asked_bytes: int | None = None
    # Tensors that were held, by kind; None: not measured.
    by_kind: Mapping[str, int] | None = None


def find_out_of_memory(error: BaseException) -> BaseException | None:
    """The failed allocation that an error is, or came from."""
    found: BaseException | None = error
    while found is not None:
        if is_out_of_memory(found):
            return found
        found = found.__cause__ or found.__context__
    return None


def asked_bytes(error: BaseException) -> int | None:
    """How much the allocation wanted, as its message says it."""
    match = _ASKED.search(str(error))
    return (
        None if match is None else int(float(match[1]) * _UNITS[match[2] if match[2] == "bytes" else match[2].upper()])
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames of an error, the outermost first."""
    entry = error.__traceback__
    while entry is not None:
        yield entry.tb_frame
        entry = entry.tb_next


def module_at_work(error: BaseException) -> str:
    """Full name of the innermost module that an error came through; "" outside of all, as in most of backward."""
    modules = [each for frame in _frames(error) if isinstance(each := frame.f_locals.get("self"), nn.Module)]
    if not modules:
        return ""
    innermost = modules[-1]
    for root in modules:  # The engine holds the model as "module".
        root = getattr(root, "module", root)
        for name, module in root.named_modules():
            if module is innermost and name:
                return name
    return ""


def failure_of(error: BaseException, memory: RunMemory) -> Failure:
    """What is known of a failed allocation; afterwards nothing of the run is held by the error any more."""
    module = module_at_work(error)
    asked = asked_bytes(error)
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    held = memory.held_when_it_failed()
    memory.forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Failure(
        phase=memory.now,
        module=(held or {}).get("module") or module,
        operation=(held or {}).get("operation", ""),
        asked_bytes=asked,
        by_kind=None if held is None else held["by_kind"],
    )


def _listed(sizes: Mapping[str, int], most: int) -> str:
    ordered = sorted(((num_bytes, name) for name, num_bytes in sizes.items() if num_bytes), reverse=True)
    shown = [f"{name} {format_bytes(num_bytes)}" for num_bytes, name in ordered[:most]]
    rest = sum(num_bytes for num_bytes, _ in ordered[most:])
    return ", ".join([*shown, f"others {format_bytes(rest)}"] if rest else shown)


def _moment_of(forecast: Forecast, phase: str) -> tuple[str, Moment]:
    """The moment that a failure in a phase is held against; the peak where the phase has none."""
    for each in forecast.phases():
        if each == phase:
            return f"forecast of {_PHASES[phase]}", forecast.peak(each)
    moment = forecast.peak()
    return f"forecast of the peak, in {_PHASES.get(moment.phase, moment.phase)}", moment


def describe(
    rank: int, failure: Failure, room: Room, forecast: Forecast | None, problem: str, changes: list[Change]
) -> list[str]:
    """The lines that are told.

    Args:
        rank: that ran out of memory.
        failure: where.
        room: what it had.
        forecast: of the run; None: there is none.
        problem: why there is none, or why changes are not known.
        changes: with which the run would fit.
    """
    where = _PHASES.get(failure.phase, failure.phase)
    at = ", ".join(filter(None, (failure.module, failure.operation)))
    asked = "" if failure.asked_bytes is None else f"; {format_bytes(failure.asked_bytes)} more were asked for"
    lines = [f"rank {rank} ran out of memory in {where}{f' ({at})' if at else ''}{asked}"]
    if failure.by_kind is not None:
        held = sum(failure.by_kind.values())
        lines.append(f"held in tensors: {format_bytes(held)}: {_listed(failure.by_kind, _MOST_KINDS)}")
    lines.append(
        f"there was: {format_bytes(room.num_bytes)} {room.what}, of which {format_bytes(room.for_tensors)} for tensors"
    )
    if forecast is None:
        lines.append(f"forecast: none ({problem})")
    else:
        name, moment = _moment_of(forecast, failure.phase)
        terms = moment.by_name(*PLACES)
        lines.append(f"{name}: {format_bytes(sum(terms.values()))}: {_listed(terms, _MOST_TERMS)}")
        for change in changes:
            goes_on = "" if change.can_continue else "; in another output.folder"
            need = format_bytes(bytes_needed(change.forecast, on_host=room.what != "of the GPU"))
            lines.append(f"would fit: {' '.join(change.overrides)} ({change.cost}{goes_on}; forecast {need})")
        if not changes:
            none = "no change of the settings was found that does; use more ranks, or more memory"
            lines.append(f"would fit: {problem or none}")
    return lines


@contextmanager
def _on_its_own() -> Iterator[None]:
    """Ask no other rank in the block, and take the memory that a limit still lets this process take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        with speaking_alone():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def find_changes(
    config: RunConfig,
    world_size: int,
    memory: RunMemory,
    failure: Failure | None,
    room: Room,
    selection: Selection | None,
) -> tuple[Forecast | None, str, list[Change]]:
    """(the forecast for the micro-batches so far, what went wrong, changes with which the run would fit)."""
    from launcher.plan.forecasting import planned_selection, shapes_of

    on_host = memory.device.type == "cpu"
    try:
        shapes = shapes_of(config)
        if selection is None:
            selection = planned_selection(config, shapes)
        batches = memory.all_micro_batches()
        forecast, batch = forecast_measured(config, world_size, batches, shapes, selection)
    except Exception as error:  # It is not to hide the error that is explained.
        return None, " ".join(str(error).split())[:300] or type(error).__name__, []
    needed, usable = bytes_needed(forecast, on_host=on_host), room.for_tensors
    if failure is not None:
        # It did not fit, whatever the forecast says: what was asked for is to be saved at least.
        usable = min(usable, needed - (failure.asked_bytes or 1))
    filled = 1.0 if batch is None else batch["tokens"] / (batch["micro_batch"] * batch["length"])
    job = {} if batch is None else job_changes(batch)
    job.pop("accumulation", None)
    try:
        changes = changes_that_fit(
            config, world_size, usable, shapes, selection, on_host=on_host, most=_MOST_CHANGES,
            filled_fraction=filled, **job,
        )  # fmt: skip
    except Exception as error:
        return forecast, f"not worked out ({' '.join(str(error).split())[:300] or type(error).__name__})", []
    return forecast, "", changes


def explain(error: BaseException, config: RunConfig, rank: int, world_size: int, memory: RunMemory) -> list[str]:
    """Lines about a failed allocation. Lets go of the model, so that there is memory to find them with."""
    now = held_bytes()
    failure = failure_of(error, memory)
    overhead = dict(memory.overhead)
    if failure.by_kind is not None:
        # It grows: threads and their stacks, caches of kernels, what was freed and not given back.
        tensors = sum(failure.by_kind.values())
        overhead = {name: max(num_bytes, now[name] - tensors) for name, num_bytes in overhead.items()}
    room = room_of(memory.device, find_ranks(os.environ).local_world_size or 1, overhead)
    with _on_its_own():
        forecast, problem, changes = find_changes(config, world_size, memory, failure, room, memory.selection)
    return describe(rank, failure, room, forecast, problem, changes)


def explain_kill(config: RunConfig, world_size: int, memory: RunMemory) -> list[str]:
    """Lines about a rank of this node that the kernel has ended for want of memory."""
    room = room_of(memory.device, find_ranks(os.environ).local_world_size or 1, memory.overhead)
    selection = memory.selection
    memory.forget()
    gc.collect()
    if memory.device.type == "cuda":
        return ["the host's memory ran out, not the GPU's: fewer ranks on a node, less offloading"]
    with _on_its_own():
        forecast, problem, changes = find_changes(config, world_size, memory, None, room, selection)
    failure = Failure(phase=memory.now)
    return describe(-1, failure, room, forecast, problem, changes)[1:]
