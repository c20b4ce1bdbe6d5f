"""How much of the budget does each group, matrix and layer get?

Known before there are scores, so that a budget which cannot be met is refused before data are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_zero.errors import InputError
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.candidates import Candidates, match_matrices
from sparse_zero.selection.config import BudgetConfig
from sparse_zero.selection.ranking import Unit


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The whole budget in what it is counted in."""

    amount: int
    unit: Unit

    def says(self, amount: int) -> str:
        """An amount in words: ``1,000 parameters``."""
        return f"{amount:,} {self.unit}"


@dataclass(frozen=True)
class Part:
    """A share of the budget with a ranking of its own."""

    group: int
    amount: int
    # How an error names it: "selection.budget allows".
    says: str


@dataclass(frozen=True)
class Parts:
    """The division of what is left for the competition. By candidate: index of its group, its part."""

    groups: tuple[int, ...]  # amount of each group; a single one without groups
    group_of: list[int]
    parts: list[Part]
    part_of: list[int]


@dataclass(frozen=True)
class Layers:
    """The layers of every group with candidates, numbered through; (group, layer) is the scope of floors and caps."""

    keys: list[tuple[int, int]]
    layer_of: list[int]  # by candidate; -1 outside of layers


def share_of(share: float, amount: int) -> int:
    """A share of an amount, rounded down."""
    # 0.29 * 100 is 28.999999999999996: the share is meant as written.
    return math.floor(share * amount + 1e-6)


def resolve_budget(budget: BudgetConfig, num_parameters_model: int, bytes_per_parameter: int) -> Limit:
    """The budget of a model as a number of parameters, or of regions.

    Raises:
        InputError: the budget is larger than the model.
    """
    if budget.regions is not None:
        return Limit(amount=budget.regions, unit="regions")
    if budget.fraction is not None:
        return Limit(amount=share_of(budget.fraction, num_parameters_model), unit="parameters")
    for name, value, of_model in (
        ("parameters", budget.parameters, num_parameters_model),
        ("bytes", budget.bytes, num_parameters_model * bytes_per_parameter),
    ):
        if value is not None and value > of_model:
            raise InputError(f"selection.budget.{name} is {value:,}, more than the model's {of_model:,}: lower it")
    if budget.bytes is not None:
        return Limit(amount=budget.bytes // bytes_per_parameter, unit="parameters")
    assert budget.parameters is not None
    return Limit(amount=budget.parameters, unit="parameters")


def _group_of(competing: Sequence[Candidates], budget: BudgetConfig, module_map: ModuleMap) -> list[int]:
    """Index of the group of every candidate; all are in the first one where there are no groups."""
    if not budget.groups:
        return [0] * len(competing)
    named: dict[str, int] = {}
    candidates = {c.matrix.parameter for c in competing}
    for number, group in enumerate(budget.groups):
        matched = match_matrices(group.modules, module_map, "selection.budget.groups.modules")
        for matrix in matched:
            if matrix.parameter in candidates and named.setdefault(matrix.parameter, number) != number:
                other = budget.groups[named[matrix.parameter]]
                raise InputError(
                    f"selection.budget.groups {', '.join(other.modules)} and {', '.join(group.modules)} both have "
                    f"{matrix.name!r}: let every matrix be in one group"
                )
        if not candidates.intersection(matrix.parameter for matrix in matched):
            raise InputError(
                f"selection.budget.groups {', '.join(group.modules)} has a share of {group.share:g} and no matrix "
                "whose regions compete: remove the group, or add its matrices to selection.regions without per_matrix"
            )
    for c in competing:
        if c.matrix.parameter not in named:
            raise InputError(
                f"selection.budget.groups has no group for {c.matrix.name!r}, whose regions compete: "
                "add a pattern for it"
            )
    return [named[c.matrix.parameter] for c in competing]


def find_layers(competing: Sequence[Candidates], group_of: Sequence[int], module_map: ModuleMap) -> Layers:
    """Which layer of which group every candidate lies in."""
    places = [
        None if (layer := module_map.layer_of.get(c.matrix.name)) is None else (group, layer)
        for c, group in zip(competing, group_of, strict=True)
    ]
    keys = sorted({place for place in places if place is not None})
    number = {key: at for at, key in enumerate(keys)}
    return Layers(keys, [-1 if place is None else number[place] for place in places])


def check_layers(budget: BudgetConfig, layers: Layers) -> None:
    """Raise if nothing lies in a layer that has a floor or a cap, or if the floors take more than there is."""
    low, high = budget.min_share_per_layer, budget.max_share_per_layer
    for name, value in (("min_share_per_layer", low), ("max_share_per_layer", high)):
        if value is not None and not layers.keys:
            raise InputError(
                f"selection.budget.{name} is {value:g}, but no matrix whose regions compete lies in a layer: remove it"
            )
    for group in sorted({group for group, _ in layers.keys}):
        number = sum(key[0] == group for key in layers.keys)
        if low is not None and number * low > 1.0 + 1e-12:
            where = f" of {', '.join(budget.groups[group].modules)}" if budget.groups else ""
            raise InputError(
                f"selection.budget.min_share_per_layer is {low:g} and {number} layers{where} compete, which takes "
                f"{number * low:g} of the budget: use at most {1 / number:.4g}"
            )


def check_budget(
    candidates: Sequence[Candidates],
    budget: BudgetConfig | None,
    *,
    module_map: ModuleMap,
    num_parameters_model: int,
    bytes_per_parameter: int = 16,
) -> None:
    """Raise what can be wrong with a budget before there are scores; reads neither weights nor data.

    The choice itself raises the same.

    Raises:
        InputError: the budget is larger than the model, groups do not partition the competing matrices, floors
            add up to more than the budget, or floors or caps meet no layer.
    """
    if budget is None:
        return
    resolve_budget(budget, num_parameters_model, bytes_per_parameter)
    competing = [c for c in candidates if c.per_matrix is None]
    if competing:
        check_layers(budget, find_layers(competing, _group_of(competing, budget, module_map), module_map))


def divide(
    competing: Sequence[Candidates], budget: BudgetConfig, module_map: ModuleMap, limit: Limit, fixed: int
) -> Parts:
    """Split what the fixed regions leave into groups, and these into matrices."""
    left = limit.amount - fixed
    after = f", of which the fixed regions take {fixed:,} and leave {left:,}" if fixed else ""
    whole_says = f"selection.budget allows {limit.says(limit.amount)}{after}"
    group_of = _group_of(competing, budget, module_map)
    amounts, says = [left], [whole_says]
    if budget.groups:
        amounts = []
        for group in budget.groups:
            # Shares may add up to a little more than 1, as they were written: never to more than there is.
            amounts.append(min(share_of(group.share, left), left - sum(amounts)))
        says = [
            f"{whole_says}; the group {', '.join(group.modules)} gets {amount:,} of them"
            for group, amount in zip(budget.groups, amounts, strict=True)
        ]
    if budget.over == "all":
        parts = [Part(number, amount, says[number]) for number, amount in enumerate(amounts)]
        return Parts(tuple(amounts), group_of, parts, group_of)
    parts, part_of_weight = [], {}
    for number, amount in enumerate(amounts):
        names = dict.fromkeys(c.weight for c, group in zip(competing, group_of, strict=True) if group == number)
        each = amount // len(names)
        for name in names:
            part_of_weight[name] = len(parts)
            parts.append(Part(number, each, f"{says[number]}; each of {len(names):,} matrices gets {each:,}"))
    return Parts(tuple(amounts), group_of, parts, [part_of_weight[c.weight] for c in competing])
