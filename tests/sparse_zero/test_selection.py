"""Invariant 4 and the whole way of a selection: candidates, scores, budget, ties, warnings, files."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors, write_safetensors
from sparse_zero.layers.sparsify import replace_module
from sparse_zero.selection.candidates import expand_braces, find_candidates
from sparse_zero.selection.config import Kind
from sparse_zero.selection.select import bytes_per_parameter, check_selection, num_parameters
from tests.sparse_zero.helpers import TinyModel, mixed_selection, owner_matrix, tiny_loss


def make_batches(number: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 32, (2, 9), generator=generator) for _ in range(number)]


def make_model(**options: object) -> TinyModel:
    torch.manual_seed(11)
    return TinyModel(**options)  # type: ignore[arg-type]


def config(**options: object) -> sz.SelectionConfig:
    regions = (
        sz.RegionConfig(kind="block", modules=("*.{q,k}_proj",), block_size=6),
        sz.RegionConfig(kind="row", modules=("*.{q,v}_proj",)),
        sz.RegionConfig(kind="column", modules=("*.{q,o}_proj",)),
    )
    return sz.SelectionConfig(**{"regions": regions, "budget": sz.BudgetConfig(parameters=500), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs", "l2"])
def test_scores_equal_those_of_the_dense_gradient(score, accumulate):
    model, batches = make_model().double(), make_batches()
    found = sz.score_regions(
        model, iter(batches), config(score=score, accumulate=accumulate, accumulator_dtype="float64"), tiny_loss
    )
    assert found.metadata["num_calibration_batches"] == len(batches)
    assert {kind for _, kind in found.scores} == {"block", "row", "column"}

    dense: dict[str, list[Tensor]] = {c.weight: [] for c in found.candidates}
    parameters = dict(model.named_parameters())
    for batch in batches:
        model.zero_grad()
        tiny_loss(model, batch).backward()
        for name, gradients in dense.items():
            gradients.append(parameters[name].grad.clone())

    def plain(part: Tensor) -> float:
        if score == "abs_of_mean":
            return abs(part.mean().item())
        return part.abs().mean().item() if score == "mean_of_abs" else part.norm().item()

    for candidate in found.candidates:
        stacked = torch.stack(dense[candidate.weight])
        matrices = stacked.unbind() if accumulate == "per_step" else [stacked.mean(0)]
        scores = found.scores[candidate.weight, candidate.kind].reshape(-1)
        for position in range(len(scores)):
            i, j = divmod(position, candidate.grid[-1])
            each = []
            for matrix in matrices:
                if candidate.kind == "block":
                    part = matrix[i * 6 : (i + 1) * 6, j * 6 : (j + 1) * 6]
                else:
                    part = matrix[position] if candidate.kind == "row" else matrix[:, position]
                each.append(plain(part))
            assert scores[position].item() == pytest.approx(sum(each) / len(each), rel=1e-9, abs=1e-15)


def test_selecting_changes_nothing():
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for score in ("abs_of_mean", "mean_of_abs", "wanda"):
        sz.select(model, make_batches(), config(score=score), tiny_loss)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "score",
    ["abs_of_mean", "mean_of_abs", "l1", "l2", "gradient_times_weight", "wanda", "magnitude", "random", "first"],
)
def test_invariant_4_selection_is_deterministic_and_the_longest_prefix_that_fits(score):
    selections = [sz.select(make_model(), make_batches(), config(score=score), tiny_loss) for _ in range(2)]
    assert selections[0].digest() == selections[1].digest()
    assert selections[0].num_parameters <= 500
    left = selections[0].metadata["num_parameters_left"]
    assert selections[0].num_parameters + left == 500
    # The next region of the ranking would not have fitted: regions own at most 36 entries here.
    assert left < 36


def test_ties_fall_by_name_then_index():
    chosen = sz.select(
        make_model(),
        None,
        sz.SelectionConfig(
            regions=(sz.RegionConfig(kind="row", modules=("*.{k,v}_proj",)),),
            score="first",
            budget=sz.BudgetConfig(parameters=20 * 7),
        ),
    )
    # Six weights compete with equal scores per index: first all rows 0, then row 1 of the first name.
    rows = {name: weight.rows.tolist() for name, weight in chosen.weights.items()}
    names = sorted(rows)
    assert rows == {name: ([0, 1] if name == names[0] else [0]) for name in names}


def test_overlaps_are_owned_and_counted_once():
    selection = sz.select(make_model(), make_batches(), config(), tiny_loss)
    mixed = [weight for weight in selection.weights.values() if len(list(weight.kinds())) > 1]
    assert mixed
    for weight in selection.weights.values():
        assert weight.num_parameters == int((owner_matrix(weight) > 0).sum())


def test_per_matrix_takes_exactly_that_many_outside_the_competition():
    regions = (
        sz.RegionConfig(kind="row", modules=("*.q_proj",), per_matrix=2, score="first"),
        sz.RegionConfig(kind="block", modules=("*.q_proj",), block_size=6, min_layer=-1),
    )
    selection = sz.select(
        make_model(),
        make_batches(),
        sz.SelectionConfig(regions=regions, budget=sz.BudgetConfig(parameters=400)),
        tiny_loss,
    )
    for layer in range(3):
        weight = selection.weights[f"layers.{layer}.self_attn.q_proj.weight"]
        assert weight.rows.tolist() == [0, 1]
        assert bool(len(weight.blocks)) == (layer == 2)
    assert selection.num_parameters <= 400


# -- what happens at the edges of a budget


def rows(**budget: object) -> sz.SelectionConfig:
    regions = (sz.RegionConfig(kind="row", modules=("layers.0.*.{q,k}_proj",)),)
    return sz.SelectionConfig(regions=regions, score="random", budget=sz.BudgetConfig(**budget))  # type: ignore[arg-type]


GROUPS = (
    sz.BudgetGroupConfig(modules=("*.q_proj",), share=0.2),
    sz.BudgetGroupConfig(modules=("*.k_proj",), share=0.8),
)


@pytest.mark.parametrize(
    ("budget", "message", "number"),
    [
        ({"fraction": 1.0}, r"the budget covers every candidate region: 3,\d\d\d parameters of the budget are left", 30),
        ({"regions": 31}, "covers every candidate region: 1 regions of the budget are left unused", 30),
        ({"bytes": 20 * 20 * 33}, "covers every candidate region: 1,200 bytes of the budget are left unused", 30),
        ({"regions": 24, "over": "matrix"}, r"equal parts .* 1 matrices \(layers.0.self_attn.k_proj.weight.*: 2 regions", 22),
        ({"regions": 20, "groups": GROUPS}, r"share of the group \*.k_proj covers every region of it: 6 regions", 14),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_spent_warns(budget, message, number):
    with pytest.warns(sz.SelectionWarning, match=message) as caught:
        selection = sz.select(make_model(), None, rows(**budget))
    assert len(caught) == 1
    assert sum(len(weight.rows) for weight in selection.weights.values()) == number
    # The warning points at the caller's line.
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("region", "budget", "where"),
    [
        ({"per_matrix": 31}, None, "at the cut of a family with per_matrix"),
        ({}, sz.BudgetConfig(regions=31), "at the cut differ"),
    ],
)
def test_a_cut_within_the_noise_of_data_warns(region, budget, where):
    """The gradient of an embedding is zero for every token that does not occur: those rows are tied."""
    settings: Any = {"kind": "row", "modules": ("embed_tokens",), **region}
    chosen = sz.SelectionConfig(regions=(sz.RegionConfig(**settings),), budget=budget)
    with pytest.warns(sz.SelectionWarning, match=f"{where}.*summation noise"):
        sz.select(make_model(), [torch.tensor([[1, 2, 3, 4]])], chosen, tiny_loss)
    # Equal weights are equal everywhere: no warning, which would be an error here.
    model = make_model()
    nn.init.ones_(model.embed_tokens.weight)
    sz.select(model, None, replace(chosen, score="magnitude"))


def test_fraction_counts_tied_parameters_once():
    tied, untied = make_model(tie=True), make_model()
    assert num_parameters(untied) - num_parameters(tied) == 32 * 20


class PackedLinear(nn.Linear):
    """A quantized linear: two 4-bit numbers to a byte, and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max()) / 7
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8).reshape(-1, 2) + 8
        self.weight = nn.Parameter((codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.cat([self.weight // 16, self.weight % 16], dim=1).to(x.dtype) - 8
        return nn.functional.linear(x, codes.reshape(self.out_features, self.in_features) * self.scale)


def quantized_model() -> TinyModel:
    model = make_model()
    for layer in range(3):
        dense = model.get_submodule(f"layers.{layer}.self_attn.k_proj")
        assert isinstance(dense, nn.Linear)
        replace_module(model, f"layers.{layer}.self_attn.k_proj", PackedLinear(dense))
    return model


def test_quantized_weights_count_with_their_entries():
    assert num_parameters(quantized_model()) == num_parameters(make_model())


def test_training_state_of_an_entry():
    model = make_model().bfloat16()
    candidates = find_candidates(config(), sz.default_module_map(model))
    # Value and gradient in bf16, master and two moments in fp32.
    assert bytes_per_parameter(model, candidates, []) == 16
    model.layers[0].self_attn.q_proj.bias.data = torch.zeros(20)
    assert bytes_per_parameter(model, candidates, ["layers.0.self_attn.q_proj.bias"]) == 20
    quantized = quantized_model().bfloat16()
    only = config(regions=(sz.RegionConfig(kind="row", modules=("*.k_proj",)),))
    assert bytes_per_parameter(quantized, find_candidates(only, sz.default_module_map(quantized)), []) == 16


def test_vectors_are_selected_whole_and_count():
    whole = sz.RegionConfig(kind="whole", modules=("*.q_proj.bias",))
    only = sz.select(make_model(), None, sz.SelectionConfig(regions=(whole,)))
    assert only.num_parameters_by_kind() == {"whole": 60}
    assert only.metadata["share_captured"] == {"total": None, "by_kind": {}}
    with_rows = replace(rows(parameters=170), regions=(*rows(parameters=1).regions, whole))
    selection = sz.select(make_model(), None, with_rows)
    assert selection.num_parameters_by_kind() == {"row": 100, "whole": 60}
    assert selection.metadata["num_parameters_left"] == 10


def test_a_matrix_above_the_layers_is_selected_whole_as_its_rows():
    model = make_model()
    model.classifier = nn.Linear(6, 3)
    whole = sz.RegionConfig(kind="whole", modules=("classifier.*", "*.q_proj.bias"))
    selection = sz.select(model, None, sz.SelectionConfig(regions=(whole,)))
    assert selection.weights["classifier.weight"].rows.tolist() == [0, 1, 2]
    assert selection.weights["classifier.bias"].whole
    assert selection.num_parameters_by_kind() == {"row": 18, "whole": 63}
    # All vectors are no head.
    vectors = sz.select(model, None, sz.SelectionConfig(regions=(replace(whole, modules=("*",)),)))
    assert "classifier.bias" in vectors.weights
    assert "classifier.weight" not in vectors.weights
    # It comes before what competes, and counts.
    with_rows = replace(rows(parameters=191), regions=(*rows(parameters=1).regions, whole))
    found = sz.select(model, None, with_rows)
    assert found.num_parameters_by_kind() == {"row": 118, "whole": 63}
    assert found.metadata["num_parameters_left"] == 10
    twice = sz.RegionConfig(kind="row", modules=("classifier",), per_matrix=1, score="first")
    with pytest.raises(InputError, match=r"trains classifier\.weight entirely \(kind whole\) and names its rows too"):
        sz.select(model, None, sz.SelectionConfig(regions=(whole, twice)))
    # Matrices of the layers are not meant by it.
    with pytest.raises(InputError, match=r"'\*\.q_proj\.weight' matches no vector, and no matrix of a head"):
        inside = sz.RegionConfig(kind="whole", modules=("*.q_proj.weight",))
        sz.select(model, None, sz.SelectionConfig(regions=(inside,)))


# -- scores that are kept


def test_one_calibration_serves_many_budgets(tmp_path):
    model, scored = make_model(), config(score="mean_of_abs")
    scores = sz.score_regions(model, make_batches(), scored, tiny_loss)
    scores.save(tmp_path / "scores.safetensors")
    loaded = sz.RegionScores.load(tmp_path / "scores.safetensors")
    with torch.device("meta"):
        without_weights = TinyModel()
    fewer = (
        replace(scored.regions[0], modules=("*.q_proj",), per_matrix=3, pick="min"),
        *scored.regions[1:2],
    )
    digests = set()
    for other in (
        scored,
        replace(scored, budget=sz.BudgetConfig(parameters=900)),
        replace(scored, budget=sz.BudgetConfig(regions=12, over="matrix")),
        replace(scored, regions=fewer),
    ):
        expected = sz.select(model, make_batches(), other, tiny_loss)
        assert sz.choose_regions(model, scores, other) == expected
        again = sz.choose_regions(without_weights, loaded, other)
        assert again == expected
        assert json.loads(json.dumps(again.metadata)) == json.loads(json.dumps(expected.metadata))
        digests.add(expected.digest())
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": (sz.RegionConfig(kind="row", modules=("*.k_proj",)),)}, "rows of .*k_proj.weight, which were not scored"),
        (
            {"regions": (sz.RegionConfig(kind="block", modules=("*.q_proj",), block_size=5),)},
            r"blocks of .*q_proj.weight with block_shape \(5, 5\), and scored was \(6, 6\)",
        ),
        ({"score": "squared"}, "with score squared, and scored was mean_of_abs"),
        ({"accumulate": "per_step"}, "selection.accumulate is 'per_step', and the scores were computed with 'sum'"),
        ({"calibration_batches": 7}, "calibration_batches is 7, and the scores were computed with 3"),
        ({"seed": 1}, "selection.seed is 1, and the scores were computed with 0"),
        ({"regions": (), "budget": None, "file": "chosen.safetensors"}, "nothing is left to select"),
    ],
)  # fmt: skip
def test_scores_of_another_calibration_are_refused(change, message):
    model, scored = make_model(), config(score="mean_of_abs")
    scores = sz.score_regions(model, make_batches(), scored, tiny_loss)
    with pytest.raises(InputError, match=message):
        sz.choose_regions(model, scores, replace(scored, **change))


def test_the_number_of_micro_batches_is_the_one_that_was_read():
    model, scored = make_model(), config(score="mean_of_abs")
    scores = sz.score_regions(model, make_batches(), scored, tiny_loss)
    selection = sz.choose_regions(model, scores, replace(scored, calibration_batches=3))
    assert selection == sz.choose_regions(model, scores, scored)
    assert selection.metadata["num_calibration_batches"] == 3


def test_how_weights_would_be_trained_matters_only_where_they_are():
    """The scores of a full calibration, as a file tells of them; they themselves are not looked at here."""
    model, scored = make_model(), config(score="mean_of_abs")
    scores = sz.score_regions(model, make_batches(), scored, tiny_loss)
    faster = replace(scored, full_calibration=sz.FullCalibrationConfig(learning_rate=1.0))
    assert sz.choose_regions(model, scores, faster) == sz.choose_regions(model, scores, scored)
    metadata = {**scores.metadata, "config": {**scores.metadata["config"], "calibration_weights": "full"}}
    trained = sz.RegionScores(scores.candidates, scores.scores, metadata)
    sz.choose_regions(model, trained, replace(scored, calibration_weights="full"))
    with pytest.raises(
        InputError, match=r"full_calibration.learning_rate is 1.0, and the scores were computed with 1e-05"
    ):
        sz.choose_regions(model, trained, replace(faster, calibration_weights="full"))


def test_scores_without_data_depend_on_nothing_else():
    """Only the seed of random matters: how calibration would be done does not."""
    model, scored = make_model(), config(score="magnitude")
    scores = sz.score_regions(model, None, scored)
    other = replace(scored, seed=1, accumulate="per_step")
    assert sz.choose_regions(model, scores, other) == sz.select(model, None, scored)
    drawn = sz.score_regions(model, None, replace(scored, score="random"))
    with pytest.raises(InputError, match="seed is 1"):
        sz.choose_regions(model, drawn, replace(other, score="random"))


def test_metadata_say_how_the_selection_came_about():
    model, asked = make_model(), config(score="mean_of_abs")
    selection = sz.select(model, make_batches(), asked, tiny_loss)
    scores = sz.score_regions(model, make_batches(), asked, tiny_loss)
    found = selection.metadata
    assert found["num_parameters_model"] == num_parameters(model)
    assert found["num_layers"] == 3
    assert found["num_calibration_batches"] == 3
    assert found["config"]["score"] == "mean_of_abs"
    assert found["cut_margin"] > 0
    captured = scores.share_captured(selection)
    assert found["share_captured"] == {"total": captured["total"], "by_kind": captured["by_kind"]}
    assert set(captured["by_kind"]) == {"block", "row", "column"}
    # More than its share of the entries: that is what choosing by score is for.
    candidates = sum(c.sizes().sum().item() for c in scores.candidates)
    assert captured["total"] > 1.3 * selection.num_parameters / candidates


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs", "l1"])
def test_what_is_chosen_captures_more_than_arbitrary_regions(score):
    model, asked = make_model(), config(score=score, budget=sz.BudgetConfig(parameters=900))
    scores = sz.score_regions(model, make_batches(), asked, tiny_loss)
    captured = scores.share_captured(sz.choose_regions(model, scores, asked))["total"]
    assert captured > 0.0
    for seed in range(10):
        arbitrary = sz.select(model, None, replace(asked, score="random", seed=seed))
        assert captured > 1.2 * scores.share_captured(arbitrary)["total"]
    # Nor does it help to spend everything on one kind, whose scores may be the largest numbers.
    for family in asked.regions:
        one_kind = sz.choose_regions(model, scores, replace(asked, regions=(family,)))
        assert captured > scores.share_captured(one_kind)["total"]


# -- scores of one's own


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module on sys.path with a score of its own, and the entry point of an installed package for it."""
    (tmp_path / "house_rules.py").write_text(
        "def mean_square(regions, *, gradient):\n"
        "    sums = regions.sums(gradient.square())\n"
        "    return sums / regions.sizes().to(sums.device)\n"
        "mean_square.size_neutral = True\n"
        "def wrong_shape(regions, *, gradient_sums):\n"
        "    return gradient_sums.sum()\n"
        "def not_a_number(regions, *, weight):\n"
        "    return regions.sums(weight) * float('nan')\n"
    )
    info = tmp_path / "house-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparse_zero.scores]\nhouse_square = house_rules:mean_square\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("house_rules", None)


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("name", ["house_rules:mean_square", "house_square"])
def test_a_score_of_ones_own_selects_as_a_built_in_one(name, tmp_path):
    model = make_model()
    own, built_in = config(score=name), config(score="squared")
    assert own.needs_data
    selection = sz.select(model, make_batches(), own, tiny_loss)
    assert selection == sz.select(model, make_batches(), built_in, tiny_loss)
    scores = sz.score_regions(model, make_batches(), own, tiny_loss)
    scores.save(tmp_path / "scores.safetensors")
    # A reader of the scores need not have the function.
    sys.modules.pop("house_rules")
    (tmp_path / "house_rules.py").unlink()
    (tmp_path / "house-1.0.dist-info" / "entry_points.txt").unlink()
    with pytest.raises(InputError, match=name):
        sz.resolve_score(name)
    loaded = sz.RegionScores.load(tmp_path / "scores.safetensors")
    assert sz.choose_regions(model, loaded, own) == selection


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "house_rules:wrong_shape",
            r"house_rules:wrong_shape of the .* has the shape \(\): return a number per region",
        ),
        ("house_rules:not_a_number", "house_rules:not_a_number of the .* is NaN for"),
    ],
)
def test_a_wrong_score_of_ones_own_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        sz.select(make_model(), make_batches(), config(score=name), tiny_loss)


# -- what is refused before data are read


def scored(score: str, kind: Kind = "row", modules: str = "*.k_proj", **options: object) -> sz.SelectionConfig:
    region: Any = {"kind": kind, "modules": (modules,), "per_matrix": 2, **options}
    return sz.SelectionConfig(regions=(sz.RegionConfig(**region),), score=score)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (scored("abs_of_meen"), "did you mean 'abs_of_mean'"),
        (scored("input_norm"), "input_norm ranks columns only.*use output_norm or wanda"),
        (scored("diagonal", "column"), "diagonal ranks blocks only.*use first"),
        (scored("diagonal", "block", block_size=4, per_matrix=4), "the diagonal of .* has only 3 blocks"),
        (scored("gradient_times_weight"), "weight in full precision of 'layers.0.self_attn.k_proj', which is quantized"),
        (scored("magnitude"), "weight in full precision of 'layers.0.self_attn.k_proj', which is quantized"),
        (scored("wanda", modules="embed_tokens"), "activations of 'embed_tokens'"),
        (replace(scored("first"), calibration_weights="full"), r"calibration_weights is 'full', but no score .* \(first\)"),
        (replace(scored("abs_of_mean"), calibration_weights="full"), r"calibration_weights is 'full', and .* is quantized"),
        (
            replace(scored("first"), regions=(sz.RegionConfig(kind="whole", modules=("*.k_proj.bias",)),)),
            r"'\*.k_proj.bias' matches no vector",
        ),
        (
            replace(rows(regions=4, groups=GROUPS), regions=(sz.RegionConfig(kind="row", modules=("*.q_proj",)),)),
            r"group.* \*.k_proj has a share of 0.8 and no matrix whose regions compete",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_on_a_model_without_weights(asked, message):
    def nothing() -> Iterator[Tensor]:
        raise AssertionError("data were read")
        yield

    for check in (
        lambda: check_selection(quantized_model().to("meta"), asked),
        lambda: sz.select(quantized_model(), nothing(), asked, tiny_loss),
    ):
        with pytest.raises(InputError, match=message):
            check()


def test_the_checks_pass_what_works_and_return_the_candidates():
    found = check_selection(quantized_model().to("meta"), scored("abs_of_mean"))
    assert [c.weight for c in found] == [f"layers.{layer}.self_attn.k_proj.weight" for layer in range(3)]


def test_a_quantized_weight_is_scored_without_its_gradient():
    found = sz.score_regions(quantized_model(), make_batches(), scored("abs_of_mean"), tiny_loss)
    assert all(bool((scores > 0).any()) for scores in found.scores.values())


def test_a_module_that_no_gradient_reaches_is_named():
    model = make_model()
    model.unused = nn.Linear(20, 20)
    asked = config(regions=(sz.RegionConfig(kind="row", modules=("*.q_proj", "unused")),))
    for score in ("abs_of_mean", "squared"):
        with pytest.raises(
            InputError, match=r"no gradient reached 'unused'.*leave it out of selection.regions.modules"
        ):
            sz.select(model, make_batches(), replace(asked, score=score), tiny_loss)


@pytest.mark.parametrize(
    ("score", "needs"),
    [("abs_of_mean", True), ("wanda", True), ("input_norm", True), ("magnitude", False), ("random", False),
     ("first", False), ("diagonal", False)],
)  # fmt: skip
def test_configs_tell_whether_data_are_needed(score, needs):
    assert config(score=score).needs_data == needs
    assert not sz.SelectionConfig(file="chosen.safetensors", score=score).needs_data


def test_a_score_that_does_not_exist_needs_no_guess():
    with pytest.raises(InputError, match="did you mean 'wanda'"):
        _ = config(score="wand").needs_data


# -- patterns, files, bad input


def test_braces_expand_to_every_alternative():
    assert expand_braces("a.{x,y}.{1,2}") == ["a.x.1", "a.x.2", "a.y.1", "a.y.2"]


def test_selection_file_round_trip_and_digest(tmp_path):
    selection = mixed_selection(make_model())
    path = tmp_path / "selection.safetensors"
    selection.save(path)
    loaded = sz.Selection.load(path)
    assert loaded == selection
    assert loaded.num_parameters == selection.num_parameters
    assert loaded.metadata == selection.metadata
    fewer = sz.Selection(dict(list(selection.weights.items())[1:]))
    assert fewer.digest() != selection.digest()


def test_a_changed_selection_file_is_refused(tmp_path):
    path = tmp_path / "selection.safetensors"
    mixed_selection(make_model()).save(path)
    tensors, metadata = read_safetensors(path, "sparse_zero.selection")
    key = next(key for key in tensors if key.endswith("/rows"))
    write_safetensors(path, {**tensors, key: tensors[key].flip(0) * 0 + torch.tensor([3, 4])}, metadata)
    with pytest.raises(InputError, match="digest"):
        sz.Selection.load(path)
    header = json.loads(metadata["header"])
    header["version"] = 99
    write_safetensors(path, tensors, {**metadata, "header": json.dumps(header)})
    with pytest.raises(InputError, match="version 99"):
        sz.Selection.load(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=str(path)):
        sz.Selection.load(path)


def first_weight(header: dict[str, Any]) -> dict[str, Any]:
    return next(iter(header["weights"].values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("version"),
        lambda header: header.pop("digest"),
        lambda header: header.pop("weights"),
        lambda header: header.pop("metadata"),
        lambda header: header.update(version="new"),
        lambda header: header.update(weights=["q_proj"]),
        lambda header: header.update(metadata=3),
        lambda header: first_weight(header).pop("shape"),
        lambda header: first_weight(header).update(shape=[3]),
        lambda header: first_weight(header).update(shape=[1, 1]),
        lambda header: first_weight(header).update(block_shape="large"),
    ],
)
def test_a_selection_file_with_a_malformed_header_is_refused(change, tmp_path):
    path = tmp_path / "selection.safetensors"
    mixed_selection(make_model()).save(path)
    tensors, metadata = read_safetensors(path, "sparse_zero.selection")
    header = json.loads(metadata["header"])
    change(header)
    for broken in ({"header": json.dumps(header)}, {"header": json.dumps([header])}, {"header": "{"}, {}):
        write_safetensors(path, tensors, {"format": metadata["format"], **broken})
        with pytest.raises(InputError, match=r"header that cannot be read .*: select again") as caught:
            sz.Selection.load(path)
        assert str(path) in str(caught.value)


def test_indices_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "selection.safetensors"
    mixed_selection(make_model()).save(path)
    tensors, metadata = read_safetensors(path, "sparse_zero.selection")
    key = next(key for key in tensors if key.endswith("/blocks"))
    write_safetensors(path, {**tensors, key: torch.ones(3, dtype=torch.int32)}, metadata)
    with pytest.raises(InputError, match="header that cannot be read"):
        sz.Selection.load(path)


def region(**options: object) -> sz.SelectionConfig:
    budget = options.pop("budget", sz.BudgetConfig(parameters=100))
    settings = {"kind": "row", "modules": ("*.q_proj",), **options}
    return sz.SelectionConfig(regions=(sz.RegionConfig(**settings),), score="first", budget=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: region(modules=("*.q_porj",)), "matches no matrix.*q_proj"),
        (lambda: region(modules=("*.{q,z}_proj",)), r"z_proj.*matches no matrix"),
        (lambda: region(min_layer=3), "min_layer is 3.*layers 0 to 2"),
        (lambda: region(min_layer=2, max_layer=1), "no layer between"),
        (lambda: region(kind="block", block_size=21), r"block_size is 21, larger than .*20x20"),
        (lambda: region(per_matrix=21), "per_matrix is 21.*only 20 row"),
        (lambda: region(budget=sz.BudgetConfig(parameters=10**9)), "parameters is 1,000,000,000, more than the model"),
        (lambda: region(budget=sz.BudgetConfig(parameters=19)), "less than one region"),
        (lambda: region(per_matrix=4, budget=sz.BudgetConfig(parameters=100)), "per_matrix alone are 240"),
        (lambda: region(budget=None), "budget is missing"),
        (lambda: region(kind="diagonal"), "kind is 'diagonal'"),
        (lambda: region(block_size=4), "only blocks have a size"),
        (lambda: region(kind="block", block_size=16.0), r"regions\.block_size is 16\.0: it must be a whole number"),
        (lambda: region(kind="block", blocks_per_side=2.0), r"blocks_per_side is 2\.0: it must be a whole number"),
        (lambda: region(per_matrix=4.0), r"per_matrix is 4\.0: it must be a whole number"),
        (lambda: region(min_layer=0.0), r"min_layer is 0\.0: it must be a whole number"),
        (lambda: region(max_layer="1"), r"max_layer is '1': it must be a whole number"),
        (lambda: region(modules="q_proj"), r"regions\.modules is 'q_proj': give a tuple of patterns"),
        (lambda: region(modules=()), r"regions\.modules is empty"),
        (lambda: region(modules=(7,)), r"regions\.modules has 7 in it: a pattern is a text"),
        (lambda: config(calibration_batches=2.0), r"calibration_batches is 2\.0: it must be a whole number"),
        (lambda: config(seed=0.5), r"selection\.seed is 0\.5: it must be a whole number"),
        (lambda: region(budget=sz.BudgetConfig(fraction=1.5)), r"fraction is 1.5.*\(0, 1\]"),
    ],
)
def test_bad_selections_are_named(make_config, message):
    with pytest.raises(InputError, match=message):
        sz.select(make_model(tie=True), None, make_config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_weights": "ful"}, "calibration_weights is 'ful': choose one of frozen, full"),
        ({"accumulate": "steps"}, "accumulate is 'steps': choose one of sum, per_step"),
        ({"accumulator_dtype": "float16"}, "accumulator_dtype is 'float16'"),
        ({"calibration_batches": 0}, "calibration_batches is 0: it must be at least 1"),
    ],
)
def test_settings_are_checked_beside_a_saved_selection_too(options, message):
    with pytest.raises(InputError, match=message):
        sz.SelectionConfig(file="chosen.safetensors", **options)


def test_settings_without_effect_are_refused():
    kept = sz.FullCalibrationConfig(keep_weights_in="new")
    with pytest.raises(InputError, match=r"keep_weights_in is new, and selection.calibration_weights is 'frozen'"):
        config(full_calibration=kept)
    with pytest.raises(InputError, match=r"selection.reselect.until is 4 and every 5: no check would ever come"):
        sz.ReselectConfig(every=5, until=4)
    assert sz.ReselectConfig(every=5, until=5).is_due(5)
    # The checks of a run that keeps its weights train none.
    run = config(calibration_weights="full", full_calibration=kept, reselect=sz.ReselectConfig(every=5))
    assert sz.config_at(run, 5).calibration_weights == "frozen"


@pytest.mark.parametrize("pick", ["min", "mixed"])
def test_the_share_captured_is_no_measure_of_low_scores(pick):
    rows = sz.RegionConfig(kind="row", modules=("*.q_proj",), pick=pick)
    with pytest.raises(
        InputError, match=rf"captured_below is 0.5, and selection.regions.pick is '{pick}' for \*.q_proj"
    ):
        config(regions=(rows,), reselect=sz.ReselectConfig(every=5, captured_below=0.5))
    assert config(regions=(rows,), reselect=sz.ReselectConfig(every=5)).reselect is not None


def test_a_saved_selection_leaves_nothing_to_select():
    with pytest.raises(InputError, match="keep one of them"):
        sz.SelectionConfig(file="chosen.safetensors", budget=sz.BudgetConfig(parameters=10))
    with pytest.raises(InputError, match="nothing is left to select"):
        sz.select(make_model(), None, sz.SelectionConfig(file="chosen.safetensors"))


def test_gradient_scores_without_batches_are_refused():
    with pytest.raises(InputError, match="pass calibration batches"):
        sz.select(make_model(), None, config(), tiny_loss)
    with pytest.raises(InputError, match="no batches"):
        sz.select(make_model(), [], config(), tiny_loss)


def test_a_non_finite_calibration_is_refused():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="non-finite"):
        sz.select(model, make_batches(), config(), tiny_loss)


def test_default_module_map_reads_layers_roles_and_shared_inputs():
    module_map = sz.default_module_map(make_model())
    assert module_map.num_layers == 3
    assert module_map.layer_of["layers.2.self_attn.v_proj"] == 2
    assert module_map.role_of["lm_head"] == "head"
    assert module_map.role_of["layers.0.self_attn.q_proj"] == "attention"
    group = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")
    assert group in module_map.shared_inputs
    assert isinstance(make_model().get_submodule("lm_head"), nn.Linear)
