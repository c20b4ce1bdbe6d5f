"""The choice under a budget: the same as a plain loop that marks entries one region at a time, and what is refused."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.module_map import Matrix, ModuleMap
from sparse_zero.selection.budget import Choice, choose, normalised
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import BudgetConfig, BudgetGroupConfig, Kind, Pick
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.shares import check_budget, resolve_budget

Key = tuple[str, Kind]
Region = tuple[str, Kind, int]  # weight, kind, flat index into the grid
KINDS: tuple[Kind, ...] = ("block", "row", "column")


def make_matrix(name: str, shape: tuple[int, int], num_slices: int | None = None) -> Matrix:
    return Matrix(name=name, owners=((name, "weight"),), shape=shape, num_slices=num_slices)


def make_map(matrices: Sequence[Matrix]) -> ModuleMap:
    return ModuleMap(
        matrices=tuple(matrices),
        layer_of={m.name: int(m.name.split(".")[1]) for m in matrices if m.name.startswith("layers.")},
        role_of={},
    )


def make_candidates(
    matrix: Matrix, kind: Kind, *, per_matrix: int | None = None, pick: Pick = "max", block: tuple[int, int] = (2, 2)
) -> list[Candidates]:
    return [
        Candidates(
            matrix=matrix,
            slice_index=slice_index,
            kind=kind,
            block_shape=block if kind == "block" else (0, 0),
            score="given",
            pick=pick,
            per_matrix=per_matrix,
        )
        for slice_index in ([None] if matrix.num_slices is None else range(matrix.num_slices))
    ]


@dataclass
class Problem:
    candidates: list[Candidates]
    scores: dict[Key, Tensor]
    budget: BudgetConfig
    module_map: ModuleMap
    whole: dict[str, WeightSelection] = field(default_factory=dict)
    num_parameters_model: int = 10**6

    def choose(self, **options: Any) -> Choice:
        settings: dict[str, Any] = {
            "module_map": self.module_map,
            "whole": self.whole,
            "num_parameters_model": self.num_parameters_model,
            "size_neutral": True,
        }
        return choose(self.candidates, self.scores, self.budget, **{**settings, **options})


def chosen_regions(weights: dict[str, WeightSelection]) -> set[Region]:
    found: set[Region] = set()
    for name, weight in weights.items():
        found |= {(name, "row", index) for index in weight.rows.tolist()}
        found |= {(name, "column", index) for index in weight.columns.tolist()}
        width = -(-weight.shape[1] // weight.block_shape[1]) if len(weight.blocks) else 0
        found |= {(name, "block", i * width + j) for i, j in weight.blocks.tolist()}
    return found


# -- the plain way


def plain_order(regions: Sequence[Region], scores: dict[Region, float], pick: Pick) -> list[Region]:
    """``regions`` are in the order in which ties fall."""
    falling = sorted(regions, key=lambda region: -scores[region])  # Python sorts are stable
    if pick == "max":
        return falling
    place = {region: at for at, region in enumerate(regions)}
    rising = sorted(regions, key=lambda region: (scores[region], place[region]))
    if pick == "min":
        return rising
    half = -(-len(falling) // 2)
    better, worse = falling[:half], [region for region in rising if region not in falling[:half]]
    mixed: list[Region] = []
    while better or worse:
        mixed += better[:1] + worse[:1]
        better, worse = better[1:], worse[1:]
    return mixed


class PlainChoice:
    """Regions one by one, entries marked in dense masks."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.budget = problem, problem.budget
        self.by_key = {(c.weight, c.kind): c for c in problem.candidates}
        self.masks = {c.weight: torch.zeros(c.shape, dtype=torch.bool) for c in problem.candidates}
        self.taken: list[Region] = []
        # Everything that is wrong: any of it may be reported.
        self.refusals: list[str] = []
        self.margins: list[float] = []
        self.scores = {
            (c.weight, c.kind, index): score
            for c in problem.candidates
            for index, score in enumerate(problem.scores[c.weight, c.kind].reshape(-1).tolist())
            if score != -math.inf
        }

    def entries(self, region: Region) -> Tensor:
        weight, kind, index = region
        mask = self.masks[weight]
        if kind == "row":
            return mask[index]
        if kind == "column":
            return mask[:, index]
        c = self.by_key[weight, kind]
        (height, width), (i, j) = c.block_shape, divmod(index, c.grid[1])
        return mask[i * height : (i + 1) * height, j * width : (j + 1) * width]

    def cost(self, region: Region) -> int:
        return 1 if self.budget.regions is not None else int((~self.entries(region)).sum())

    def take(self, region: Region) -> int:
        cost = self.cost(region)
        self.entries(region).fill_(True)
        self.taken.append(region)
        return cost

    def front(self, order: Sequence[Region], amount: int) -> list[Region]:
        """Take from the front what fits; what is refused comes back."""
        left = amount
        for at, region in enumerate(order):
            if self.cost(region) > left:
                if at == 0:
                    self.refusals.append("less than one region")
                return list(order[at:])
            left -= self.take(region)
        return []

    def note_margin(self, competed: Sequence[Region]) -> None:
        chosen = {self.scores[region] for region in competed if region in self.taken}
        refused = {self.scores[region] for region in competed if region not in self.taken}
        if not refused:
            return
        # What was taken as best lies above the refused scores, what was taken as worst below them.
        above = [score for score in chosen if score >= max(refused)]
        below = [score for score in chosen if score < max(refused)]
        cuts = [(min(above), max(refused))] if above else []
        cuts += [(max(below), min(refused))] if below else []
        self.margins += [abs(last - first) / abs(last or first or 1.0) for last, first in cuts]

    def run(self) -> None:
        problem, budget = self.problem, self.budget
        competing = [c for c in problem.candidates if c.per_matrix is None]
        whole = sum(1 if budget.regions is not None else len(range(w.shape[0])) for w in problem.whole.values())
        used = whole
        for c in problem.candidates:
            own = [region for region in self.scores if region[:2] == (c.weight, c.kind)]
            if c.per_matrix is not None and len(own) < c.per_matrix:
                self.refusals.append("per_matrix is")
                return
            used += sum(self.take(region) for region in plain_order(own, self.scores, c.pick)[: c.per_matrix or 0])
        amount = budget.regions if budget.regions is not None else budget.parameters
        assert amount is not None
        if used > amount:
            self.refusals.append("alone are")
            return
        if not competing:
            return
        for group in budget.groups or (None,):
            members = competing
            share = amount - used
            if group is not None:
                stem = group.modules[0].replace("*", "")
                members = [c for c in competing if stem in c.weight]
                share = math.floor(Fraction(str(group.share)) * share)
            keys = [(c.weight, c.kind) for c in members]
            regions = [region for region in self.scores if region[:2] in keys]
            if not regions:
                self.refusals.append("-inf for every competing region")
                continue
            if budget.over == "matrix":
                weights = list(dict.fromkeys(c.weight for c in members))
                for weight in weights:
                    own = [region for region in regions if region[0] == weight]
                    self.front(plain_order(own, self.scores, members[0].pick), share // len(weights))
                    self.note_margin(own)
            else:
                self.layered(regions, share, members[0].pick)

    def layered(self, regions: Sequence[Region], amount: int, pick: Pick) -> None:
        """One ranking, with floors and caps for its layers."""
        low, high = self.budget.min_share_per_layer, self.budget.max_share_per_layer

        def layer(region: Region) -> str | None:
            return region[0].split(".")[1] if region[0].startswith("layers.") else None

        layers = sorted({found for region in regions if (found := layer(region)) is not None})
        in_floor: list[Region] = []
        used: dict[str | None, int] = dict.fromkeys(layers, 0)
        before = len(self.taken)
        for name in layers if low is not None else ():
            own = [region for region in regions if layer(region) == name]
            first = len(self.taken)
            before_floor = {weight: int(mask.sum()) for weight, mask in self.masks.items()}
            self.front(plain_order(own, self.scores, pick), math.floor(Fraction(str(low)) * amount))
            in_floor += self.taken[first:]
            used[name] = self.spent(before_floor, len(self.taken) - first)
        order = [region for region in plain_order(regions, self.scores, pick) if region not in in_floor]
        beyond: list[Region] = []
        if high is not None:
            # What every layer may have at most, whatever the others take.
            cap = math.floor(Fraction(str(high)) * amount)
            masks, taken = {weight: mask.clone() for weight, mask in self.masks.items()}, list(self.taken)
            for name in layers:
                own = [region for region in order if layer(region) == name]
                refusals = list(self.refusals)
                beyond += self.front(own, cap - used[name])
                if any(layer(region) == name for region in in_floor):
                    self.refusals = refusals
            self.masks, self.taken = masks, taken
        # One walk, in which a layer at its cap is passed over.
        left = amount - sum(used.values())
        closed: set[str | None] = set()
        for region in order:
            where, cost = layer(region), self.cost(region)
            if where in closed or (where is not None and high is not None and used[where] + cost > cap):
                closed.add(where)
            elif cost > left:
                if len(self.taken) == before:
                    self.refusals.append("less than one region")
                break
            else:
                self.take(region)
                left -= cost
                used[where] = used.get(where, 0) + cost
        self.note_margin([region for region in order if region not in beyond])
        for name in layers:
            own = [region for region in regions if layer(region) == name]
            at_floor = low is not None and not any(region in self.taken for region in own if region not in in_floor)
            at_cap = all(region in self.taken for region in own if region not in beyond)
            if at_floor or at_cap:
                self.note_margin(own)

    def spent(self, before: dict[str, int], num_regions: int) -> int:
        if self.budget.regions is not None:
            return num_regions
        return sum(int(mask.sum()) - before[weight] for weight, mask in self.masks.items())


# -- random problems


@st.composite
def problems(draw: Callable[..., Any], division: str, mixed: bool = True) -> Problem:
    side = st.integers(2, 7)
    names = [f"layers.{layer}.{name}" for layer in range(draw(st.integers(1, 3))) for name in ("attn", "mlp")]
    names += draw(st.sampled_from([[], ["head"]])) if division != "groups" else []
    matrices, candidates = [], []
    pick = draw(st.sampled_from(["max", "min", "mixed"] if mixed else ["max", "min"]))
    for name in names:
        slices = draw(st.sampled_from([None, None, 2]))
        matrix = make_matrix(name, (draw(side), draw(side)), slices)
        matrices.append(matrix)
        block = (draw(st.integers(1, matrix.shape[0])), draw(st.integers(1, matrix.shape[1])))
        kinds = draw(st.sets(st.sampled_from(KINDS), min_size=1))
        fixed = draw(st.sets(st.sampled_from(sorted(kinds)), max_size=len(kinds) - 1))
        for kind in KINDS:
            if kind in kinds:
                made = make_candidates(matrix, kind, pick=pick, block=block)
                number = draw(st.integers(1, min(3, made[0].num_regions)))
                candidates += [replace(c, per_matrix=number if kind in fixed else None) for c in made]
    candidates.sort(key=lambda c: (c.weight, KINDS.index(c.kind)))
    # Few different scores, so that ties are everywhere; now and then -inf.
    values = st.sampled_from([0.0, 1.0, 2.0, 3.0, 3.5, 7.0, 11.0, 13.0, -1.0, -math.inf])
    scores = {
        (c.weight, c.kind): torch.tensor(
            draw(st.lists(values, min_size=c.num_regions, max_size=c.num_regions)), dtype=torch.float64
        ).reshape(c.grid)
        for c in candidates
    }
    options: dict[str, Any] = {
        draw(st.sampled_from(["parameters", "parameters", "regions"])): draw(st.integers(1, 250))
    }
    if division == "matrix" or (division == "groups" and draw(st.booleans())):
        options["over"] = "matrix"
    if division == "groups":
        share = draw(st.sampled_from([0.7, 0.5, 0.29]))
        options["groups"] = (
            BudgetGroupConfig(modules=("*attn",), share=share),
            BudgetGroupConfig(modules=("*mlp",), share=round(1 - share, 2)),
        )
    if division == "layers" or (division == "groups" and "over" not in options and draw(st.booleans())):
        low = draw(st.sampled_from([None, 0.1, 0.2, 0.33]))
        options["min_share_per_layer"] = low
        options["max_share_per_layer"] = draw(st.sampled_from([None, 0.33, 0.4, 0.6, 1.0]))
    whole = {"norm.weight": WeightSelection(shape=(3, 1), whole=True)} if draw(st.booleans()) else {}
    return Problem(candidates, scores, BudgetConfig(**options), make_map(matrices), whole)


def assert_same_as_the_plain_way(problem: Problem) -> None:
    plain = PlainChoice(problem)
    plain.run()
    if plain.refusals:
        with pytest.raises(InputError, match="|".join(plain.refusals)):
            problem.choose()
        return
    choice = problem.choose()
    assert chosen_regions(choice.weights) == set(plain.taken)
    used = sum(int(mask.sum()) for mask in plain.masks.values()) + 3 * len(problem.whole)
    assert sum(weight.num_parameters for weight in choice.weights.values()) == used
    if problem.budget.parameters is not None:
        assert choice.num_parameters_left == problem.budget.parameters - used
        assert choice.num_regions_left is None
    else:
        assert problem.budget.regions is not None
        assert choice.num_regions_left == problem.budget.regions - len(plain.taken) - len(problem.whole)
        assert choice.num_parameters_left is None
    assert choice.cut_margin == (None if not plain.margins else pytest.approx(min(plain.margins)))


@given(problem=problems("all"))
@settings(max_examples=200, deadline=None)
def test_one_ranking_is_the_longest_prefix_that_fits(problem: Problem) -> None:
    assert_same_as_the_plain_way(problem)


@given(problem=problems("matrix"))
@settings(max_examples=150, deadline=None)
def test_every_matrix_gets_an_equal_part(problem: Problem) -> None:
    assert_same_as_the_plain_way(problem)


@given(problem=problems("layers"))
@settings(max_examples=300, deadline=None)
def test_floors_and_caps_of_layers(problem: Problem) -> None:
    assert_same_as_the_plain_way(problem)


@given(problem=problems("groups"))
@settings(max_examples=200, deadline=None)
def test_groups_have_rankings_of_their_own(problem: Problem) -> None:
    assert_same_as_the_plain_way(problem)


# -- what is chosen, by hand


def simple(
    rows: dict[str, list[float]], budget: BudgetConfig | None = None, *, width: int = 4, **options: Any
) -> Problem:
    """Matrices of as many rows as there are scores, whose rows compete (or not, with per_matrix)."""
    matrices = [make_matrix(name, (len(values), width)) for name, values in rows.items()]
    candidates = [c for matrix in matrices for c in make_candidates(matrix, "row", **options)]
    scores: dict[Key, Tensor] = {
        (f"{name}.weight", "row"): torch.tensor(values, dtype=torch.float64) for name, values in rows.items()
    }
    return Problem(candidates, scores, budget or BudgetConfig(regions=3), make_map(matrices))


def rows_of(choice: Choice) -> dict[str, list[int]]:
    return {name.removesuffix(".weight"): weight.rows.tolist() for name, weight in choice.weights.items()}


@pytest.mark.parametrize(
    ("pick", "expected"),
    [
        ("max", {"a": [1], "b": [0, 2]}),
        ("min", {"a": [0, 2], "b": [1]}),
        ("mixed", {"a": [0], "b": [0, 2]}),  # best b0 (9), worst a0 (1), second best b2 (8)
    ],
)
def test_picks(pick: Pick, expected: dict[str, list[int]]) -> None:
    rows = {"a": [1.0, 7.0, 2.0], "b": [9.0, 3.0, 8.0]}
    assert rows_of(simple(rows, pick=pick).choose()) == expected


@pytest.mark.parametrize(("pick", "expected"), [("max", [1, 2, 4]), ("min", [0, 3, 5]), ("mixed", [1, 2, 3])])
def test_per_matrix_picks(pick: Pick, expected: list[int]) -> None:
    """mixed takes two of the best and one of the worst."""
    problem = simple({"a": [1.0, 7.0, 6.0, 0.5, 5.0, 2.0]}, pick=pick, per_matrix=3)
    choice = problem.choose()
    assert rows_of(choice) == {"a": expected}
    assert choice.cut_margin is None
    refused_beside = {"max": (5.0, 2.0), "min": (2.0, 5.0), "mixed": (6.0, 5.0)}[pick]
    last, first = refused_beside
    assert choice.per_matrix_cut_margin == pytest.approx(abs(last - first) / last)
    problem.budget = None  # type: ignore[assignment]
    assert rows_of(problem.choose()) == {"a": expected}


@pytest.mark.parametrize("pick", ["max", "min", "mixed"])
def test_ties_fall_by_candidate_then_region(pick: Pick) -> None:
    """mixed: the better half is a0 and a1, the worse one b0 and b1, in turn a0, b0, a1."""
    choice = simple({"a": [1.0, 1.0], "b": [1.0, 1.0, -math.inf]}, BudgetConfig(regions=3), pick=pick).choose()
    assert rows_of(choice) == {"a": [0, 1], "b": [0]}
    assert choice.cut_margin == 0.0


def test_minus_infinity_is_never_chosen() -> None:
    never = -math.inf
    for pick in ("max", "min", "mixed"):
        choice = simple({"a": [never, 1.0, never], "b": [2.0, never]}, BudgetConfig(regions=5), pick=pick).choose()
        assert rows_of(choice) == {"a": [1], "b": [0]}
        assert choice.num_regions_left == 3
        assert choice.cut_margin is None, "what may not be chosen is not refused"


def test_what_is_left_is_told() -> None:
    rows = {"a": [4.0, 3.0], "b": [2.0, 1.0]}
    choice = simple(rows, BudgetConfig(parameters=11)).choose()
    assert (choice.num_parameters_left, choice.num_regions_left, choice.bytes_left) == (3, None, None)
    assert choice.cut_margin == pytest.approx(1 / 3)
    choice = simple(rows, BudgetConfig(bytes=167)).choose(bytes_per_parameter=14)
    assert (choice.num_parameters_left, choice.bytes_left) == (3, 167 - 8 * 14)
    assert simple(rows, BudgetConfig(bytes=12 * 16)).choose().num_parameters_left == 0
    choice = simple(rows, BudgetConfig(fraction=0.29)).choose(num_parameters_model=100)
    assert choice.num_parameters_left == 29 - 16, "0.29 * 100 in floating point is less than 29"
    choice = simple(rows, BudgetConfig(regions=4), width=1000).choose(num_parameters_model=10)
    assert choice.num_regions_left == 0


def test_groups_say_what_they_left() -> None:
    groups = (BudgetGroupConfig(modules=("*.q", "*.k"), share=0.7), BudgetGroupConfig(modules=("*.up",), share=0.3))
    rows = {"layers.0.k": [8.0, 7.0], "layers.0.q": [6.0, 5.0], "layers.0.up": [3.0, 2.0, 1.0]}
    choice = simple(rows, BudgetConfig(parameters=20, groups=groups)).choose()
    assert rows_of(choice) == {"layers.0.k": [0, 1], "layers.0.q": [0], "layers.0.up": [0]}
    assert choice.metadata() == {
        "num_parameters_left": 4,
        "num_regions_left": None,
        "bytes_left": None,
        "cut_margin": pytest.approx(1 / 6),
        "per_matrix_cut_margin": None,
        "groups": [
            {"modules": ["*.q", "*.k"], "allowed": 14, "left": 2},
            {"modules": ["*.up"], "allowed": 6, "left": 2},
        ],
    }


def test_groups_together_get_no_more_than_there_is() -> None:
    names, shares = ("q", "k", "up"), (0.3333334, 0.3333333, 0.3333334)
    groups = tuple(BudgetGroupConfig(modules=(name,), share=share) for name, share in zip(names, shares, strict=True))
    problem = simple({name: [1.0] for name in names}, BudgetConfig(parameters=10_000_000, groups=groups))
    problem.num_parameters_model = 10**8
    found = [group["allowed"] for group in problem.choose().metadata()["groups"]]
    assert found == [3_333_334, 3_333_333, 3_333_333]
    assert sum(found) == 10_000_000


def test_floors_that_add_up_to_a_little_more_than_the_budget_are_refused() -> None:
    rows = {f"layers.{layer}.q": [1.0] for layer in range(3)}
    floors = BudgetConfig(parameters=12, min_share_per_layer=1 / 3)
    assert simple(rows, floors).choose().num_parameters_left == 0
    with pytest.raises(InputError, match=r"3 layers compete, which takes 1 of the budget: use at most 0.3333"):
        simple(rows, replace(floors, min_share_per_layer=0.3333333334)).choose()


def test_shares_are_of_what_fixed_regions_and_vectors_leave() -> None:
    problem = simple({"layers.0.q": [4.0, 3.0, 2.0], "layers.1.q": [9.0, 8.0, 7.0]})
    fixed = make_matrix("layers.0.o", (3, 4))
    problem.candidates = make_candidates(fixed, "row", per_matrix=1) + problem.candidates
    problem.scores["layers.0.o.weight", "row"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    problem.whole = {"norm.weight": WeightSelection(shape=(6, 1), whole=True)}
    # 4 + 6 are fixed, 16 compete: half of them, two rows, is the most for a layer.
    problem.budget = BudgetConfig(parameters=26, max_share_per_layer=0.5)
    choice = problem.choose()
    assert chosen_regions(choice.weights) == {
        ("layers.0.o.weight", "row", 1),
        *(("layers.0.q.weight", "row", at) for at in (0, 1)),
        *(("layers.1.q.weight", "row", at) for at in (0, 1)),
    }
    assert choice.weights["norm.weight"].whole
    assert choice.num_parameters_left == 0


def test_mixed_fills_floors_from_both_ends_of_each_layer() -> None:
    rows = {"layers.0.q": [10.0, 9.0, 8.0, 7.0], "layers.1.q": [4.0, 3.0, 2.0, 1.0]}
    budget = BudgetConfig(regions=5, min_share_per_layer=0.4)
    # Two in each layer, then the best of all that are left.
    assert rows_of(simple(rows, budget, pick="mixed").choose()) == {"layers.0.q": [0, 1, 3], "layers.1.q": [0, 3]}


def test_matrices_outside_layers_are_not_bound() -> None:
    rows = {"head": [9.0, 8.0, 7.0, 6.0], "layers.0.q": [5.0, 4.0, 3.0], "layers.1.q": [2.0, 1.0]}
    budget = BudgetConfig(regions=6, min_share_per_layer=0.17, max_share_per_layer=0.2)
    assert rows_of(simple(rows, budget).choose()) == {"head": [0, 1, 2, 3], "layers.0.q": [0], "layers.1.q": [0]}


def mixed_kinds(row_scores: list[float], block_scores: list[list[float]], budget: BudgetConfig) -> Problem:
    matrix = make_matrix("a", (4, 4))
    candidates = make_candidates(matrix, "block") + make_candidates(matrix, "row")
    scores: dict[Key, Tensor] = {
        ("a.weight", "block"): torch.tensor(block_scores, dtype=torch.float64),
        ("a.weight", "row"): torch.tensor(row_scores, dtype=torch.float64),
    }
    return Problem(candidates, scores, budget, make_map([matrix]))


def test_scores_that_favour_a_size_are_divided_by_their_kinds_mean() -> None:
    # Rows have ten times larger scores; relative to their mean, block 0 (1.8) comes before row 3 (1.6).
    problem = mixed_kinds(
        [0.0, -math.inf, 40.0, 80.0], [[9.0, 1.0], [5.0, 5.0]], BudgetConfig(regions=2)
    )  # fmt: skip
    assert chosen_regions(problem.choose(size_neutral=True).weights) == {("a.weight", "row", 2), ("a.weight", "row", 3)}
    choice = problem.choose(size_neutral=False)
    # Without the -inf the mean of the rows is 40.
    assert chosen_regions(choice.weights) == {("a.weight", "row", 3), ("a.weight", "block", 0)}
    assert choice.cut_margin == pytest.approx((1.8 - 1.0) / 1.8)
    scores = {key: found.reshape(-1) for key, found in problem.scores.items()}
    assert normalised(problem.candidates, scores, False)["a.weight", "row"].tolist() == [0.0, -math.inf, 1.0, 2.0]
    only_rows = problem.candidates[1:]
    assert normalised(only_rows, scores, False)["a.weight", "row"].tolist() == [0.0, -math.inf, 40.0, 80.0]


def test_block_shapes_compete_like_kinds() -> None:
    wide, tall = make_matrix("a", (2, 6)), make_matrix("b", (6, 2))
    candidates = make_candidates(wide, "block", block=(1, 3)) + make_candidates(tall, "block", block=(3, 1))
    scores: dict[Key, Tensor] = {
        ("a.weight", "block"): torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64),
        ("b.weight", "block"): torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64),
    }
    problem = Problem(candidates, scores, BudgetConfig(regions=2), make_map([wide, tall]))
    chosen = chosen_regions(problem.choose(size_neutral=False).weights)
    assert chosen == {("b.weight", "block", 0), ("a.weight", "block", 3)}, "2.0 and 1.6 times the mean"


def test_scores_of_zero_alone_stay_as_they_are() -> None:
    problem = mixed_kinds([0.0] * 4, [[0.0, 0.0], [0.0, 1.0]], BudgetConfig(regions=1))
    choice = problem.choose(size_neutral=False)
    assert chosen_regions(choice.weights) == {("a.weight", "block", 3)}
    assert choice.cut_margin == 1.0


def test_the_choice_does_not_depend_on_the_number_of_threads() -> None:
    matrix = make_matrix("a", (300, 400))
    generator = torch.Generator().manual_seed(3)
    candidates = [c for kind in KINDS for c in make_candidates(matrix, kind, block=(7, 9))]
    scores = {(c.weight, c.kind): torch.rand(c.grid, generator=generator, dtype=torch.float64) for c in candidates}
    problem = Problem(candidates, scores, BudgetConfig(parameters=50_000), make_map([matrix]))
    before = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(problem.choose(size_neutral=False))
    finally:
        torch.set_num_threads(before)
    assert chosen_regions(found[0].weights) == chosen_regions(found[1].weights)
    assert {kind for _, kind, _ in chosen_regions(found[0].weights)} == set(KINDS)
    assert found[0].num_parameters_left == found[1].num_parameters_left


# -- what is refused

TWO_LAYERS = {"layers.0.q": [4.0, 3.0], "layers.0.up": [2.0, 2.0], "layers.1.q": [1.0, 0.5]}


def group(*modules: str, share: float = 0.5) -> BudgetGroupConfig:
    return BudgetGroupConfig(modules=modules, share=share)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (BudgetConfig(parameters=10**7), r"parameters is 10,000,000, more than the model's 1,000,000: lower it"),
        (BudgetConfig(bytes=10**9), r"bytes is 1,000,000,000, more than the model's 16,000,000: lower it"),
        (
            BudgetConfig(parameters=50, groups=(group("*.q"), group("*.u?", "layers.1.*"))),
            r"groups \*\.q and \*\.u\?, layers\.1\.\* both have 'layers\.1\.q'",
        ),
        (BudgetConfig(parameters=50, groups=(group("*.0.q"), group("*.up"))), "no group for 'layers.1.q'"),
        (BudgetConfig(parameters=50, groups=(group("*.q"), group("*.down"))), r"groups.modules pattern '\*\.down'.* no matrix"),
        (BudgetConfig(parameters=50, groups=(group("*.q", "*.up"), group("head"))), "groups head has a share of 0.5 and no"),
        (BudgetConfig(parameters=50, min_share_per_layer=0.51), r"0.51 and 2 layers compete, which takes 1.02.*at most 0.5"),
        (
            BudgetConfig(parameters=50, min_share_per_layer=0.6, groups=(group("*.q"), group("*.up"))),
            r"2 layers of \*\.q compete",
        ),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be_met_are_refused_before_there_are_scores(budget: BudgetConfig, message: str) -> None:
    problem = simple(TWO_LAYERS, budget)
    head = make_matrix("head", (2, 4))  # in the model, but nothing of it competes
    problem.module_map = make_map([*problem.module_map.matrices, head])
    with pytest.raises(InputError, match=message):
        check_budget(problem.candidates, budget, module_map=problem.module_map, num_parameters_model=10**6)
    with pytest.raises(InputError, match=message):
        problem.choose()


def test_shares_per_layer_need_layers() -> None:
    for name in ("min_share_per_layer", "max_share_per_layer"):
        problem = simple({"head": [1.0, 2.0]}, BudgetConfig(regions=2, **{name: 0.5}))  # type: ignore[arg-type]
        for check in (
            problem.choose,
            lambda problem=problem: check_budget(
                problem.candidates, problem.budget, module_map=problem.module_map, num_parameters_model=100
            ),
        ):
            with pytest.raises(InputError, match=f"{name} is 0.5, but no matrix whose regions compete lies in a layer"):
                check()


def test_a_budget_that_can_be_met_passes() -> None:
    groups = (group("*.0.*", share=0.25), group("*.1.*", share=0.75))
    for budget in (BudgetConfig(fraction=1.0, groups=groups, min_share_per_layer=1.0), None):
        problem = simple(TWO_LAYERS)
        check_budget(problem.candidates, budget, module_map=problem.module_map, num_parameters_model=10**6)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            BudgetConfig(parameters=3),
            r"allows 3 parameters, less than one region \(row 0 of 'layers.0.q.weight', which takes 4\): raise it or",
        ),
        (
            BudgetConfig(parameters=12, groups=(group("*.q", share=0.75), group("*.up", share=0.25))),
            r"allows 12 parameters; the group \*.up gets 3 of them, less than one region \(row 0 of 'layers.0.up.weight'",
        ),
        (BudgetConfig(regions=2, over="matrix"), r"each of 3 matrices gets 0, less than one region"),
        (
            BudgetConfig(parameters=15, min_share_per_layer=0.25),
            r"min_share_per_layer is 0.25, that is 3 parameters in layer 0, less than one region",
        ),
        (
            BudgetConfig(regions=3, max_share_per_layer=0.3),
            r"max_share_per_layer is 0.3, that is 0 regions in layer 0, less than one region \(row 0 of 'layers.0.q.weight'\)",
        ),
    ],
)  # fmt: skip
def test_less_than_one_region_is_refused(budget: BudgetConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simple(TWO_LAYERS, budget).choose()


def test_fixed_regions_beyond_the_budget_are_refused() -> None:
    problem = simple({"a": [1.0, 2.0]}, BudgetConfig(parameters=7), per_matrix=2)
    with pytest.raises(InputError, match=r"allows 7 parameters, but the regions with per_matrix alone are 8"):
        problem.choose()
    problem.budget = BudgetConfig(parameters=13)
    problem.whole = {"norm": WeightSelection(shape=(6, 1), whole=True)}
    with pytest.raises(InputError, match=r"but what is of kind whole and the regions with per_matrix alone are 14"):
        problem.choose()
    problem.budget = BudgetConfig(parameters=14)
    assert problem.choose().num_parameters_left == 0
    problem.budget = BudgetConfig(regions=2)
    with pytest.raises(InputError, match=r"allows 2 regions, but .* alone are 3"):
        problem.choose()
    rest = simple({"b": [1.0]})
    problem.candidates += rest.candidates
    problem.scores |= rest.scores
    problem.budget = BudgetConfig(regions=3)
    with pytest.raises(InputError, match=r"allows 3 regions, of which the fixed regions take 3 and leave 0, less than"):
        problem.choose()


def test_too_much_minus_infinity_is_refused() -> None:
    never = [-math.inf, -math.inf]
    for budget in (None, BudgetConfig(regions=4, over="matrix")):
        with pytest.raises(InputError, match="given is -inf for every competing region: none may be chosen"):
            simple({"a": never, "b": never}, budget).choose()
    layered = simple({"layers.0.q": never}, BudgetConfig(regions=4, min_share_per_layer=0.5, max_share_per_layer=0.6))
    with pytest.raises(InputError, match="given is -inf for every competing region"):
        layered.choose()
    groups = (group("a"), group("b"))
    with pytest.raises(InputError, match="-inf for every competing region of the group b"):
        simple({"a": [1.0], "b": never}, BudgetConfig(regions=4, groups=groups)).choose()
    with pytest.raises(InputError, match=r"per_matrix is 2, but selection.score given lets only 1 row regions of b.we"):
        simple({"a": [1.0, 2.0], "b": [1.0, -math.inf]}, per_matrix=2).choose()


@pytest.mark.parametrize("name", ["parameters", "bytes", "regions"])
@pytest.mark.parametrize("value", [512.0, "512", True])
def test_amounts_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"selection\.budget\.{name} is {value!r}: it must be a whole number"):
        BudgetConfig(**{name: value})


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("*.q", r"selection\.budget\.groups\.modules is '\*\.q': give a tuple of patterns"),
        ((), r"selection\.budget\.groups\.modules is empty"),
        ((1,), r"selection\.budget\.groups\.modules has 1 in it"),
    ],
)
def test_groups_have_a_tuple_of_patterns(modules: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BudgetGroupConfig(modules=modules, share=1.0)


def test_resolve_budget() -> None:
    limit = resolve_budget(BudgetConfig(bytes=1000), num_parameters_model=100, bytes_per_parameter=14)
    assert (limit.amount, limit.unit) == (71, "parameters")
    limit = resolve_budget(BudgetConfig(regions=1000), num_parameters_model=100, bytes_per_parameter=14)
    assert (limit.amount, limit.unit) == (1000, "regions")
