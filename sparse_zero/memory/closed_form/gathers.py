"""How many bytes of gathered parameters does stage 3 hold while each module computes?

DeepSpeed knows from an earlier pass in which order modules read their parameters. When a module begins, it gathers what
the module lacks, and ahead of that what comes next, up to ``prefetch_bucket_size`` entries and no more than
``max_live_parameters`` in all; when the module ends, it gives back what is not read again within
``max_reuse_distance`` entries. This walks through the modules of a decoder with the same rules (DeepSpeed 0.19.8,
``runtime/zero/partitioned_param_coordinator.py``: ``fetch_sub_module``, ``release_sub_module``), counting bytes.

Parameters that are gathered together arrive in one buffer, from which each is copied; the buffer goes when the last of
them has been asked for (``partition_parameters.py``: ``AllGatherCoalescedHandle``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_zero.memory.closed_form.module_order import Event, Module, Parameter, backward_events, forward_events


@dataclass(frozen=True, kw_only=True)
class Limits:
    """DeepSpeed's settings; sizes in entries."""

    prefetch: int
    live: int
    reuse: int
    # Whether shards lie on the host, from where the own ones are copied before they are gathered.
    from_host: bool = False


@dataclass(eq=False)
class _Handle:
    # Parameters that nobody has asked for yet, and the buffer they arrived in: its bytes are freed with the last.
    waiting: int
    buffer_bytes: int
    parameters: Sequence[Parameter]
    is_complete: bool = False


@dataclass(kw_only=True)
class Gathered:
    """Bytes that are gathered."""

    # The most while a module computes, by its name; "end": when the pass has ended. Attention and MLP, which have no
    # parameters of their own, compute beside their last linear: before it in forward, and behind it in backward.
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    # While it computes for the second time, in backward.
    repeated: dict[str, int] = field(default_factory=dict)
    # The most before it computes, while parameters are copied out of the buffer they arrived in.
    copying_forward: dict[str, int] = field(default_factory=dict)
    copying: dict[str, int] = field(default_factory=dict)
    copying_repeated: dict[str, int] = field(default_factory=dict)


class _Coordinator:
    """The state of DeepSpeed's coordinator of one rank, between two events."""

    def __init__(
        self,
        ranks: int,
        limits: Limits,
        order: Sequence[tuple[Parameter, int]],
        steps: Sequence[Module],
        is_first_step: bool,
    ) -> None:
        self._ranks, self._limits, self._steps = ranks, limits, steps
        self._queue = deque(order)
        self._recent: dict[Parameter, int] = {}
        self._available: set[Parameter] = set() if is_first_step else {p for p, _ in order if p.persists}
        self._in_flight: dict[Parameter, _Handle] = {}
        # Modules at work that read it.
        self._readers: dict[Parameter, set[Module]] = {}
        # Of each parameter that arrived: bytes of its own memory.
        self._own_bytes: dict[Parameter, int] = {}
        self._num_live = 0
        self._step = 0
        self._backward: list[Module] = []
        # What a repetition has gathered, by the module in whose backward it began.
        self._repeated: dict[Module, set[Parameter]] = {}
        self.num_bytes = 0
        self.peak = 0

    def _add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.peak = max(self.peak, self.num_bytes)

    def _gather(self, wanted: Sequence[Parameter]) -> None:
        padded = {p: math.ceil(p.numel / self._ranks) * self._ranks * p.itemsize for p in wanted}
        self._num_live += sum(p.numel for p in wanted)
        handle = _Handle(len(wanted), sum(padded.values()), wanted)
        for p in wanted:
            self._in_flight[p] = handle
        self._add(handle.buffer_bytes)
        if self._limits.from_host:
            self.peak = max(self.peak, self.num_bytes + handle.buffer_bytes // self._ranks)

    def _await(self, parameter: Parameter) -> None:
        handle = self._in_flight.pop(parameter)
        handle.waiting -= 1
        if not handle.is_complete:
            handle.is_complete = True
            is_alone = len(handle.parameters) == 1
            for p in handle.parameters:
                # Alone, it stays in the buffer.
                self._own_bytes[p] = handle.buffer_bytes if is_alone else p.numel * p.itemsize
                self._available.add(p)
                if not is_alone:
                    self._add(self._own_bytes[p])
            if is_alone:
                handle.buffer_bytes = 0
        if not handle.waiting:
            self.num_bytes -= handle.buffer_bytes

    def _is_missing(self, parameter: Parameter) -> bool:
        return parameter not in self._available and parameter not in self._in_flight

    def begin(self, module: Module, *, is_forward: bool, repeats: bool) -> None:
        """The module is about to compute."""
        if not is_forward:
            self._backward.append(module)
        missing = [p for p in module.parameters if self._is_missing(p)]
        if missing:
            self._gather(missing)
        for p in module.parameters:
            self._readers.setdefault(p, set()).add(module)
            if repeats and self._backward and not p.requires_grad:
                # It stays until the backward that asked for the repetition has ended.
                self._repeated.setdefault(self._backward[-1], set()).add(p)
                self._readers[p].add(self._backward[-1])
            if p in self._in_flight:
                self._await(p)
        unseen = {p for p in module.parameters if self._recent.get(p, -1) < self._step}
        while self._queue and unseen:
            p, step = self._queue.popleft()
            self._recent[p] = step
            unseen.discard(p)
        self._prefetch()
        self._step += 1

    def _prefetch(self) -> None:
        room = min(self._limits.live - self._num_live, self._limits.prefetch)
        wanted: list[Parameter] = []
        taken = 0
        while self._queue and taken < room:
            p, step = self._queue.popleft()
            self._recent[p] = max(self._recent.get(p, -1), step)
            if self._is_missing(p) and p not in wanted:
                wanted.append(p)
                taken += p.numel
        if wanted:
            self._gather(wanted)

    def _read_soon(self) -> set[Parameter]:
        found: set[Parameter] = set()
        passed = 0
        for module in self._steps[self._step :]:
            if passed >= self._limits.reuse:
                break
            found.update(module.parameters)
            passed += sum(p.numel for p in module.parameters)
        return found

    def end(self, module: Module, *, is_forward: bool) -> None:
        """The module has computed."""
        soon = self._read_soon()
        to_release = {p for p in module.parameters if self._recent.get(p, -1) <= self._step and p not in soon}
        if not is_forward:
            to_release |= self._repeated.pop(module, set())
            if module in self._backward:
                self._backward.remove(module)
        for p in {*module.parameters, *to_release}:
            readers = self._readers.setdefault(p, set())
            readers.discard(module)
            if p in to_release and not p.persists and not readers and p in self._available:
                self._available.discard(p)
                self._num_live -= p.numel
                self.num_bytes -= self._own_bytes.pop(p)


def walk(
    root: Module,
    ranks: int,
    limits: Limits,
    *,
    repeated: frozenset[str] = frozenset(),
    ends_at: str | None = None,
    is_first_step: bool = False,
) -> Gathered:
    """Forward and backward of ``root``.

    Args:
        root: the model.
        ranks: over which each parameter is cut.
        limits: of DeepSpeed.
        repeated: names of the modules whose forward is repeated in backward (gradient checkpointing).
        ends_at: backward does not go below this module; None: through all.
        is_first_step: whether small parameters are still in shards, too: they are whole from the first step on. What is
            told includes them then.
    """
    found = Gathered()
    if ranks == 1:
        return found
    events = [*forward_events(root, True), *backward_events(root, repeated, ends_at)]
    steps = [event.module for event in events if event.begins]
    order = [(p, step) for step, module in enumerate(steps) for p in module.parameters]
    coordinator = _Coordinator(ranks, limits, order, steps, is_first_step)
    # Of modules that have begun and not ended; a repetition's lie above the one that asked for it.
    at_work: list[Event] = []
    for event in events:
        coordinator.peak = coordinator.num_bytes
        if event.begins:
            if event.is_forward and at_work and _is_last_of(event.module, at_work[-1].module):
                _note(found, at_work[-1], coordinator)
            at_work.append(event)
            coordinator.begin(
                event.module, is_forward=event.is_forward, repeats=event.is_forward and not event.in_forward
            )
        else:
            coordinator.end(event.module, is_forward=event.is_forward)
            # And what a repetition has begun inside of it.
            begun = [(each.module, each.is_forward) for each in at_work]
            del at_work[begun.index((event.module, event.is_forward)) :]
        (found.forward if event.in_forward else found.backward)["end"] = coordinator.num_bytes
        if not at_work:
            continue
        inner, is_end = at_work[-1].module, not event.begins and not event.is_forward
        if inner.parameters or not inner.children or (is_end and _is_last_of(event.module, inner)):
            _note(found, at_work[-1], coordinator)
    return found


def _is_last_of(module: Module, block: Module) -> bool:
    """Whether a module is the last of a block that has no parameters of its own."""
    return not block.parameters and bool(block.children) and block.children[-1] is module


def _note(found: Gathered, at_work: Event, coordinator: _Coordinator) -> None:
    """Bytes while a module is at work."""
    module, name = at_work.module, at_work.module.name
    held, copying = found.backward, found.copying
    if at_work.in_forward:
        held, copying = found.forward, found.copying_forward
    elif at_work.is_forward:
        held, copying = found.repeated, found.copying_repeated
    # A linear with an adapter adds both up when what is within it has ended.
    most = 0 if at_work.is_forward and module.children else held.get(name, 0)
    held[name] = max(most, coordinator.num_bytes)
    copying[name] = max(copying.get(name, 0), coordinator.peak)
