"""Which bytes were alive at which moment of a run, of what kind, and made by which module?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# weights: the frozen base, or this rank's shards of it. gathered: what a collective filled from other ranks' shards.
# values: what is trained; gradients: theirs, and the buffers they are reduced in; optimizer: masters and moments.
# indices: where the values lie, and other buffers. activations: kept from forward for backward. logits: those of the
# output head and the loss. temporaries: everything that dies in the part of the step it was made in.
Kind = Literal[
    "weights", "gathered", "values", "gradients", "optimizer", "indices", "activations", "logits", "temporaries"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# device: what the model computes on. host: the memory of the machine around it. On a CPU all is "device".
Place = Literal["device", "host"]
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(kw_only=True)
class Storage:
    """One allocation. Moments are numbers of events: allocations and releases, counted together."""

    num_bytes: int
    born: int
    # None: it outlived the recording.
    died: int | None = None
    # The innermost module that was at work; "" for the model itself, and outside of it.
    module: str
    # Known from the start, or from an operation; None: follows from its life, see :func:`sort_out`.
    kind: Kind | None = None
    place: Place = "device"


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that lived at once."""

    num_bytes: int
    # Of those, by kind; kinds without any are left out.
    by_kind: dict[Kind, int]
    # The innermost module at work at that moment; "" outside of all.
    module: str
    # Number of events before that moment.
    event: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """One part of a run: the events from ``first`` to before ``end``."""

    phase: str
    # What :func:`sort_out` takes it for; the phase itself, except inside of a phase that has forward and backward.
    role: str
    first: int
    end: int


class Timeline:
    """What lived when: the result of a recording.

    Args:
        storages: all of them, each with a kind.
        spans: the parts of the run, in order.
        modules: the innermost module at work, for each event.
    """

    def __init__(self, storages: Sequence[Storage], spans: Sequence[Span], modules: Sequence[str]) -> None:
        self.storages = tuple(storages)
        self.spans = tuple(spans)
        self.modules = tuple(modules)
        # [events + 1, kinds] int64 of each place: bytes alive after each event, the first row before any.
        changes = {place: torch.zeros((len(modules) + 1, len(KINDS)), dtype=torch.int64) for place in PLACES}
        for storage in storages:
            assert storage.kind is not None
            column = KINDS.index(storage.kind)
            changes[storage.place][storage.born + 1, column] += storage.num_bytes
            if storage.died is not None:
                changes[storage.place][storage.died + 1, column] -= storage.num_bytes
        self.live: dict[Place, Tensor] = {place: found.cumsum(0) for place, found in changes.items()}
        self.total: dict[Place, Tensor] = {place: found.sum(1) for place, found in self.live.items()}

    def phases(self) -> list[str]:
        """The names of the parts, each once, in the order of their first time."""
        return list(dict.fromkeys(span.phase for span in self.spans))

    def _spans_of(self, phase: str) -> Iterator[Span]:
        found = [span for span in self.spans if span.phase == phase]
        if not found:
            raise KeyError(phase)
        yield from found

    def _at(self, event: int, place: Place) -> Peak:
        found = {kind: int(self.live[place][event, column]) for column, kind in enumerate(KINDS)}
        return Peak(
            num_bytes=int(self.total[place][event]),
            by_kind={kind: num_bytes for kind, num_bytes in found.items() if num_bytes},
            module=self.modules[event - 1] if event else "",
            event=event,
        )

    def peak(self, phase: str | None = None, place: Place = "device") -> Peak:
        """The largest sum in all parts of that name; default: in the whole recording.

        Raises:
            KeyError: no part has that name.
        """
        spans, total = self.spans if phase is None else tuple(self._spans_of(phase)), self.total[place]
        # The row before the first event counts: what lived when the part began.
        best = [span.first + int(total[span.first : span.end + 1].argmax()) for span in spans]
        return self._at(max(best, key=lambda event: int(total[event])), place)

    def at_end(self, phase: str, place: Place = "device") -> Peak:
        """What lived when the last part of that name ended.

        Raises:
            KeyError: no part has that name.
        """
        *_, last = self._spans_of(phase)
        return self._at(last.end, place)

    def kept(self, phase: str, kind: Kind = "activations", place: Place = "device") -> dict[str, int]:
        """Bytes of one kind that lived when the last part of that name ended, by the module that made them.

        Raises:
            KeyError: no part has that name.
        """
        *_, last = self._spans_of(phase)
        found: dict[str, int] = {}
        for each in self.storages:
            lives = each.born < last.end and (each.died is None or each.died >= last.end)
            if lives and (each.kind, each.place) == (kind, place):
                found[each.module] = found.get(each.module, 0) + each.num_bytes
        return found

    def sampled(self, num_rows: int = 2000) -> dict[str, Any]:
        """A table of what lived, for files and pictures: of equal runs of events, the moment at which most did.

        Args:
            num_rows: about how many, over all parts.

        Returns:
            By column: the part's name and number (of those with this name), the event, the module at work, and bytes
            by kind on the device; beside it ``kept``, the activations of the last forward by module.
        """
        rows: list[tuple[str, int, int]] = []
        seen: dict[str, int] = {}
        step = max(1, len(self.modules) // max(num_rows, 1))
        for span in self.spans:
            number = seen[span.phase] = seen.get(span.phase, -1) + 1
            for first in range(span.first, span.end + 1, step):
                run = self.total["device"][first : min(first + step, span.end + 1)]
                rows.append((span.phase, number, first + int(run.argmax())))
        events = [event for _, _, event in rows]
        live = self.live["device"][events]
        return {
            "phase": [phase for phase, _, _ in rows],
            "number": [number for _, number, _ in rows],
            "event": events,
            "module": [self.modules[event - 1] if event else "" for event in events],
            "bytes": {kind: live[:, column].tolist() for column, kind in enumerate(KINDS) if live[:, column].any()},
            "kept": self.kept("forward") if "forward" in seen else {},
        }

    def to_json(self) -> dict[str, Any]:
        """Peaks by part, for files and tables."""
        return {
            phase: {
                "peak_bytes": peak.num_bytes,
                "by_kind": peak.by_kind,
                "module": peak.module,
                "end_bytes": self.at_end(phase).num_bytes,
                "host_bytes": self.peak(phase, "host").num_bytes,
                "host_by_kind": self.peak(phase, "host").by_kind,
            }
            for phase in self.phases()
            for peak in [self.peak(phase)]
        }


def sort_out(storages: Sequence[Storage], spans: Sequence[Span], head: str | None) -> None:
    """Give every storage without a kind the one that follows from its life.

    What forward makes and leaves behind is activations, or logits, if the output head made it or the loss after it.
    What backward leaves behind is gradients. What any other part leaves behind stays: it is the optimizer's. All else
    is temporary.

    Args:
        storages: changed in place.
        spans: the parts of the run: those with the roles "forward" and "backward" among them.
        head: the name of the output head's module, as storages have it; None if there is none.
    """
    for storage in storages:
        if storage.kind is not None:
            continue
        span = next(span for span in reversed(spans) if span.first <= storage.born)
        if storage.died is not None and storage.died < span.end:
            storage.kind = "temporaries"
        elif span.role == "forward":
            storage.kind = "logits" if storage.module in ("", head) else "activations"
        else:
            storage.kind = "gradients" if span.role == "backward" else "optimizer"
