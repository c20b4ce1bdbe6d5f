"""Which regions of which weights may be chosen: patterns resolved against a real model, and checked?"""

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sparse_zero.errors import InputError
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.config import KINDS, Kind, RegionConfig, Score, SelectionConfig
from sparse_zero.selection.regions import grid_shape


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All regions of one kind in one weight."""

    # Module and weight name; shape is (out, in).
    module: str
    weight: str
    shape: tuple[int, int]
    kind: Kind
    # Side of the blocks; 0 for rows and columns.
    block_size: int
    score: Score
    # Number fixed for this weight, or None where the regions compete for the budget.
    per_matrix: int | None

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the regions' scores: (grid rows, grid columns) for blocks, (number,) otherwise."""
        if self.kind == "block":
            return grid_shape(self.shape, self.block_size)
        return (self.shape[0],) if self.kind == "row" else (self.shape[1],)


def expand_braces(pattern: str) -> list[str]:
    """Every alternative of ``{a,b}`` groups: ``*.{q,k}_proj`` gives ``*.q_proj`` and ``*.k_proj``."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [full for option in match.group(1).split(",") for full in expand_braces(head + option + tail)]


def match_modules(patterns: Sequence[str], module_map: ModuleMap) -> list[str]:
    """The linears that match, in the order of the model.

    Raises:
        InputError: an alternative of a pattern matches no linear.
    """
    matched: set[str] = set()
    for pattern in patterns:
        for alternative in expand_braces(pattern):
            found = [name for name in module_map.linears if fnmatchcase(name, alternative)]
            if not found:
                endings = sorted({name.rpartition(".")[2] for name in module_map.linears})
                near = difflib.get_close_matches(alternative.rpartition(".")[2], endings, n=1)
                hint = f"did you mean '*.{near[0]}'?" if near else f"linears end in {', '.join(endings)}"
                raise InputError(f"selection.regions.modules pattern {alternative!r} matches no linear: {hint}")
            matched.update(found)
    return [name for name in module_map.linears if name in matched]


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter that several modules share, by each of its names: all its names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def check_trainable_linear(model: nn.Module, module: str, tied: dict[str, list[str]]) -> nn.Linear:
    """The linear of that name, if values can replace entries of its weight.

    Raises:
        InputError: no such linear, or its weight is tied to another module's (the other use would miss
            the update and the gradient).
    """
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        raise InputError(f"the model has no module {module!r}: the selection belongs to another model") from None
    if hasattr(getattr(linear, "weight", None), "ds_id"):
        raise InputError(
            f"the weight of {module!r} is sharded by ZeRO-3: select and sparsify before the weights are partitioned"
        )
    if type(linear) is not nn.Linear:
        raise InputError(f"module {module!r} is a {type(linear).__name__}, not a torch.nn.Linear: leave it out")
    if f"{module}.weight" in tied:
        others = ", ".join(name for name in tied[f"{module}.weight"] if name != f"{module}.weight")
        raise InputError(
            f"the weight of {module!r} is tied to {others}: "
            "a tied weight cannot be selected as a linear; leave it out of selection.regions.modules"
        )
    return linear


def _layer_bounds(region: RegionConfig, num_layers: int) -> tuple[int, int]:
    low = 0 if region.min_layer is None else region.min_layer
    high = num_layers - 1 if region.max_layer is None else region.max_layer
    for name, value in (("min_layer", region.min_layer), ("max_layer", region.max_layer)):
        if value is not None and not -num_layers <= value < num_layers:
            raise InputError(
                f"selection.regions.{name} is {value}: the model has layers 0 to {num_layers - 1} "
                f"(or -{num_layers} to -1)"
            )
    return (low + num_layers if low < 0 else low), (high + num_layers if high < 0 else high)


def find_candidates(model: nn.Module, config: SelectionConfig, module_map: ModuleMap) -> list[Candidates]:
    """Everything that ``config`` lets compete in ``model``, sorted by weight name, then kind.

    Raises:
        InputError: a pattern that matches nothing, no layer left, a tied weight, a block larger than a matrix,
            more regions per matrix than there are, or one weight and kind in two families.
    """
    tied = tied_names(model)
    found: dict[tuple[str, Kind], Candidates] = {}
    for region in config.regions:
        modules = match_modules(region.modules, module_map)
        if region.min_layer is not None or region.max_layer is not None:
            low, high = _layer_bounds(region, module_map.num_layers)
            modules = [name for name in modules if low <= module_map.layer_of.get(name, -1) <= high]
            if not modules:
                raise InputError(
                    f"selection.regions has no layer between min_layer {low} and max_layer {high}: widen it"
                )
        for module in modules:
            weight = check_trainable_linear(model, module, tied).weight
            shape = (weight.shape[0], weight.shape[1])
            size = region.block_size or 0
            if size > min(shape):
                raise InputError(
                    f"selection.regions.block_size is {size}, larger than the weight of {module!r} "
                    f"({shape[0]}x{shape[1]}): use at most {min(shape)}"
                )
            candidates = Candidates(
                module=module,
                weight=f"{module}.weight",
                shape=shape,
                kind=region.kind,
                block_size=size,
                score=config.score_of(region),
                per_matrix=region.per_matrix,
            )
            total = 1
            for extent in candidates.grid:
                total *= extent
            if region.per_matrix is not None and region.per_matrix > total:
                raise InputError(
                    f"selection.regions.per_matrix is {region.per_matrix} but {module!r} has only {total} "
                    f"{region.kind} regions: lower it"
                )
            key = (candidates.weight, candidates.kind)
            if key in found:
                raise InputError(
                    f"selection.regions names the {region.kind} regions of {module!r} twice: keep one of the families"
                )
            found[key] = candidates
    return [found[key] for key in sorted(found, key=lambda key: (key[0], KINDS.index(key[1])))]
