"""How many parameters has a task's model, and how many of them are its head, which the base's files lack?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.config import parse_as
from models.loading import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters, tied ones counted once."""

    total: int
    head: int


def head_size(shapes: Mapping[str, int], head: Sequence[str]) -> int:
    """Parameters whose names, or whose modules' names, match one of the patterns.

    Args:
        shapes: names of parameters, and how many numbers each has.
        head: patterns.

    Raises:
        InputError: one of them matches nothing.
    """
    from sparse_zero.selection.candidates import match_names

    return sum(shapes[name] for name in match_names(head, list(shapes), "head", "parameter"))


def model_sizes(section: Mapping[str, Any], head: Sequence[str]) -> Sizes:
    """Of the model that a section ``model`` describes, without loading weights.

    Raises:
        InputError: there is no such model, or no such head.
    """
    from models.skeleton import load_skeleton
    from sparse_zero.selection.select import num_parameters

    model = load_skeleton(parse_as(ModelConfig, section, "the task's model"))
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Sizes(total=num_parameters(model), head=head_size(shapes, head))
