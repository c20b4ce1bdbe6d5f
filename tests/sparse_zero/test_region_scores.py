"""Scores on disk, refused files, and the share of the score mass that a selection captures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors, write_safetensors
from sparse_zero.selection.budget import normalised
from sparse_zero.selection.calibration import Key
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from tests.sparse_zero.test_scores import regions

METADATA = {
    "config": {"accumulate": "sum", "seed": 3},
    "num_calibration_batches": 7,
    "rules": {
        "house:score": {"needs": ["gradient"], "size_neutral": True},
        "abs_of_mean": {"needs": ["gradient_sums"], "size_neutral": False},
    },
}


def some_candidates() -> list[Candidates]:
    tied = regions("column", (5, 6), name="lm_head")
    tied = replace(tied, matrix=replace(tied.matrix, owners=(("embed", "weight"), ("lm_head", "weight"))))
    return [
        regions("row", (5, 6), name="experts", slice_index=0, per_matrix=2),
        replace(regions("row", (5, 6), name="experts", slice_index=1), pick="mixed"),
        regions("block", (7, 10), name="layers.0.q_proj"),
        regions("row", (7, 10), name="layers.0.q_proj"),
        tied,
    ]


def scores_of(candidates: list[Candidates]) -> dict[Key, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {(c.weight, c.kind): torch.randn(c.grid, generator=generator, dtype=torch.float64) for c in candidates}


def test_scores_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    candidates = some_candidates()
    scores = scores_of(candidates)
    scores["layers.0.q_proj.weight", "block"][0, 1] = -math.inf
    scores["layers.0.q_proj.weight", "block"][1, 1] = 1.0 + 2.0**-50
    before = RegionScores(candidates, scores, METADATA)
    before.save(tmp_path / "scores.safetensors")
    after = RegionScores.load(tmp_path / "scores.safetensors")
    assert after.candidates == candidates
    assert after.metadata == METADATA
    assert list(after.scores) == [(c.weight, c.kind) for c in candidates]
    assert all(torch.equal(after.scores[key], scores[key]) for key in scores)
    assert "by abs_of_mean" in repr(after)
    assert after.needs("house:score") == {"gradient"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores.pop(("embed.weight", "column")), "differ in columns of embed.weight"),
        (lambda scores: scores.update({("other", "row"): torch.ones(2)}), "differ in rows of other"),
        (lambda scores: scores["layers.0.q_proj.weight", "row"].fill_(math.nan), "is NaN for 7 of 7"),
        (lambda scores: scores.update({("layers.0.q_proj.weight", "row"): torch.ones(6)}), r"has the shape \(6,\)"),
    ],
)
def test_scores_that_do_not_fit_their_candidates_are_refused(change: Any, message: str) -> None:
    candidates = some_candidates()
    scores = scores_of(candidates)
    change(scores)
    with pytest.raises(InputError, match=message):
        RegionScores(candidates, scores, METADATA)


def test_a_candidate_listed_twice_is_refused() -> None:
    candidates = some_candidates()
    with pytest.raises(InputError, match=r"differ in columns of embed.weight: give every candidate once"):
        RegionScores([*candidates, candidates[-1]], scores_of(candidates), METADATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.update(version=2), "scores in version 2, and this is for 1: score again"),
        (lambda tensors, header: header.pop("version"), "header that cannot be read .*version"),
        (
            lambda tensors, header: header["candidates"][0].update(matrix=9),
            "header that cannot be read .*matrix 9 instead of a whole number from 0 to 2",
        ),
        (lambda tensors, header: header["candidates"][0].update(colour="red"), "header that cannot be read .*colour"),
        (
            lambda tensors, header: header["matrices"][0].update(shape=[2**40, 2**40]),
            "shape .* whole numbers from 1 to",
        ),
        (lambda tensors, header: header["matrices"][0].update(owners=["q_proj"]), "owners"),
        (lambda tensors, header: header["matrices"][0].update(is_linear=1), "is_linear 1 instead of true or false"),
        (lambda tensors, header: header["candidates"][0].update(slice_index=-1), "slice_index -1"),
        (lambda tensors, header: header["candidates"][0].update(block_shape=[-1, 2**40]), "block_shape"),
        (lambda tensors, header: header["candidates"][0].update(kind="diagonal"), "kind 'diagonal'"),
        # No code of a file's choice is imported.
        (lambda tensors, header: header["candidates"][0].update(score="os:getcwd"), "no rule of the score 'os:getcwd'"),
        (lambda tensors, header: header["metadata"].update(config=[]), r"config \[\] instead of an object"),
        (lambda tensors, header: header["metadata"]["rules"]["abs_of_mean"].update(size_neutral=0), "size_neutral 0"),
        (lambda tensors, header: tensors["embed.weight/column"].add_(1), "does not match its own digest"),
        (lambda tensors, header: header["metadata"].update(num_calibration_batches=8), "does not match its own digest"),
        (lambda tensors, header: tensors.pop("embed.weight/column"), "differ in embed.weight/column"),
        (lambda tensors, header: tensors.update(extra=torch.ones(1)), "differ in extra"),
        (
            lambda tensors, header: tensors.update({"embed.weight/column": torch.ones(5, dtype=torch.float64)}),
            r"is damaged .*columns of embed.weight has the shape \(5,\)",
        ),
        (
            lambda tensors, header: tensors["embed.weight/column"].fill_(math.inf),
            r"is damaged .*\+inf for 6 of 6 regions",
        ),
    ],
)
def test_files_that_are_no_scores_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    candidates, path = some_candidates(), tmp_path / "scores.safetensors"
    RegionScores(candidates, scores_of(candidates), METADATA).save(path)
    tensors, metadata = read_safetensors(path, "sparse_zero.scores")
    header = json.loads(metadata["header"])
    change(tensors, header)
    write_safetensors(path, tensors, {**metadata, "header": json.dumps(header)})
    with pytest.raises(InputError, match=message) as caught:
        RegionScores.load(path)
    assert str(path) in str(caught.value)


def test_a_selection_is_no_score_file(tmp_path: Path) -> None:
    path = tmp_path / "selection.safetensors"
    Selection({"a": WeightSelection(shape=(4, 4), rows=[1])}).save(path)
    with pytest.raises(InputError, match=r"'sparse_zero.selection', not 'sparse_zero.scores'"):
        RegionScores.load(path)


def test_the_share_captured_is_the_chosen_part_of_the_mass() -> None:
    candidates = [
        regions("block", (7, 10), score="house:score"),
        regions("row", (7, 10), score="house:score"),
        regions("row", (5, 6), score="house:score", name="v_proj"),
    ]
    scores = scores_of(candidates)
    scores["layers.0.q_proj.weight", "block"][2, 2] = -math.inf
    selection = Selection(
        {
            "layers.0.q_proj.weight": WeightSelection(
                shape=(7, 10), block_size=(3, 4), blocks=[[0, 0], [2, 1], [2, 2]], rows=[2]
            ),
            "not.scored": WeightSelection(shape=(4, 1), whole=True),
        }
    )
    # A mean per entry times the entries: heights 3, 3, 1 and widths 4, 4, 2.
    blocks = scores["layers.0.q_proj.weight", "block"].tolist()
    heights, widths = (3, 3, 1), (4, 4, 2)
    mass = {(i, j): max(blocks[i][j], 0.0) * heights[i] * widths[j] for i in range(3) for j in range(3)}
    block, all_blocks = mass[0, 0] + mass[2, 1] + mass[2, 2], sum(mass.values())
    rows = [max(each, 0.0) * 10 for each in scores["layers.0.q_proj.weight", "row"].tolist()]
    others = [max(each, 0.0) * 6 for each in scores["v_proj.weight", "row"].tolist()]
    found = RegionScores(candidates, scores, METADATA).share_captured(selection)
    assert found["by_kind"] == pytest.approx({"block": block / all_blocks, "row": rows[2] / (sum(rows) + sum(others))})
    assert found["by_weight"] == pytest.approx(
        {"layers.0.q_proj.weight": (block + rows[2]) / (all_blocks + sum(rows)), "v_proj.weight": 0.0}
    )
    assert found["total"] == pytest.approx((block + rows[2]) / (all_blocks + sum(rows) + sum(others)))


def test_the_mass_of_a_score_that_is_no_mean_per_entry_is_the_score() -> None:
    candidates = [regions("block", (7, 10))]
    scores = scores_of(candidates)
    selection = Selection({candidates[0].weight: WeightSelection(shape=(7, 10), block_size=(3, 4), blocks=[[2, 2]])})
    positive = scores[candidates[0].weight, "block"].clamp(min=0.0)
    # Without metadata the rule itself is asked.
    for metadata in (METADATA, {}):
        found = RegionScores(candidates, scores, metadata).share_captured(selection)
        assert found["total"] == pytest.approx(float(positive[2, 2] / positive.sum()))


def test_kinds_on_unlike_scales_are_added_on_one() -> None:
    """Blocks 3x4 and rows of 10 entries: each divided by its mean magnitude, and as heavy as the entries it covers."""
    candidates = [regions("block", (6, 8)), regions("row", (6, 8)), regions("row", (6, 8), name="k", per_matrix=1)]
    (name, fixed), scores = (candidates[0].weight, candidates[2].weight), scores_of(candidates)
    scores[name, "block"][0, 1] = -math.inf
    selection = Selection(
        {
            name: WeightSelection(shape=(6, 8), block_size=(3, 4), blocks=[[0, 0], [1, 0]], rows=[1, 4]),
            fixed: WeightSelection(shape=(6, 8), rows=[2]),
        }
    )
    block, row, other = (scores[c.weight, c.kind].reshape(-1).tolist() for c in candidates)
    # Of the rows, those compete that have no fixed number.
    block_unit = 12 / (sum(abs(each) for each in block if each > -math.inf) / 3)
    row_unit = 8 / (sum(map(abs, row)) / 6)
    mass = [max(each, 0.0) * block_unit for each in block], [max(each, 0.0) * row_unit for each in (*row, *other)]
    expected = (mass[0][0] + mass[0][2] + mass[1][1] + mass[1][4] + mass[1][8]) / sum(map(sum, mass))
    found = RegionScores(candidates, scores, METADATA).share_captured(selection)
    assert found["total"] == pytest.approx(expected)
    assert found["by_kind"]["block"] == pytest.approx((mass[0][0] + mass[0][2]) / sum(mass[0]))
    # On which scale a kind is scored does not matter.
    larger = {key: each * (1000.0 if key[1] == "row" else 1.0) for key, each in scores.items()}
    again = RegionScores(candidates, larger, METADATA).share_captured(selection)
    assert again["total"] == pytest.approx(found["total"])
    assert again["by_kind"] == pytest.approx(found["by_kind"])
    # With the same means, the regions compete.
    competing = {key: each.reshape(-1) for key, each in scores.items()}
    whole = RegionScores(candidates, scores, METADATA)
    for c in candidates[:2]:
        expected_scores = normalised(candidates[:2], competing, False)[c.weight, c.kind]
        torch.testing.assert_close(whole.comparable(c).reshape(-1), expected_scores, rtol=1e-12, atol=0)


def test_masses_of_several_scores_are_not_added() -> None:
    candidates = [regions("block", (7, 10)), regions("row", (7, 10), score="first")]
    found = RegionScores(candidates, scores_of(candidates), METADATA).share_captured(Selection({}))
    assert found == {"total": None, "by_kind": {"block": 0.0, "row": 0.0}, "by_weight": {candidates[0].weight: None}}
    nothing: dict[Key, Tensor] = {(candidates[0].weight, "block"): -torch.ones(3, 3)}
    assert RegionScores(candidates[:1], nothing, METADATA).share_captured(Selection({}))["total"] is None


def test_a_selection_of_other_regions_is_refused() -> None:
    candidates = [regions("block", (7, 10))]
    scores = RegionScores(candidates, scores_of(candidates), METADATA)
    with pytest.raises(InputError, match=r"blocks of \(2, 2\) in .*, the scores have \(3, 4\)"):
        scores.share_captured(
            Selection({candidates[0].weight: WeightSelection(shape=(7, 10), block_size=2, blocks=[[0, 0]])})
        )
    with pytest.raises(InputError, match=r"as \(7, 11\), the scores have \(7, 10\)"):
        scores.share_captured(Selection({candidates[0].weight: WeightSelection(shape=(7, 11), rows=[0])}))
