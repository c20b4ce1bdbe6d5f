"""Do min_depth and depth_tradeoff bound a selection from below as they say, at the cost that the model really has?"""

import dataclasses
from typing import Any

import pytest
import torch

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.flops import flop_shape
from sparse_zero.module_map import default_module_map
from sparse_zero.selection.depth import depth_of_weights
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.select import SelectionWarning, choose_regions, score_regions
from tests.flop_counting import flop_counter
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES
from tests.sparse_zero.helpers import TinyModel, tiny_loss

LAYERS = 6
REGIONS = (
    sz.RegionConfig(kind="block", modules=("*.{q,k,v}_proj",), block_size=6),
    sz.RegionConfig(kind="row", modules=("*.o_proj",)),
    sz.RegionConfig(kind="column", modules=("*.o_proj",)),
)
ENDS = (
    sz.RegionConfig(kind="row", modules=("embed_tokens",)),
    sz.RegionConfig(kind="column", modules=("lm_head",)),
)


def make_model(tie: bool = False) -> TinyModel:
    torch.manual_seed(5)
    return TinyModel(layers=LAYERS, tie=tie)


def make_config(**changes: Any) -> sz.SelectionConfig:
    settings = {"regions": REGIONS, "score": "l2", "budget": sz.BudgetConfig(parameters=1500), **changes}
    return sz.SelectionConfig(**settings)


def make_scores(model: TinyModel, config: sz.SelectionConfig) -> RegionScores:
    batches = [torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    return score_regions(model, batches, dataclasses.replace(config, depth_tradeoff=0.0), tiny_loss)


def layers_of(selection: sz.Selection) -> set[int]:
    return {int(name.split(".")[1]) for name in selection.weights if name.startswith("layers.")}


@pytest.mark.parametrize(
    ("min_depth", "lowest"), [(0.0, 0), (0.01, 1), (1 / 6, 1), (0.17, 2), (0.5, 3), (0.51, 4), (0.99, 6)]
)
def test_no_region_lies_below_the_share_of_the_depth(min_depth, lowest):
    config = make_config(regions=REGIONS + ENDS[1:], budget=sz.BudgetConfig(fraction=1.0), min_depth=min_depth)
    if lowest == LAYERS:
        with pytest.raises(InputError, match=r"min_depth is 0.99, below which lies .*\*\.q_proj.*layers\.0\.self_attn"):
            make_scores(make_model(), config)
        return
    with pytest.warns(UserWarning, match="covers every candidate"):
        selection = choose_regions(make_model(), make_scores(make_model(), config), config)
    assert layers_of(selection) == set(range(lowest, LAYERS))
    assert "lm_head.weight" in selection.weights, "the head lies above all layers"
    assert selection.metadata["depth"]["lowest_layer"] == lowest


def test_embeddings_and_heads_tied_to_them_lie_below_all_layers():
    for model, name in ((make_model(), "embed_tokens"), (make_model(tie=True), "lm_head")):
        regions = (*REGIONS, sz.RegionConfig(kind="row", modules=(name,)))
        assert sz.select(model, None, make_config(regions=regions, score="first")).metadata["depth"] == {
            "lowest_layer": -1,
            "step_operations": 1.0,
        }
        with pytest.raises(InputError, match=rf"min_depth is 0.2, .*{name}.*lower it, or take the pattern out"):
            sz.select(model, None, make_config(regions=regions, score="first", min_depth=0.2))


def test_vectors_and_fixed_numbers_are_bounded_too():
    regions = (
        sz.RegionConfig(kind="whole", modules=("*.q_proj.bias",)),
        sz.RegionConfig(kind="row", modules=("*.v_proj",), per_matrix=1, min_layer=4),
        sz.RegionConfig(kind="column", modules=("*.v_proj",), per_matrix=1, max_layer=4),
    )
    selection = sz.select(make_model(), None, make_config(regions=regions, score="first", min_depth=0.5, budget=None))
    chosen = {
        kind: [n for n, w in selection.weights.items() if kind in w.kinds()] for kind in ("whole", "row", "column")
    }
    assert {kind: sorted(int(n.split(".")[1]) for n in names) for kind, names in chosen.items()} == {
        "whole": [3, 4, 5],
        "row": [4, 5],
        "column": [3, 4],
    }


def restricted(config: sz.SelectionConfig, lowest: int) -> sz.SelectionConfig:
    """The config with every family bounded from below by itself."""
    regions = tuple(dataclasses.replace(region, min_layer=lowest) for region in config.regions)
    return dataclasses.replace(config, regions=regions, depth_tradeoff=0.0)


@pytest.mark.filterwarnings("ignore::sparse_zero.selection.select.SelectionWarning")
@pytest.mark.parametrize("tradeoff", [0.3, 1.0, 2.0, 6.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": sz.BudgetConfig(parameters=2500, over="matrix")},
        {"budget": sz.BudgetConfig(regions=40)},
        {
            "budget": sz.BudgetConfig(
                fraction=0.15,
                groups=(
                    sz.BudgetGroupConfig(modules=("*.{q,k,v}_proj",), share=0.6),
                    sz.BudgetGroupConfig(modules=("*.o_proj",), share=0.4),
                ),
            )
        },
        {"regions": tuple(dataclasses.replace(each, per_matrix=2) for each in REGIONS), "budget": None},
    ],
    ids=["one ranking", "per matrix", "regions", "groups", "fixed"],
)
def test_the_tradeoff_finds_what_trying_every_lowest_layer_finds(changes, tradeoff):
    model, config = make_model(), make_config(**changes, depth_tradeoff=tradeoff)
    scores = make_scores(model, config)
    # Scores that fall towards the bottom, so that what is best depends on the tradeoff.
    for (weight, _), found in scores.scores.items():
        found *= 1.6 ** int(weight.split(".")[1])
    best: tuple[float, int, sz.Selection] | None = None
    for lowest in range(LAYERS):
        tried = choose_regions(model, scores, restricted(config, lowest))
        captured = scores.share_captured(tried)["total"]
        reached = min(layers_of(tried))
        # Every layer has 20*20 + 2*(10*20) entries in q, k and v, 20*10 in o, and twice 10 for its attention, whose
        # backward is twice its forward; the head has 32*20. In the lowest layer nothing is below q, k and v.
        qkv, o, attention, head = 800, 200, 20, 640
        forward = LAYERS * (qkv + o + attention) + head
        in_lowest = [name for name in tried.weights if f"layers.{reached}." in name]
        within = o + 2 * attention if any("o_proj" not in name for name in in_lowest) else 0
        backward = (LAYERS - 1 - reached) * (qkv + o + 2 * attention) + within + head
        cost = (forward + backward) / (2 * forward + LAYERS * attention)
        assert tried.metadata["depth"]["step_operations"] == pytest.approx(cost)
        if best is None or captured / cost**tradeoff > best[0]:
            best = captured / cost**tradeoff, lowest, tried
    assert best is not None
    selection = choose_regions(model, scores, config)
    assert selection == best[2]
    assert selection.metadata["depth"]["lowest_layer"] == min(layers_of(selection))


@pytest.mark.filterwarnings("ignore::sparse_zero.selection.select.SelectionWarning")
def test_a_larger_tradeoff_never_reaches_deeper_and_none_changes_nothing(tmp_path):
    model, config = make_model(), make_config(regions=REGIONS + ENDS)
    scores = make_scores(model, config)
    scores.save(tmp_path / "scores.safetensors")
    loaded = RegionScores.load(tmp_path / "scores.safetensors")
    lowest = []
    for tradeoff in (0.0, 1e-9, 0.5, 1.0, 2.0, 4.0, 8.0):
        now = dataclasses.replace(config, depth_tradeoff=tradeoff)
        selection = choose_regions(make_model(), loaded, now)
        assert selection == choose_regions(model, scores, now), "saved scores choose alike"
        lowest.append(selection.metadata["depth"]["lowest_layer"])
        assert sz.config_at(dataclasses.replace(now, reselect=sz.ReselectConfig(every=2)), 4).depth_tradeoff == tradeoff
    assert lowest == sorted(lowest)
    assert lowest[0] == lowest[1]
    assert lowest[-1] > 0


def test_what_the_depth_leaves_out_whatever_its_score_is_said():
    """Also where it lies below every region that has a score, and where the tradeoff hardly counts."""
    upper = tuple(dataclasses.replace(region, min_layer=2) for region in REGIONS)
    vectors = sz.RegionConfig(kind="whole", modules=("*.q_proj.bias",))
    fixed = sz.RegionConfig(kind="row", modules=("*.v_proj",), per_matrix=1, max_layer=1)
    config = make_config(regions=(*upper, vectors, fixed), depth_tradeoff=1e-9, score="first")
    with pytest.warns(
        SelectionWarning, match=r"makes layer 2 the lowest: 4 vectors, or matrices .*\(layers\.0\."
    ) as said:
        selection = sz.select(make_model(), None, config)
    assert len(said) == 1
    assert layers_of(selection) == {2, 3, 4, 5}
    assert "layers.2.self_attn.q_proj.bias" in selection.weights
    # Without a tradeoff nothing is.
    assert layers_of(sz.select(make_model(), None, dataclasses.replace(config, depth_tradeoff=0.0))) == set(range(6))


@pytest.mark.filterwarnings("ignore::sparse_zero.selection.select.SelectionWarning")
def test_a_bound_that_leaves_a_group_empty_is_passed_over():
    regions = (*REGIONS[:1], dataclasses.replace(REGIONS[1], max_layer=1))
    groups = (
        sz.BudgetGroupConfig(modules=("*.{q,k,v}_proj",), share=0.5),
        sz.BudgetGroupConfig(modules=("*.o_proj",), share=0.5),
    )
    config = make_config(regions=regions, budget=sz.BudgetConfig(parameters=800, groups=groups), depth_tradeoff=50.0)
    model = make_model()
    selection = choose_regions(model, make_scores(model, config), config)
    assert min(layers_of(selection)) == 1
    tight = dataclasses.replace(config, budget=sz.BudgetConfig(parameters=30, groups=groups))
    with pytest.raises(InputError, match="less than one region"):
        choose_regions(model, make_scores(model, config), tight)


@pytest.mark.parametrize("lowest", range(LAYERS + 1))
def test_the_modelled_operations_are_those_that_are_counted(lowest):
    model = make_model()
    names = [f"layers.{lowest}.self_attn.q_proj.weight"] if lowest < LAYERS else ["lm_head.weight"]
    height, width = model.get_parameter(names[0]).shape
    sz.sparsify(model, sz.Selection({names[0]: sz.WeightSelection(shape=(height, width), rows=[0])}))
    whole = make_model().requires_grad_(False)
    whole.embed_tokens.weight.requires_grad_(True)
    counts = []
    for each in (model, whole):
        with flop_counter() as counter:
            tiny_loss(each, torch.arange(18).reshape(2, 9)).backward()
        counts.append(counter.get_total_flops())
    module_map = default_module_map(make_model())
    found = depth_of_weights(names, flop_shape(make_model(), module_map), module_map)
    assert found.lowest_layer == lowest
    # The model has no attention, of which two percent are modelled; and a row of values is trained.
    assert counts[0] / counts[1] == pytest.approx(found.step_operations, rel=0.02)


def test_a_norm_in_the_lowest_layer_and_an_embedding_count():
    model = tiny_llama(layers=4)
    shape, module_map = flop_shape(model), default_module_map(model)

    def depth(*weights: str) -> tuple[int, float]:
        found = depth_of_weights(weights, shape, module_map)
        return found.lowest_layer, found.step_operations

    queries, norm = "model.layers.2.self_attn.q_proj.weight", "model.layers.2.input_layernorm.weight"
    assert depth(queries) == (2, depth(queries, "model.layers.3.mlp.up_proj.weight")[1])
    assert depth(norm)[0] == 2
    assert depth(queries)[1] < depth(norm)[1] < depth("model.layers.1.mlp.down_proj.weight", norm)[1] + 1e-3
    assert depth("model.embed_tokens.weight", queries) == (-1, 1.0)
    assert depth("model.norm.weight")[0] == depth("lm_head.weight")[0] == 4
    assert depth("lm_head.weight")[1] < depth("model.norm.weight")[1] < depth(queries)[1]


def test_a_bias_reaches_as_far_as_its_matrix():
    model = FAMILIES["llama"].make(attention_bias=True, mlp_bias=True)
    shape, module_map = flop_shape(model), default_module_map(model)
    depths = []
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        model.requires_grad_(False)
        bias = f"model.layers.1.{name}.bias"
        model.get_parameter(bias).requires_grad_(True)
        (place,) = (each.place for each in shape.products if each.name == f"model.layers.1.{name}.weight")
        assert flop_shape(model, module_map).lowest_trained == place
        depths.append(depth_of_weights([bias], shape, module_map))
        assert depths[-1] == depth_of_weights([f"model.layers.1.{name}.weight"], shape, module_map)
    assert [each.lowest_layer for each in depths] == [1, 1, 1]
    assert depths[0].step_operations > depths[1].step_operations > depths[2].step_operations


def test_a_norm_of_the_embeddings_reaches_through_all_layers():
    model = FAMILIES["bloom"].make()
    shape, module_map = flop_shape(model), default_module_map(model)
    model.requires_grad_(False)
    model.transformer.word_embeddings_layernorm.bias.requires_grad_(True)
    assert flop_shape(model, module_map).lowest_trained == -1
    found = depth_of_weights(["transformer.word_embeddings_layernorm.bias"], shape, module_map)
    assert (found.lowest_layer, found.step_operations) == (-1, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_depth": 1.0}, r"min_depth is 1.0: it must lie in \[0, 1\)"),
        ({"min_depth": -0.1}, r"min_depth is -0.1: it must lie in"),
        ({"depth_tradeoff": -1.0}, "depth_tradeoff is -1.0: it must be a number from 0 on"),
        ({"depth_tradeoff": float("nan")}, "depth_tradeoff is nan"),
        (
            {
                "depth_tradeoff": 1.0,
                "regions": (*REGIONS[:1], dataclasses.replace(REGIONS[1], score="l1", per_matrix=1)),
            },
            r"depth_tradeoff is 1.0, and selection.regions have several scores \(l1, l2\)",
        ),
        (
            {"depth_tradeoff": 1.0, "regions": (dataclasses.replace(REGIONS[1], pick="min"),)},
            "depth_tradeoff is 1.0, and selection.regions.pick is 'min'",
        ),
        (
            {"depth_tradeoff": 1.0, "regions": (sz.RegionConfig(kind="whole", modules=("*.bias",)),)},
            "depth_tradeoff is 1.0, and selection.regions have no scores",
        ),
        (
            {"file": "a.safetensors", "regions": (), "budget": None, "min_depth": 0.5},
            "selection.min_depth is 0.5, which has",
        ),
    ],
)
def test_settings_that_cannot_hold_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_config(**changes)
