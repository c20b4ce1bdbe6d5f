"""What is held at one moment of a job, as named terms?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sparse_zero.memory.simulation.timeline import Kind, Place

# In the order of a run; the same names as in a simulation.
Phase = Literal["load", "calibration", "engine", "forward", "backward", "step", "save"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of what is held at a moment."""

    # In the words of the docs: "base weights", "kept activations: attention", "logits and loss".
    name: str
    kind: Kind
    num_bytes: int
    place: Place = "device"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is held at a moment of a phase at which it may be most."""

    phase: Phase
    # "loss", "backward of the first layer".
    name: str
    terms: tuple[Term, ...]
    # Full name of the module at work, if it is one of a layer: "model.layers.31.mlp.down_proj". In backward, gradients
    # of what comes behind it are there, and its own come into being.
    module: str = ""
    # Whether that module is computed once more, in a backward whose forward kept nothing of it.
    repeats: bool = False

    def num_bytes(self, place: Place = "device") -> int:
        """The sum of the terms in one place."""
        return sum(term.num_bytes for term in self.terms if term.place == place)

    def by_name(self, *places: Place) -> dict[str, int]:
        """Sums of the terms in these places, by name; names without any are left out."""
        found: dict[str, int] = {}
        for term in self.terms:
            if term.place in places and term.num_bytes:
                found[term.name] = found.get(term.name, 0) + term.num_bytes
        return found

    def by_kind(self, place: Place = "device") -> dict[Kind, int]:
        """Sums of the terms by kind; kinds without any are left out."""
        found: dict[Kind, int] = {}
        for term in self.terms:
            if term.place == place and term.num_bytes:
                found[term.kind] = found.get(term.kind, 0) + term.num_bytes
        return found
