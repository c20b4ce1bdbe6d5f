"""Which of the competing regions does a divided budget choose?

Every part of the budget has a ranking of its own. With floors, each layer first takes the longest prefix of its own
ranking that fits its floor, and the others follow in the part's ranking; with caps, a layer is passed over from the
first region on that does not fit its cap. Then the longest prefix that fits the part is chosen.

Only the front of a ranking is sorted: of two million regions, a budget of a percent takes some thousands.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import BudgetConfig, Kind
from sparse_zero.selection.ranking import Order, RegionTable, smallest_margin, take_order
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.shares import Layers, Limit, Parts, share_of


def _members(scope_of: Sequence[int], num_scopes: int) -> list[Tensor]:
    """For each scope its candidates, ascending; those with scope -1 are in none."""
    found: list[list[int]] = [[] for _ in range(num_scopes)]
    for at, scope in enumerate(scope_of):
        if scope >= 0:
            found[scope].append(at)
    return [torch.tensor(members) for members in found]


def _count(scope: Tensor, num_scopes: int) -> Tensor:
    """[P]: how often each scope occurs; -1 is none."""
    return torch.bincount(scope[scope >= 0], minlength=num_scopes)


def _region_size(c: Candidates) -> int:
    """Entries of a region, ragged edges aside."""
    return {"block": c.block_shape[0] * c.block_shape[1], "row": c.shape[1]}.get(c.kind, c.shape[0])


class Competition:
    """The competing regions under a divided budget."""

    def __init__(
        self,
        competing: Sequence[Candidates],
        scores: Mapping[tuple[str, Kind], Tensor],
        taken: Mapping[str, WeightSelection],
        parts: Parts,
        limit: Limit,
    ) -> None:
        self.table = RegionTable(competing, taken)
        self.scores = torch.cat([scores[c.weight, c.kind] for c in competing])
        self.parts, self.limit, self.pick = parts, limit, competing[0].pick

    def _scope_scores(self, members: Tensor) -> Tensor:
        """Scores of the regions of some candidates, in the order of ``RegionTable.regions_of``."""
        table = self.table
        starts, numbers = table.starts[members].tolist(), table.num_regions[members].tolist()
        return torch.cat([self.scores[start : start + number] for start, number in zip(starts, numbers, strict=True)])

    def front(self, members: Tensor, at_most: int) -> tuple[Tensor, bool]:
        """The first regions of a scope's ranking, and whether these are all that may be chosen."""
        scores = self._scope_scores(members)
        front = self.table.regions_of(members)[take_order(scores, self.pick, at_most)]
        return front, len(front) < at_most

    def _enough(self, members: Tensor, amount: int) -> int:
        """How many regions to look at first: what fits, if none overlap, and the next one from either end."""
        if self.limit.unit == "regions":
            return amount + 2
        smallest = min(_region_size(self.table.candidates[at]) for at in members.tolist())
        return amount // smallest + 2

    def longest(self, order: Order, amounts: Sequence[int], says: Sequence[str]) -> Tensor:
        """[P] lengths; raises where an amount is less than the first region of its scope."""
        lengths = order.longest(torch.tensor(amounts), self.limit.unit)
        for scope in ((lengths == 0) & (order.num_regions > 0)).nonzero().flatten().tolist():
            first = int(order.regions[order.starts[scope]])
            needed = order.num_entries((torch.arange(len(lengths)) == scope).long())[scope]
            size = f", which takes {int(needed):,}" if self.limit.unit == "parameters" else ""
            raise InputError(
                f"{says[scope]}, less than one region ({self.table.describe(first)}{size}): "
                "raise it or use smaller regions"
            )
        return lengths

    def rankings(
        self,
        scopes: Sequence[Tensor],
        amounts: Sequence[int],
        says: Sequence[str],
        arrange: Callable[[list[Tensor]], list[Tensor]] = list,
        *,
        whole: bool = False,
    ) -> tuple[Order, Tensor]:
        """The front of every scope's ranking that holds all that fits, and how many these are.

        Args:
            scopes: the candidates of each.
            amounts: what fits, for each.
            says: what an error says of each amount.
            arrange: changes the fronts before they are filled.
            whole: take the whole rankings.
        """
        wanted = [self._enough(members, amount) for members, amount in zip(scopes, amounts, strict=True)]
        if whole:
            wanted = [int(self.table.num_regions[members].sum()) + 1 for members in scopes]
        found = [self.front(members, number) for members, number in zip(scopes, wanted, strict=True)]
        while True:
            order = Order(self.table, arrange([front for front, _ in found]))
            lengths = self.longest(order, amounts, says)
            short = [
                at
                for at, (length, number) in enumerate(zip(lengths.tolist(), order.num_regions.tolist(), strict=True))
                if length + 2 > number and not found[at][1]
            ]
            if not short:
                return order, lengths
            # Overlaps, or layers at their caps: look further.
            for at in short:
                wanted[at] *= 4
                found[at] = self.front(scopes[at], wanted[at])

    def run(self, budget: BudgetConfig, layers: Layers | None) -> tuple[Tensor, Tensor, float | None]:
        """Choose.

        Returns:
            chosen regions by number; what each part uses of its amount [P]; the smallest margin among the cuts.
        """
        parts = self.parts.parts
        scopes = _members(self.parts.part_of, len(parts))
        bounds = None if layers is None else _Bounds(self, budget, layers)
        order, lengths = self.rankings(
            scopes,
            [part.amount for part in parts],
            [part.says for part in parts],
            list if bounds is None else bounds.arrange,
            # Without the floors, a front of a mixed ranking may end in regions from one end only.
            whole=bounds is not None and self.pick == "mixed",
        )
        self._require_eligible(order, budget)
        used = lengths if self.limit.unit == "regions" else order.num_entries(lengths)
        chosen = order.front(lengths)
        is_chosen = torch.zeros(len(self.scores), dtype=torch.bool)
        is_chosen[chosen] = True
        fronts = torch.split(order.regions, order.num_regions.tolist())
        if bounds is not None:
            # Floors are cut within their layers: in the ranking they were no choice.
            fronts = tuple(front[~bounds.in_floor[front]] for front in fronts)
        margins = [smallest_margin(self.scores[front], is_chosen[front]) for front in fronts]
        if bounds is not None:
            margins += bounds.margins(chosen, is_chosen)
        return chosen, used, min((margin for margin in margins if margin is not None), default=None)

    def _require_eligible(self, order: Order, budget: BudgetConfig) -> None:
        """Raise for a group none of whose regions may be chosen."""
        numbers = order.num_regions.tolist()
        eligible = {part.group for part, number in zip(self.parts.parts, numbers, strict=True) if number}
        for number in set(range(len(self.parts.groups))) - eligible:
            where = f" of the group {', '.join(budget.groups[number].modules)}" if budget.groups else ""
            raise InputError(
                f"selection.score {self.table.candidates[0].score} is -inf for every competing region{where}: "
                "none may be chosen; use another score or other regions"
            )


class _Bounds:
    """Floors and caps of the layers of a competition."""

    def __init__(self, competition: Competition, budget: BudgetConfig, layers: Layers) -> None:
        self.competition, self.table, self.budget, self.layers = competition, competition.table, budget, layers
        self.layer = torch.tensor(layers.layer_of)  # [K]
        self.scopes = _members(layers.layer_of, len(layers.keys))
        self.in_floor = torch.zeros(len(competition.scores), dtype=torch.bool)
        self.floors = [torch.zeros(0, dtype=torch.int64) for _ in layers.keys]
        # Regions in each layer that its cap allows, of those that were looked at; -1 without caps.
        self.num_below_cap = torch.full((len(layers.keys),), -1)
        low, high = budget.min_share_per_layer, budget.max_share_per_layer
        if low is not None:
            order, lengths = competition.rankings(self.scopes, *self._amounts("min_share_per_layer", low))
            fronts = torch.split(order.regions, order.num_regions.tolist())
            self.floors = [front[:length] for front, length in zip(fronts, lengths.tolist(), strict=True)]
            self.in_floor[order.front(lengths)] = True
        elif high is not None and competition.pick != "mixed":
            # The first region of every layer must fit its cap, and the fronts of the parts may not go down to it.
            # (A mixed ranking is taken as a whole, and what comes first of a layer there is not the layer's best.)
            firsts = [competition.front(members, 1)[0] for members in self.scopes]
            competition.longest(Order(self.table, firsts), *self._amounts("max_share_per_layer", high))

    def _amounts(self, name: str, share: float) -> tuple[list[int], list[str]]:
        """What a share of its group's amount is for every layer, as a number and in words."""
        competition = self.competition
        amounts = [share_of(share, competition.parts.groups[group]) for group, _ in self.layers.keys]
        says = [
            f"selection.budget.{name} is {share:g}, that is {competition.limit.says(amount)} in layer {layer}"
            for amount, (_, layer) in zip(amounts, self.layers.keys, strict=True)
        ]
        return amounts, says

    def arrange(self, fronts: list[Tensor]) -> list[Tensor]:
        """Put what fills the floors first in every part, and drop what exceeds the caps."""
        keys, high = self.layers.keys, self.budget.max_share_per_layer
        # Parts are groups here: the config refuses shares for layers together with equal parts for matrices.
        fronts = [
            torch.cat(
                [floor for floor, (group, _) in zip(self.floors, keys, strict=True) if group == number]
                + [front[~self.in_floor[front]]]
            )
            for number, front in enumerate(fronts)
        ]
        if high is None:
            return fronts
        order = torch.cat(fronts)
        layer = self._layer_of(order)
        by_layer = torch.argsort(layer, stable=True)
        inside = order[by_layer[layer[by_layer] >= 0]]
        capped = Order(self.table, torch.split(inside, _count(layer, len(keys)).tolist()))
        self.num_below_cap = self.competition.longest(capped, *self._amounts("max_share_per_layer", high))
        is_dropped = torch.zeros(len(self.in_floor), dtype=torch.bool)
        is_dropped[inside] = True
        is_dropped[capped.front(self.num_below_cap)] = False
        return [front[~is_dropped[front]] for front in fronts]

    def margins(self, chosen: Tensor, is_chosen: Tensor) -> list[float | None]:
        """The margins within the layers that got no more than their floor, or as much as their cap."""
        taken = _count(self._layer_of(chosen), len(self.scopes))
        at_bound = taken == self.num_below_cap
        if self.budget.min_share_per_layer is not None:
            at_bound |= taken == torch.tensor([len(floor) for floor in self.floors])
        return [
            smallest_margin(self.competition.scores[regions], is_chosen[regions])
            for members, is_at_bound in zip(self.scopes, at_bound.tolist(), strict=True)
            if is_at_bound
            for regions in [self.table.regions_of(members)]
        ]

    def _layer_of(self, regions: Tensor) -> Tensor:
        return self.layer[self.table.candidate_of(regions)]
