"""Do the tables, maps and pictures of a selection say what is in it, and in its scores?"""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from launcher import plots, selection_terminal
from launcher.__main__ import main
from launcher.commands.inspect import read_scores
from launcher.report import write_report
from launcher.score_plots import budget_figure, histogram_figure, score_map_figure, weight_types
from launcher.selection_map import LayerGrid, shares_figure
from launcher.selection_overlap import compare, compare_weights, jaccard_grid, overall, overlaps_by, owned_together
from launcher.selection_stats import (
    Place,
    budget_curves,
    check_scores_fit,
    count_regions,
    histograms,
    kinds_and_scores,
    layer_sums,
    mass_shares,
    trained_shares,
)
from launcher.selection_tables import budget_sheet, counts_sheet, facts
from sparse_zero.errors import InputError
from sparse_zero.selection.config import KINDS
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from tests.launcher.synthetic_run import write_run
from tests.launcher.synthetic_scores import SHAPES, best_regions, synthetic_scores
from tests.launcher.test_report import Page

pytest.importorskip("matplotlib")

VECTORS = {f"model.layers.{layer}.input_layernorm.weight": 512 for layer in range(8)}


@pytest.fixture(scope="module")
def scores() -> RegionScores:
    return synthetic_scores(8, num_experts=3)


@pytest.fixture(scope="module")
def selection(scores: RegionScores) -> Selection:
    return best_regions(scores, whole=VECTORS | {"model.norm.weight": 512})


# -- counts


@pytest.mark.parametrize("score", ["abs_of_mean", "squared"])
def test_captured_mass_is_that_of_the_library(score: str) -> None:
    scores = synthetic_scores(3, score=score, block_shape=(32, 48))
    chosen = best_regions(scores)
    shares = scores.share_captured(chosen)
    by_weight = {
        count.place.name: count.share_captured for count in count_regions(chosen, scores, "weight")
        if "down_proj" not in (count.place.name or "")
    }  # fmt: skip
    assert by_weight == pytest.approx({name: shares["by_weight"][name] for name in by_weight})
    assert {curve.kind: curve.actual_captured for curve in budget_curves(chosen, scores)} == pytest.approx(
        shares["by_kind"]
    )
    layers = count_regions(chosen, scores, "layer")
    assert sum(count.captured.get(("block", score), 0.0) for count in layers) == pytest.approx(
        shares["by_kind"]["block"] * sum(count.mass.get(("block", score), 0.0) for count in layers)
    )


@pytest.mark.parametrize("by", ["module", "layer", "weight"])
@pytest.mark.parametrize("known", [True, False])
def test_counts_add_up(by: Any, known: bool, selection: Selection, scores: RegionScores) -> None:
    counts = count_regions(selection, scores if known else None, by)
    assert sum(count.parameters for count in counts) == selection.num_parameters
    for kind in KINDS:
        expected = sum(weight.num_regions(kind) for weight in selection.weights.values())
        assert sum(count.regions for count in counts if count.kind == kind) == expected
    candidates = sum(c.num_regions for c in scores.candidates) if known else 0
    assert sum(count.candidates for count in counts) == candidates
    keys = [(count.place, count.kind) for count in counts]
    assert len(set(keys)) == len(keys)


def test_modules_have_their_role_and_no_number(selection: Selection, scores: RegionScores) -> None:
    counts = count_regions(selection, scores, "module")
    assert [(count.place.role, count.place.name, count.label) for count in counts] == [
        *(("attention", f"self_attn.{name}_proj", "block 32") for name in "qkvo"),
        ("mlp", "mlp.gate_proj", "block 32"),
        ("mlp", "mlp.up_proj", "block 32"),
        ("mlp", "mlp.down_proj", "block 32"),
        ("mlp", "mlp.down_proj", "row"),
        ("mlp", "mlp.experts.gate_up_proj", "block 32"),
        ("other", "input_layernorm", "whole"),
        ("other", "model.norm", "whole"),
    ]
    experts = next(count for count in counts if "experts" in str(count.place.name))
    assert (experts.candidates, experts.entries) == (8 * 3 * 8 * 16, 8 * 3 * 256 * 512)


def test_oblong_and_varied_blocks_are_named() -> None:
    shape = (8, 12)
    weights = {
        "layers.0.q_proj.weight": WeightSelection(shape=shape, block_size=(2, 3), blocks=[[0, 0]]),
        "layers.1.q_proj.weight": WeightSelection(shape=shape, block_size=4, blocks=[[0, 0]]),
    }
    assert [count.label for count in count_regions(Selection(weights), None, "module")] == ["block, varied"]
    assert [count.label for count in count_regions(Selection(weights), None, "layer")] == ["block 2x3", "block 4"]


def test_sums_of_several_kinds_have_no_captured_mass(selection: Selection, scores: RegionScores) -> None:
    sheet = counts_sheet(count_regions(selection, scores, "module"), "module", has_scores=True)
    rows = {row[0]: row for number, row in enumerate(sheet.rows) if number in sheet.sums}
    assert list(rows) == ["attention", "mlp", "other", "all"]
    assert rows["attention"][-1] != "–"
    assert rows["mlp"][-1] == rows["all"][-1] == "–"
    # Entries of down_proj count once, though blocks and rows are chosen in it.
    entries = 8 * sum(height * width for name, (height, width) in SHAPES.items() if "mlp" in name) + 24 * 256 * 512
    trained = sum(weight.num_parameters for name, weight in selection.weights.items() if ".mlp." in name)
    assert rows["mlp"][-2] == f"{100 * trained / entries:.2f}%"


def test_maps_hold_every_share_once(selection: Selection, scores: RegionScores) -> None:
    grid = trained_shares(selection, scores, 10)
    assert (grid.num_layers, grid.has_outside) == (10, False)
    row, name = grid.modules.index("self_attn.v_proj"), "model.layers.4.self_attn.v_proj.weight"
    assert grid.cells[row][4] == selection.weights[name].num_parameters / (128 * 512)
    assert grid.cells[row][9] is None
    assert grid.cells[grid.modules.index("self_attn.q_proj")][0] == 0.0
    assert "input_layernorm" not in grid.modules
    mass = mass_shares(scores, "block", "abs_of_mean", 8)
    assert math.fsum(cell for cells in mass.cells for cell in cells if cell is not None) == pytest.approx(1.0)
    outside = layer_sums({"lm_head.weight": 2.0, "model.layers.1.mlp.up_proj.weight": 3.0}, None)
    assert outside == LayerGrid(
        modules=("mlp.up_proj", "lm_head"), num_layers=2, has_outside=True, cells=((None, 3.0, None), (None, None, 2.0))
    )


# -- budget and histograms


def test_the_budget_curve_is_the_sorted_mass(selection: Selection, scores: RegionScores) -> None:
    (blocks, rows) = budget_curves(selection, scores)
    members = [c for c in scores.candidates if c.kind == "row"]
    mass = torch.cat([scores.scores[c.weight, "row"] for c in members]).sort(descending=True).values
    assert rows.num_entries == len(mass) * 1376
    # The curve of few regions has every point; of many, the points that are there lie on it.
    for curve, size in ((rows, 1376), (blocks, None)):
        assert bool((curve.spent.diff() > 0).all())
        assert bool((curve.captured.diff() >= 0).all())
        assert (float(curve.spent[0]), float(curve.captured[0])) == (0.0, 0.0)
        assert float(curve.spent[-1]) == curve.num_entries
        assert float(curve.captured[-1]) == pytest.approx(1.0)
        assert curve.at(curve.actual_spent) >= curve.actual_captured * 0.99
        assert curve.at(0) == 0.0
        if size is not None:
            number = round(curve.actual_spent / size)
            assert curve.actual_captured == pytest.approx(float(mass[:number].sum() / mass.sum()))
            assert curve.at(curve.actual_spent) == pytest.approx(curve.actual_captured, rel=0.02)
    head, row = budget_sheet([rows]).head, budget_sheet([rows]).rows[0]
    assert row[head.index("captured")] == f"{100 * rows.actual_captured:.1f}%"
    doubled = float(mass[: 2 * round(rows.actual_spent / 1376)].sum() / mass.sum())
    assert float(row[head.index("2x")].removesuffix("%")) == pytest.approx(100 * doubled, rel=0.02)


def test_block_shapes_on_unlike_scales_share_a_curve_and_a_map() -> None:
    """A matrix whose blocks have another shape, and scores a thousand times as large, is neither first nor all."""
    wide = synthetic_scores(2, kinds={"self_attn.q_proj": ("block",)}, block_shape=(32, 32))
    small = synthetic_scores(2, kinds={"self_attn.k_proj": ("block",)}, block_shape=(16, 16), seed=1)
    found = []
    for factor in (1.0, 1000.0):
        values = {**wide.scores, **{key: value * factor for key, value in small.scores.items()}}
        both = RegionScores([*wide.candidates, *small.candidates], values, wide.metadata)
        (curve,) = budget_curves(best_regions(wide), both)
        found.append((curve, mass_shares(both, "block", "abs_of_mean").cells))
    (before, cells), (after, scaled_cells) = found
    torch.testing.assert_close(before.captured, after.captured)
    torch.testing.assert_close(before.spent, after.spent)
    assert before.actual_captured == pytest.approx(after.actual_captured)
    for row, scaled in zip(cells, scaled_cells, strict=True):
        assert row == pytest.approx(scaled)
    # Regions go by falling score per entry: no point of the curve lies below the line to any later one.
    slopes = after.captured.diff() / after.spent.diff()
    assert bool((slopes.diff() < 1e-12).all())


def test_histograms_hold_every_region_once(selection: Selection, scores: RegionScores) -> None:
    found = histograms(selection, scores, 20)
    assert sum(int(each.every.sum()) for each in found) == sum(c.num_regions for c in scores.candidates)
    assert sum(int(each.chosen.sum()) for each in found) == sum(
        weight.num_regions("block") + weight.num_regions("row") for weight in selection.weights.values()
    )
    assert all(bool((each.chosen <= each.every).all()) for each in found)
    blocks = [each for each in found if each.kind == "block"]
    assert all(torch.equal(each.edges, blocks[0].edges) for each in blocks), "modules are compared on one axis"
    for each in found:  # Everything above the cut was chosen, nothing below.
        first = int(each.chosen.nonzero()[0])
        assert torch.equal(each.chosen[first + 1 :], each.every[first + 1 :])


def _with_values(scores: RegionScores, change: Any) -> RegionScores:
    return RegionScores(
        scores.candidates, {key: change(value) for key, value in scores.scores.items()}, scores.metadata
    )


@pytest.mark.parametrize(
    ("change", "left_out", "captured"),
    [
        (lambda value: -value, 0, False),
        (lambda value: torch.zeros_like(value), 0, False),
        (lambda value: torch.full_like(value, -torch.inf), None, False),
        (lambda value: value.clamp(min=1e-3), 0, True),
        (lambda value: torch.where(value > value.median(), value, -torch.inf), None, True),
        (lambda value: torch.where(value > value.quantile(0.25), value, 0.0), 2048 // 4, True),
        (lambda value: torch.ones_like(value), 0, True),
    ],
    ids=["negative", "zero", "excluded", "clamped", "half excluded", "quarter zero", "equal"],
)  # fmt: skip
def test_any_scores_can_be_shown(change: Any, left_out: int | None, captured: bool, capsys: Any) -> None:
    base = synthetic_scores(2, kinds={"self_attn.q_proj": ("block", "column")})
    chosen, scores = best_regions(base), _with_values(base, change)
    shown = histograms(chosen, scores, 10)
    for each in shown:
        total = sum(c.num_regions for c in scores.candidates if c.kind == each.kind)
        assert int(each.every.sum()) + each.num_left_out == total
    assert bool(budget_curves(chosen, scores)) == captured
    console = Console(width=80)
    selection_terminal.print_selection(console, "made up", chosen, scores, "module")
    assert "made up" in capsys.readouterr().out
    figures = [score_map_figure(each, scores, chosen) for each in weight_types(scores)]
    figures.append(budget_figure(budget_curves(chosen, scores)))
    figures += [histogram_figure(shown)] if shown else []
    figures.append(
        shares_figure([("mass", mass_shares(scores, kind, score)) for kind, score in kinds_and_scores(scores)])
    )
    for figure in figures:
        assert plots.to_png(figure).startswith(b"\x89PNG")


# -- overlap


def _random_weight(shape: tuple[int, int], block: tuple[int, int], generator: torch.Generator) -> WeightSelection:
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))

    def some(number: int, share: float) -> torch.Tensor:
        return torch.randperm(number, generator=generator)[: int(share * number)]

    flat = some(grid[0] * grid[1], float(torch.rand(1, generator=generator)) * 0.7)
    return WeightSelection(
        shape=shape,
        block_size=block,
        blocks=torch.stack([flat // grid[1], flat % grid[1]], 1),
        rows=some(shape[0], float(torch.rand(1, generator=generator)) * 0.4),
        columns=some(shape[1], float(torch.rand(1, generator=generator)) * 0.4),
    )


def _owners(weight: WeightSelection) -> torch.Tensor:
    """Number of the owning kind of each entry, by the library's own list of entries; the reference."""
    owner = torch.full((weight.shape[0] * weight.shape[1],), len(KINDS))
    for number, kind in enumerate(KINDS):
        if weight.num_regions(kind):
            owner[weight.flat_indices(kind)] = number
    return owner


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ((12, 20), (4, 4), (4, 4)),
        ((13, 22), (4, 4), (5, 3)),
        ((7, 30), (2, 9), (7, 30)),
        ((1, 5), (1, 1), (1, 2)),
        ((64, 48), (16, 12), (8, 6)),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_overlap_equals_that_of_dense_masks(
    shape: tuple[int, int], first: tuple[int, int], second: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = _random_weight(shape, first, generator), _random_weight(shape, second, generator)
    together = _owners(weights[0]) * 5 + _owners(weights[1])
    expected = torch.bincount(together, minlength=25).reshape(5, 5)
    assert torch.equal(owned_together(*weights), expected)
    assert torch.equal(owned_together(weights[1], weights[0]), expected.T)
    sums, *kinds = compare_weights(*weights, Place())
    inside = [_owners(weight) < len(KINDS) for weight in weights]
    assert (sums.first, sums.second) == (int(inside[0].sum()), int(inside[1].sum()))
    assert sums.common == int((inside[0] & inside[1]).sum())
    assert sums.jaccard == sums.common / max(int((inside[0] | inside[1]).sum()), 1)
    for each in kinds:
        sets = [{tuple(region) for region in _regions(weight, each.kind)} for weight in weights]
        if each.kind == "block" and weights[0].block_shape != weights[1].block_shape:
            assert each.regions_common == 0
        else:
            assert each.regions_common == len(sets[0] & sets[1])
        assert each.regions_first_only == len(sets[0]) - each.regions_common
        assert each.regions_second_only == len(sets[1]) - each.regions_common


def _regions(weight: WeightSelection, kind: Any) -> list[list[int]]:
    if kind == "block":
        return weight.blocks.tolist()
    return [[index] for index in (weight.rows if kind == "row" else weight.columns).tolist()]


def test_a_selection_overlaps_itself_wholly_and_another_part_not(selection: Selection) -> None:
    last = overall(compare(selection, selection))[-1]
    assert (last.common, last.jaccard, last.regions_first_only) == (selection.num_parameters, 1.0, 0)
    names = list(selection.weights)
    halves = [Selection({name: selection.weights[name] for name in part}) for part in (names[::2], names[1::2])]
    last = overall(compare(*halves))[-1]
    assert (last.kind, last.common, last.jaccard) == (None, 0, 0.0)
    assert (last.first, last.second) == (halves[0].num_parameters, halves[1].num_parameters)
    compared = compare(selection, halves[0])
    for by in ("module", "layer", "weight"):
        rows = overlaps_by(compared, by)
        assert sum(row.first for row in rows) == selection.num_parameters
        assert sum(row.common for row in rows) == halves[0].num_parameters
    grid = jaccard_grid(compared, 8)
    kept = "model.layers.4.self_attn.v_proj.weight" in halves[0].weights
    assert grid.cells[grid.modules.index("self_attn.v_proj")][4] == float(kept)
    assert grid.cells[grid.modules.index("model.norm")][8] == float("model.norm.weight" in halves[0].weights)


def test_selections_of_a_7b_model_are_compared_weight_by_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights: list[dict[str, WeightSelection]] = [{}, {}]
    for layer in range(32):
        for module, (height, width) in SHAPES.items():
            shape = (8 * height, 8 * width)
            for side in (0, 1):
                grid = (shape[0] // 256, shape[1] // 256)
                flat = torch.randperm(grid[0] * grid[1], generator=generator)[:9]
                weights[side][f"model.layers.{layer}.{module}.weight"] = WeightSelection(
                    shape=shape,
                    block_size=256,
                    blocks=torch.stack([flat // grid[1], flat % grid[1]], 1),
                    rows=torch.randperm(shape[0], generator=generator)[:3],
                    columns=torch.randperm(shape[1], generator=generator)[:3],
                )
    first, second = map(Selection, weights)
    compared = compare(first, second)
    assert len(compared) == 224
    assert len(overlaps_by(compared, "module")) >= len(SHAPES)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            lambda: Selection({"layers.0.q_proj.weight": WeightSelection(shape=(8, 13), rows=[0])}),
            ["layers.0.q_proj.weight is 8x12 in PATH and 8x13 in OTHER", "different models"],
        ),
        (
            lambda: Selection(
                {"layers.1.q_proj.weight": WeightSelection(shape=(8, 12), rows=[0])}, {"num_parameters_model": 7}
            ),
            ["1,000 parameters", "one of 7 parameters"],
        ),
        (
            lambda: Selection({"layers.1.q_proj.weight": WeightSelection(shape=(8, 12), rows=[0])}, {"num_layers": 3}),
            ["2 layers and OTHER from one of 3 layers"],
        ),
    ],
)
def test_selections_of_different_models_are_refused(other: Any, says: list[str]) -> None:
    mine = Selection(
        {"layers.0.q_proj.weight": WeightSelection(shape=(8, 12), rows=[0])},
        {"num_parameters_model": 1000, "num_layers": 2},
    )
    with pytest.raises(InputError) as caught:
        compare(mine, other())
    assert all(part in str(caught.value) for part in says)


# -- scores that fit


def _one(
    shape: tuple[int, int] = (512, 512), name: str = "model.layers.0.self_attn.q_proj.weight", **parts: Any
) -> Any:
    metadata = parts.pop("metadata", None)
    return Selection({name: WeightSelection(shape=shape, **parts)}, metadata)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (_one(), None),
        (_one(block_size=32, blocks=[[0, 0]]), None),
        (_one(shape=(512, 1), name="model.layers.0.input_layernorm.weight", whole=True), None),
        (_one(shape=(512, 513), rows=[0]), "with shape 512x512, and the selection has 512x513"),
        (_one(block_size=64, blocks=[[0, 0]]), "blocks of 32x32 in model.layers.0.self_attn.q_proj.weight"),
        (_one(columns=[0]), "no scores of any chosen region (such as the columns of model"),
        (_one(name="transformer.h.0.q_proj.weight", rows=[0]), "no scores of any chosen region"),
        (
            _one(block_size=32, blocks=[[0, 0]], metadata={"base": {"name": "b", "sha256": "2" * 64}}),
            "scores of the base a (111111111111), and the selection was chosen for b (222222222222)",
        ),
    ],
    ids=["empty", "fits", "vector", "shape", "block size", "kind", "names", "base"],
)
def test_scores_of_another_model_are_refused(chosen: Selection, says: str | None) -> None:
    scores = synthetic_scores(1)
    scores.metadata["base"] = {"name": "a", "sha256": "1" * 64}
    if says is None:
        check_scores_fit(chosen, scores, "--scores x")
        return
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        check_scores_fit(chosen, scores, "--scores x")
    assert str(caught.value).startswith("--scores x has ")
    assert "\n" not in str(caught.value)


def test_scores_are_found_beside_the_selection(selection: Selection, scores: RegionScores, tmp_path: Path) -> None:
    def found(file: Path) -> bool:
        return read_scores(selection, file, None)[0] is not None

    mine, run = tmp_path / "mine.safetensors", tmp_path / "selection.safetensors"
    assert not found(mine)
    scores.save(tmp_path / "scores.safetensors")
    assert not found(mine), "a folder may hold several selections"
    assert found(run)
    (tmp_path / "adapter").mkdir()
    assert found(tmp_path / "adapter" / "selection.safetensors")
    assert not found(tmp_path / "other" / "selection.safetensors")
    scores.save(tmp_path / "mine.scores.safetensors")
    assert found(mine)
    other = synthetic_scores(2, block_shape=(64, 64))
    other.save(tmp_path / "mine.scores.safetensors")
    assert read_scores(selection, mine, None)[0] is None
    assert "shown without scores" in read_scores(selection, mine, None)[1]
    with pytest.raises(InputError, match="--scores "):
        read_scores(selection, mine, str(tmp_path / "mine.scores.safetensors"))


# -- terminal


def _print(show: Any, **options: Any) -> str:
    console = Console(width=80, highlight=False, record=True, file=open("/dev/null", "w"), **options)  # noqa: SIM115
    show(console)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("num_layers", [1, 8, 130])
@pytest.mark.parametrize("options", [{}, {"color_system": "truecolor", "force_terminal": True}])
def test_everything_fits_eighty_columns(num_layers: int, options: dict[str, Any]) -> None:
    scores = synthetic_scores(num_layers, kinds={"self_attn.v_proj": ("block",), "mlp.down_proj": ("row", "column")})
    chosen = best_regions(scores, whole={"model.norm.weight": 512, "model.layers.0.input_layernorm.weight": 512})
    other = best_regions(_with_values(scores, lambda value: value.flip(0)))

    def show(console: Console) -> None:
        for by in ("module", "layer", "weight"):
            if by != "weight" or num_layers < 9:
                selection_terminal.print_selection(console, "x", chosen, scores, by)
                selection_terminal.print_overlap(console, compare(chosen, other), by, num_layers)

    text = _print(show, **options)
    assert max(map(len, text.splitlines())) <= 80
    for number in ("Jaccard", "captured", "candidates"):
        assert number in text, "no column was lost"


def test_a_map_shows_layers_as_shades_and_says_the_scale() -> None:
    cells = ((0.0, 0.1, 0.4, None), (None, 0.2, None, 0.35))
    grid = LayerGrid(modules=("q_proj", "lm_head"), num_layers=3, has_outside=True, cells=cells)
    lines = _print(
        lambda console: selection_terminal._print_lines(console, selection_terminal.layer_map(console, grid, "t"))
    )
    assert [line.rstrip() for line in lines.splitlines()] == [
        "t",
        "q_proj    . ▒▒▒███",
        "lm_head     ▓▓▓     ███",
        "layer    0     2    none",
        "         0 ░▒▓█ 40.0 %   . none",
    ]


def test_ascii_terminals_get_ascii(selection: Selection, scores: RegionScores) -> None:
    class Ascii(Console):
        @property
        def encoding(self) -> str:
            return "ascii"

    console = Ascii(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    grid = trained_shares(selection, scores, 8)
    lines = selection_terminal.layer_map(console, grid, "Share")
    lines += selection_terminal.histogram_lines(console, histograms(selection, scores, 48))
    console.file.close()
    assert "".join(line.plain for line in lines).isascii()


# -- pictures


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({"num_layers": 1, "kinds": {"self_attn.q_proj": ("block",)}}, 1),
        ({"num_layers": 32, "kinds": {"mlp.gate_proj": ("block",)}, "block_shape": (64, 172)}, 32),
        ({"num_layers": 60, "kinds": {"self_attn.k_proj": ("block",)}}, 48),
        ({"num_layers": 5, "kinds": {}, "num_experts": 4}, 20),
    ],
    ids=["one", "oblong", "many", "experts"],
)
def test_maps_of_blocks_mark_what_was_chosen(options: dict[str, Any], panels: int) -> None:
    scores = synthetic_scores(**options)
    chosen = best_regions(scores, share=0.05)
    (shown,) = weight_types(scores)
    figure: Any = score_map_figure(shown, scores, chosen, plots.DARK)
    plots.to_png(figure)
    axes = figure.axes[0]
    assert len(axes.images) == panels
    label = axes.get_title(loc="left").replace("\n", " ")
    total = sum(c.num_regions for c in scores.candidates)
    assert f"in {shown.module}: {sum(w.num_regions('block') for w in chosen.weights.values()):,} of {total:,}" in label
    assert ("weights shown" in label) == (panels < len(shown.candidates))
    # Every panel has the scores of its weight; the lines around chosen cells have the length of their outline.
    image = axes.images[0].get_array()
    expected = scores.scores[shown.candidates[0].weight, "block"].numpy()
    np.testing.assert_array_equal(np.asarray(image), expected)
    (lines,) = axes.collections
    if panels == len(shown.candidates):
        corners = 0
        for weight in chosen.weights.values():
            cells = set(map(tuple, weight.blocks.tolist()))
            steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
            corners += sum((row + y, column + x) not in cells for row, column in cells for y, x in steps)
        assert len(lines.get_segments()) == corners
    extents = sorted(image.get_extent() for image in axes.images)
    assert all(right[0] >= left[1] or right[0] == left[0] for left, right in pairwise(extents)), "panels lie apart"


@pytest.mark.parametrize("kind", ["row", "column"])
def test_maps_of_channels_mark_what_was_chosen(kind: Any) -> None:
    scores = synthetic_scores(4, kinds={"mlp.down_proj": (kind,)})
    chosen = best_regions(scores)
    (shown,) = weight_types(scores)
    figure: Any = score_map_figure(shown, scores, chosen)
    axes = figure.axes[0]
    (marks,) = axes.get_lines()
    expected = [
        (float(channel) + 0.5, int(name.split(".")[2]))
        for name, weight in chosen.weights.items() for channel in (weight.rows if kind == "row" else weight.columns)
    ]  # fmt: skip
    found = [(x, int(y)) for x, y in zip(marks.get_xdata(), marks.get_ydata(), strict=True)]
    assert sorted(found) == sorted(expected)
    assert axes.get_xlabel() == ("output channel" if kind == "row" else "input channel")
    assert ("neighbouring" in axes.get_title(loc="left")) == (kind == "column"), "1,376 channels are put together"


def test_the_budget_picture_marks_the_selection_and_its_multiples(selection: Selection, scores: RegionScores) -> None:
    curves = budget_curves(selection, scores)
    figure: Any = budget_figure(curves)
    for axes, curve in zip(figure.axes, curves, strict=True):
        marks = {line.get_marker(): line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() != "None"}
        np.testing.assert_allclose(marks["D"], [curve.actual_spent, curve.actual_captured])
        assert [text.get_text().split("\n")[0] for text in axes.texts] == ["0.25x", "0.5x", "2x", "4x"]


# -- the command


def test_inspect_shows_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: Any = {"self_attn.v_proj": ("block",), "mlp.down_proj": ("block", "row")}
    scores = synthetic_scores(2, kinds=kinds)
    chosen, other = best_regions(scores), best_regions(synthetic_scores(2, kinds=kinds, seed=1))
    chosen.save(tmp_path / "a.safetensors")
    other.save(tmp_path / "b.safetensors")
    scores.save(tmp_path / "a.scores.safetensors")
    page, pictures = tmp_path / "new" / "a.html", tmp_path / "pictures"
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    assert main(["inspect", a, b, "--html", str(page), "--png", str(pictures)]) == 0
    out = capsys.readouterr().out
    for part in ("Overlap by module", chosen.digest(), other.digest(), "Score mass captured", "Jaccard"):
        assert part in out
    names = {path.name for path in pictures.iterdir()}
    assert names == {
        "selection.png", "score-mass.png", "budget-curve.png", "score-histogram.png", "overlap.png",
        *(f"scores-{module}-abs_of_mean.png" for module in ("self_attn.v_proj-block", "mlp.down_proj-block", "mlp.down_proj-row")),
    }  # fmt: skip
    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    links = [value for _, name, value in parsed.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 2 * len(names)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    text = "\n".join(parsed.texts)
    for name, value in facts(chosen, scores):
        assert name in text
        assert value in text

    assert main(["inspect", a, b, "--png", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in pictures.iterdir()
    }
    assert main(["inspect", a]) == 0
    out = capsys.readouterr().out
    for part in (
        "Selection by module",
        "Share of each matrix",
        "Score mass that multiples",
        "Scores of rows",
        "chosen",
    ):
        assert part in out
    assert main(["inspect", a, "--by", "layer"]) == 0
    assert "Scores of rows" not in capsys.readouterr().out
    assert main(["inspect", b]) == 0
    assert "captured" not in capsys.readouterr().out, "nothing is known of the scores"


def test_the_page_does_not_trust_names(tmp_path: Path) -> None:
    from launcher.selection_page import write_selection_page

    evil = Selection({"<script>alert(1)</script>.weight": WeightSelection(shape=(4, 4), rows=[1])})
    write_selection_page(tmp_path / "p.html", "<b>", evil, None, None)
    html = (tmp_path / "p.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    Page(html)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.safetensors", "gone"], ["OTHER is gone, which does not exist"]),
        (["a.safetensors", "."], ["OTHER is ., a folder without selection.safetensors"]),
        (["a.safetensors", "--scores=gone"], ["gone does not exist"]),
        (["a.safetensors", "--scores=a.safetensors"], ["a.safetensors has format 'sparse_zero.selection'"]),
        (["s.safetensors"], ["s.safetensors has format 'sparse_zero.scores'"]),
        (["a.safetensors", "--html=."], ["--html is .", "is a folder"]),
        (["a.safetensors", "--png=a.safetensors"], ["--png is a.safetensors", "is a file"]),
        (["a.safetensors", "--png=a.safetensors/b"], ["--png is a.safetensors/b", "is a file"]),
        (["a.safetensors", "--by=expert"], ["--by", "'expert'", "module"]),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], says: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = synthetic_scores(1)
    best_regions(scores).save("a.safetensors")
    scores.save("s.safetensors")
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(part in captured.err for part in says), captured.err
    assert {path.name for path in tmp_path.iterdir()} == before


# -- the report of a run


def test_a_run_with_scores_has_them_in_its_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    scores = synthetic_scores(2, kinds={"self_attn.v_proj": ("block",), "mlp.down_proj": ("row",)})
    chosen = best_regions(scores)
    chosen.save(run / "selection.safetensors")
    scores.save(run / "scores.safetensors")
    html = write_report(run).read_text(encoding="utf-8")
    text = "\n".join(Page(html).texts)
    assert "captured" in text
    assert {"score-mass.png", "budget-curve.png", "score-histogram.png", "selection.png"} <= {
        path.name for path in (run / "report").iterdir()
    }
    Selection({"other.0.weight": WeightSelection(shape=(4, 4), rows=[1])}).save(run / "selection.safetensors")
    text = "\n".join(Page(write_report(run).read_text(encoding="utf-8")).texts)
    assert "not those of this selection" in text


@pytest.mark.parametrize(
    ("lowest", "operations", "said"),
    [(3, 0.8125, "3 of 0 to 7: a step has 81"), (-1, 1.0, "the embeddings: a step has 100"), (8, 0.5, "none: a step")],
)
def test_the_lowest_layer_is_told_with_what_a_step_then_takes(selection, lowest, operations, said):
    depth = {"lowest_layer": lowest, "step_operations": operations}
    told = Selection(selection.weights, {"num_layers": 8, "depth": depth})
    assert dict(facts(told, None))["Lowest layer"].startswith(said)
    assert "Lowest layer" not in dict(facts(Selection(selection.weights, {"num_layers": 8}), None))
