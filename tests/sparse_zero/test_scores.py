"""Every rule against plain loops over entries; names, modules and entry points; what is refused, and in which words."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import split_weight_name
from sparse_zero.module_map import Matrix, weight_name
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import Kind
from sparse_zero.selection.scores import (
    SCORES,
    check_reached,
    check_rule,
    checked_scores,
    generator_for,
    resolve_score,
)


def regions(
    kind: Kind = "block",
    shape: tuple[int, int] = (7, 10),
    block_shape: tuple[int, int] = (3, 4),
    score: str = "abs_of_mean",
    name: str = "layers.0.q_proj",
    per_matrix: int | None = None,
    slice_index: int | None = None,
) -> Candidates:
    return Candidates(
        matrix=Matrix(
            name=name,
            owners=((name, "weight"),),
            shape=shape,
            num_slices=None if slice_index is None else 4,
            is_product=True,
            is_linear=True,
        ),
        slice_index=slice_index,
        kind=kind,
        block_shape=block_shape if kind == "block" else (0, 0),
        score=score,
        pick="max",
        per_matrix=per_matrix,
    )


def entries(candidates: Candidates) -> list[list[tuple[int, int]]]:
    """The (o, i) of every entry of every region, in the order of the flat scores."""
    (height, width), (out, into) = candidates.block_shape, candidates.shape
    if candidates.kind == "row":
        return [[(o, i) for i in range(into)] for o in range(out)]
    if candidates.kind == "column":
        return [[(o, i) for o in range(out)] for i in range(into)]
    return [
        [(o, i) for o in range(top, min(top + height, out)) for i in range(left, min(left + width, into))]
        for top in range(0, out, height)
        for left in range(0, into, width)
    ]


# Each formula over the lists g, w, x of a region's gradients, weights, and the input norms of their columns.
PLAIN: dict[str, Callable[[list[float], list[float], list[float]], float]] = {
    "abs_of_mean": lambda g, w, x: abs(math.fsum(g) / len(g)),
    "mean_of_abs": lambda g, w, x: math.fsum(map(abs, g)) / len(g),
    "l1": lambda g, w, x: math.fsum(map(abs, g)),
    "l2": lambda g, w, x: math.sqrt(math.fsum(v * v for v in g)),
    "squared": lambda g, w, x: math.fsum(v * v for v in g) / len(g),
    "gradient_times_weight": lambda g, w, x: math.fsum(abs(v * u) for v, u in zip(g, w, strict=True)) / len(g),
    "magnitude": lambda g, w, x: math.fsum(map(abs, w)) / len(w),
    "wanda": lambda g, w, x: math.fsum(abs(u) * n for u, n in zip(w, x, strict=True)) / len(w),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["block", "row", "column"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_rules_equal_plain_loops(kind, shape, block_shape, seed, transposed):
    generator = torch.Generator().manual_seed(seed)
    candidates = regions(kind, shape, block_shape)
    g, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if transposed:  # As the view of a weight that is stored [in, out].
        g, w = g.T.contiguous().T, w.T.contiguous().T
    x, y = (torch.rand(number, generator=generator, dtype=torch.float64) for number in reversed(shape))
    supply = {
        "gradient": g,
        "gradient_sums": candidates.sums(g),
        "weight": w,
        "input_norm": x,
        "output_norm": y,
        "generator": torch.Generator().manual_seed(seed),
    }
    gradients, weights, norms = g.tolist(), w.tolist(), x.tolist()
    for name, rule in SCORES.items():
        if kind not in rule.kinds:
            continue
        found = rule.function(candidates, **{need: supply[need] for need in rule.needs})
        assert found.dtype == torch.float64
        assert tuple(found.shape) == candidates.grid
        if name in PLAIN:
            expected = [
                PLAIN[name](
                    [gradients[o][i] for o, i in region],
                    [weights[o][i] for o, i in region],
                    [norms[i] for _, i in region],
                )
                for region in entries(candidates)
            ]
            assert found.reshape(-1).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15), name
    if kind == "column":
        assert torch.equal(SCORES["input_norm"].function(candidates, input_norm=x), x)
    if kind == "row":
        assert torch.equal(SCORES["output_norm"].function(candidates, output_norm=y), y)


def test_every_built_in_rule_has_a_plain_form_or_a_test_of_its_own():
    assert set(SCORES) == {*PLAIN, "input_norm", "output_norm", "random", "first", "diagonal"}


@pytest.mark.parametrize("name", ["l2", "squared", "gradient_times_weight", "wanda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_numbers_are_not_rounded_to_it(name, dtype):
    generator = torch.Generator().manual_seed(2)
    candidates = regions()
    # In fp16 these gradients exist, and their squares do not.
    g = (torch.randn(candidates.shape, generator=generator) * 1e-4).to(dtype)
    w = torch.randn(candidates.shape, generator=generator).to(dtype)
    x = torch.rand(candidates.shape[1], generator=generator, dtype=torch.float64)
    rule = SCORES[name]
    supply = {"gradient": g, "weight": w, "input_norm": x}
    found = rule.function(candidates, **{need: supply[need] for need in rule.needs})
    exact = rule.function(candidates, **{need: supply[need].double() for need in rule.needs})
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0.0)


def test_size_neutral_scores_do_not_change_when_a_region_of_equal_content_grows():
    small, large = regions("block", (4, 4), (2, 2)), regions("block", (4, 4), (4, 2))
    g, w, x = torch.full((4, 4), -0.5), torch.full((4, 4), 2.0), torch.full((4,), 3.0)
    for name in PLAIN:
        rule = SCORES[name]
        if (
            name == "abs_of_mean"
        ):  # Equal content does not cancel; |mean| shrinks with the size only where signs differ.
            assert not rule.size_neutral
            continue

        def score(c: Candidates, rule=rule) -> float:
            supply = {"gradient": g, "weight": w, "input_norm": x}
            return float(rule.function(c, **{need: supply[need] for need in rule.needs}).reshape(-1)[0])

        assert (score(small) == pytest.approx(score(large))) == rule.size_neutral, name


def test_first_and_diagonal_fall_with_the_index():
    rows = SCORES["first"].function(regions("row", (5, 3)))
    assert rows.argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    for shape, number in (((7, 10), 3), ((10, 4), 1), ((9, 12), 3)):
        blocks = SCORES["diagonal"].function(regions("block", shape, (3, 4)))
        chosen = [(i, j) for i in range(blocks.shape[0]) for j in range(blocks.shape[1]) if blocks[i, j] > -math.inf]
        assert chosen == [(i, i) for i in range(number)]
        falling = blocks.diagonal()
        assert bool((falling > 0).all())
        assert bool((falling.diff() < 0).all())


def test_random_scores_differ_by_weight_kind_and_seed_and_repeat_themselves():
    def draw(seed: int, **options: object) -> list[float]:
        candidates = regions(shape=(6, 6), block_shape=(1, 6), **options)  # type: ignore[arg-type]
        found: Tensor = SCORES["random"].function(candidates, generator=generator_for(candidates, seed))
        return found.reshape(-1).tolist()

    drawn = [
        draw(0),
        draw(1),
        draw(0, kind="row"),
        draw(0, name="layers.1.q_proj"),
        draw(0, slice_index=0),
        draw(0, slice_index=1),
    ]
    assert len({tuple(each) for each in drawn}) == len(drawn)
    assert draw(0) == drawn[0]


# -- names, modules and entry points


MODULE = """
import functools


def entropy(regions, *, gradient, weight):
    return regions.sums(gradient.abs() * weight.abs())


def neutral(regions, *, gradient_sums):
    return gradient_sums


neutral.size_neutral = True
neutral.kinds = ("row", "column")


class Power:
    def __call__(self, regions, /, *, weight):
        return regions.sums(weight ** 2)


power = Power()
number = 3


def no_regions(*, gradient):
    return gradient


def two_positional(regions, gradient):
    return gradient


def misspelt(regions, *, gradiant):
    return gradiant


def anything(regions, **needs):
    return needs


def extra(regions, *, gradient, exponent=2):
    return gradient


def odd_kinds(regions):
    return 0


odd_kinds.kinds = ("blocks",)


def odd_neutral(regions):
    return 0


odd_neutral.size_neutral = "yes"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path; modules that are imported from it are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def install(folder: Path, distribution: str, *lines: str) -> None:
    """What an installer leaves of a package that provides scores."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[sparse_zero.scores]", *lines, ""]))


def test_functions_of_modules_become_rules(folder: Path) -> None:
    (folder / "house_scores.py").write_text(MODULE)
    rule = resolve_score("house_scores:entropy")
    assert (rule.name, sorted(rule.needs)) == ("house_scores:entropy", ["gradient", "weight"])
    assert (rule.size_neutral, rule.kinds, rule.needs_data) == (False, ("block", "row", "column"), True)
    neutral = resolve_score("house_scores:neutral")
    assert (neutral.size_neutral, neutral.kinds, list(neutral.needs)) == (True, ("row", "column"), ["gradient_sums"])
    power = resolve_score("house_scores:power")
    assert (list(power.needs), power.needs_data) == (["weight"], False)
    candidates = regions("row", (2, 3))
    assert power.function(candidates, weight=torch.full((2, 3), 2.0)).tolist() == [12.0, 12.0]


def test_entry_points_of_installed_packages_become_rules(folder: Path) -> None:
    (folder / "house_scores.py").write_text(MODULE)
    install(
        folder, "house", "entropy = house_scores:entropy", "broken = house_scores:nothing", "l1 = house_scores:power"
    )
    rule = resolve_score("entropy")
    assert (rule.name, sorted(rule.needs)) == ("entropy", ["gradient", "weight"])
    with pytest.raises(InputError, match="'entropie': did you mean 'entropy'"):
        resolve_score("entropie")
    with pytest.raises(InputError, match=r"'broken', an entry point for house_scores:nothing.*AttributeError"):
        resolve_score("broken")
    # A built-in name means the built-in rule, whatever is installed.
    assert resolve_score("l1") is SCORES["l1"]
    install(folder, "other", "entropy = house_scores:power")
    with pytest.raises(InputError, match=r"several packages provide.*name one of these"):
        resolve_score("entropy")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abs_of_meen", "'abs_of_meen': did you mean 'abs_of_mean'"),
        ("zzz", "'zzz': choose one of abs_of_mean, .*'package.module:function'"),
        ("no_such_module:score", "importing 'no_such_module' failed with ModuleNotFoundError.*PYTHONPATH"),
        ("raising:score", "importing 'raising' failed with RuntimeError: not today"),
        (":score", "importing '' failed"),
        ("house_scores:", "'house_scores' has no ''"),
        ("house_scores:entropie", "'house_scores' has no 'entropie': did you mean 'entropy'"),
        ("house_scores:number", "'house_scores:number' is of type int: name a function"),
        ("house_scores:no_regions", r"0 positional parameters \(none\): it takes one"),
        ("house_scores:two_positional", r"2 positional parameters \(regions, gradient\): it takes one"),
        ("house_scores:misspelt", "has the parameter gradiant, which nothing supplies: did you mean gradient"),
        ("house_scores:anything", r"has the parameter \*\*needs, which nothing supplies.*input_norm, output_norm"),
        ("house_scores:extra", "has the parameter exponent=2, which nothing supplies"),
        ("house_scores:odd_kinds", r"has kinds \('blocks',\): give a tuple of some of block, row, column"),
        ("house_scores:odd_neutral", "has size_neutral 'yes': give True or False"),
    ],
)
def test_what_is_no_rule_is_refused(name: str, message: str, folder: Path) -> None:
    (folder / "house_scores.py").write_text(MODULE)
    (folder / "raising.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(InputError, match=message):
        resolve_score(name)


# -- what a rule cannot rank


def quantized(candidates: Candidates) -> Candidates:
    """In a linear that nobody knows how to make dense."""
    return replace(candidates, matrix=replace(candidates.matrix, is_quantized=True, is_linear=False))


def embedding(candidates: Candidates) -> Candidates:
    return replace(candidates, matrix=replace(candidates.matrix, is_product=False, is_linear=False))


@pytest.mark.parametrize(
    ("name", "candidates", "message"),
    [
        ("input_norm", regions("block"), "input_norm ranks columns only.*has blocks of 'layers.0.q_proj': use wanda"),
        ("input_norm", regions("row"), "has rows of .*: use output_norm or wanda for rows"),
        ("output_norm", regions("column"), "output_norm ranks rows only.*: use input_norm or wanda for columns"),
        ("diagonal", regions("row"), "diagonal ranks blocks only.*: use first for rows"),
        ("diagonal", regions("block", per_matrix=4), "per_matrix is 4 and the diagonal .* has only 3 blocks"),
        ("gradient_times_weight", quantized(regions()), "weight in full precision of 'layers.0.q_proj', which is quantized"),
        ("magnitude", quantized(regions()), "weight in full precision of .*quantized"),
        ("wanda", quantized(regions()), "weight in full precision of .*quantized.*: use a score of the gradient"),
        ("abs_of_mean", embedding(quantized(regions())), "the gradient of .*quantized.*: leave it out of selection.regions"),
        ("wanda", embedding(regions()), "activations of 'layers.0.q_proj', which is not the weight of a linear module"),
        ("output_norm", embedding(regions("row")), "activations of .*such as mean_of_abs"),
    ],
)  # fmt: skip
def test_rules_that_cannot_rank_are_refused_by_name(name: str, candidates: Candidates, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_rule(SCORES[name], candidates)


def test_scores_that_read_no_weight_rank_quantized_weights() -> None:
    for name in ("abs_of_mean", "mean_of_abs", "squared", "random", "first"):
        check_rule(SCORES[name], quantized(regions()))
    check_rule(SCORES["input_norm"], quantized(regions("column")))
    check_rule(SCORES["mean_of_abs"], embedding(regions()))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"of the rows of layers.0.q_proj.weight is of type list: return a tensor"),
        (torch.ones(3), r"has the shape \(3,\): return a number per region, \(2,\)"),
        (torch.ones(2, 1), r"has the shape \(2, 1\)"),
        (torch.ones(2, dtype=torch.complex64), "is complex"),
        (torch.tensor([1.0, math.nan]), r"abs_of_mean of the rows of layers.0.q_proj.weight is NaN for 1 of 2 .* at \(1,\)"),
        (torch.tensor([math.inf, 1.0]), r"is \+inf for 1 of 2 regions, first at \(0,\): return finite numbers, or -inf"),
    ],
)  # fmt: skip
def test_results_that_are_no_scores_are_refused(scores: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_scores(scores, regions("row", (2, 3)))


def test_candidates_are_named_as_their_weights() -> None:
    for number, expected in ((None, "experts.weight"), (3, "experts.weight[3]")):
        named = regions(name="experts", slice_index=number).weight
        assert (named, split_weight_name(named)) == (expected, ("experts.weight", number))
        assert named == weight_name("experts.weight", number)


def test_results_become_fp64_on_the_host() -> None:
    given_scores = torch.tensor([-math.inf, 0.5], dtype=torch.bfloat16, requires_grad=True)
    found = checked_scores(given_scores, regions("row", (2, 3)))
    assert (found.dtype, found.tolist(), found.requires_grad) == (torch.float64, [-math.inf, 0.5], False)


def test_a_weight_that_no_gradient_reached_is_an_error_and_an_idle_expert_is_none() -> None:
    idle = [regions("row", (2, 3), slice_index=0), regions("row", (2, 3), slice_index=1)]
    reached = {idle[0].weight: False, idle[1].weight: True}
    check_reached(SCORES, idle, reached)
    reached[idle[1].weight] = False
    with pytest.raises(InputError, match=r"no gradient reached 'layers.0.q_proj'.*leave it out of selection.regions"):
        check_reached(SCORES, idle, reached)
    # For a score that reads no gradient, none is looked at.
    check_reached(SCORES, [replace(each, score="magnitude") for each in idle], {})
