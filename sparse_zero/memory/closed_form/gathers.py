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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, kw_only=True)
class Parameter:
    """One parameter that the ranks hold in shards."""

    # Entries, and bytes of each.
    numel: int
    itemsize: int
    requires_grad: bool = False
    # Whether it is small, and stays whole from step to step.
    persists: bool = False


@dataclass(eq=False, kw_only=True)
class Module:
    """A module with the parameters that are its own."""

    name: str
    parameters: Sequence[Parameter] = ()
    children: Sequence[Module] = ()
    # Whether its input requires grad: else nothing tells when its backward has ended.
    input_requires_grad: bool = True
    has_backward: bool = True


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


@dataclass(frozen=True, kw_only=True)
class _Event:
    module: Module
    begins: bool
    is_forward: bool
    # Whether it belongs to the pass of forward, and not to a repetition in backward.
    in_forward: bool


@dataclass(kw_only=True)
class Gathered:
    """Bytes that are gathered."""

    # The most while a module computes, by its name; "end": when the pass has ended.
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    # The most before it computes, while parameters are copied out of the buffer they arrived in.
    copying_forward: dict[str, int] = field(default_factory=dict)
    copying: dict[str, int] = field(default_factory=dict)


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


def _forward(module: Module, in_forward: bool) -> Iterator[_Event]:
    yield _Event(module=module, begins=True, is_forward=True, in_forward=in_forward)
    for child in module.children:
        yield from _forward(child, in_forward)
    yield _Event(module=module, begins=False, is_forward=True, in_forward=in_forward)


def _repetition(module: Module) -> list[_Event]:
    """Forward of what a checkpointed module calls, up to the last thing that backward needs: that has no end."""
    events = [event for child in module.children for event in _forward(child, False)]
    last = max((number for number, event in enumerate(events) if event.begins and event.module.parameters), default=-1)
    return events[: last + 1]


def _backward(module: Module, repeated: frozenset[str], ends_at: str | None) -> Iterator[_Event]:
    """Last in, first out; a module named in ``repeated`` is computed again when its innermost last one begins."""
    yield _Event(module=module, begins=True, is_forward=False, in_forward=False)
    pending = module.name in repeated
    for event in _children_backward(module, repeated, ends_at):
        yield event
        # The first module with parameters of its own asks for what forward has not kept.
        if pending and event.begins and event.module.parameters:
            pending = False
            yield from _repetition(module)
    if module.input_requires_grad:
        yield _Event(module=module, begins=False, is_forward=False, in_forward=False)


def _children_backward(module: Module, repeated: frozenset[str], ends_at: str | None) -> Iterator[_Event]:
    for child in reversed(module.children):
        if not child.has_backward:
            continue
        yield from _backward(child, repeated, ends_at)
        if child.name == ends_at:
            return


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
    events = [*_forward(root, True), *_backward(root, repeated, ends_at)]
    steps = [event.module for event in events if event.begins]
    order = [(p, step) for step, module in enumerate(steps) for p in module.parameters]
    coordinator = _Coordinator(ranks, limits, order, steps, is_first_step)
    # Of modules that have begun and not ended; a repetition's lie above the one that asked for it.
    at_work: list[Module] = []
    for event in events:
        held, copying = (found.forward, found.copying_forward) if event.in_forward else (found.backward, found.copying)
        coordinator.peak = coordinator.num_bytes
        if event.begins:
            at_work.append(event.module)
            coordinator.begin(
                event.module, is_forward=event.is_forward, repeats=event.is_forward and not event.in_forward
            )
        else:
            coordinator.end(event.module, is_forward=event.is_forward)
            # And what a repetition has begun inside of it.
            del at_work[at_work.index(event.module) :]
        name = at_work[-1].name if at_work else "end"
        held[name] = max(held.get(name, 0), coordinator.num_bytes)
        copying[name] = max(copying.get(name, 0), coordinator.peak)
        held["end"] = coordinator.num_bytes
    return found
