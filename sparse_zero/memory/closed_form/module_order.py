"""In which order do the modules of a decoder begin and end, in forward and in backward?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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
class Event:
    """A module begins or ends to compute."""

    module: Module
    begins: bool
    is_forward: bool
    # Whether it belongs to the pass of forward, and not to a repetition in backward.
    in_forward: bool


def forward_events(module: Module, in_forward: bool) -> Iterator[Event]:
    """A module, and within it those that it calls."""
    yield Event(module=module, begins=True, is_forward=True, in_forward=in_forward)
    for child in module.children:
        yield from forward_events(child, in_forward)
    yield Event(module=module, begins=False, is_forward=True, in_forward=in_forward)


def _repetition(module: Module) -> list[Event]:
    """Forward of what a checkpointed module calls, up to the last thing that backward needs: that has no end."""
    events = [event for child in module.children for event in forward_events(child, False)]
    last = max((number for number, event in enumerate(events) if event.begins and event.module.parameters), default=-1)
    return events[: last + 1]


def backward_events(module: Module, repeated: frozenset[str], ends_at: str | None) -> Iterator[Event]:
    """Last in, first out; a module named in ``repeated`` is computed again when its innermost last one begins."""
    yield Event(module=module, begins=True, is_forward=False, in_forward=False)
    pending = module.name in repeated
    for event in _inner_backward(module, repeated, ends_at):
        yield event
        # The first module with parameters of its own asks for what forward has not kept.
        if pending and event.begins and event.module.parameters:
            pending = False
            yield from _repetition(module)
    if module.input_requires_grad:
        yield Event(module=module, begins=False, is_forward=False, in_forward=False)


def _inner_backward(module: Module, repeated: frozenset[str], ends_at: str | None) -> Iterator[Event]:
    for child in reversed(module.children):
        if not child.has_backward:
            continue
        yield from backward_events(child, repeated, ends_at)
        if child.name == ends_at:
            return
