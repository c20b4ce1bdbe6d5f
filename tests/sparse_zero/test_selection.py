"""Invariant 4 and the first form of selection: candidates, exact scores, budget, ties, files."""

import json

import pytest
import torch
from torch import nn

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.selection.calibration import gradient_scores
from sparse_zero.selection.candidates import expand_braces, find_candidates
from sparse_zero.selection.select import max_parameters, num_parameters
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


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_scores_equal_those_of_the_dense_gradient(score, checkpointing):
    model, batches = make_model().double(), make_batches()
    model.checkpointing = checkpointing
    candidates = find_candidates(config(score=score), sz.default_module_map(model))
    scores, num_batches = gradient_scores(model, batches, candidates, tiny_loss)
    assert num_batches == len(batches)

    dense: dict[str, list[torch.Tensor]] = {c.weight: [] for c in candidates}
    parameters = dict(model.named_parameters())
    for batch in batches:
        model.zero_grad()
        tiny_loss(model, batch).backward()
        for name, gradients in dense.items():
            gradients.append(parameters[name].grad.clone())
    for candidate in candidates:
        stacked = torch.stack(dense[candidate.weight])
        map_of = stacked.mean(0) if score == "abs_of_mean" else stacked.abs().mean(0)
        found = scores[candidate.weight, candidate.kind]
        for position in range(found.numel()):
            if candidate.kind == "block":
                i, j = divmod(position, candidate.grid[1])
                part = map_of[i * 6 : (i + 1) * 6, j * 6 : (j + 1) * 6]
            else:
                part = map_of[position] if candidate.kind == "row" else map_of[:, position]
            assert found.reshape(-1)[position].item() == pytest.approx(abs(part.mean().item()), rel=1e-9, abs=1e-15)


def test_scores_match_fp64_sums_of_an_fp32_model_closely():
    model = make_model()
    candidates = find_candidates(config(), sz.default_module_map(model))
    single, _ = gradient_scores(model, make_batches(), candidates, tiny_loss)
    double, _ = gradient_scores(model.double(), make_batches(), candidates, tiny_loss)
    for key, scores in single.items():
        torch.testing.assert_close(scores, double[key], rtol=1e-3, atol=1e-7)


def test_calibration_changes_nothing_and_holds_one_gradient_at_a_time():
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    alive: list[int] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
            )
    sz.select(model, make_batches(), config(score="mean_of_abs"), tiny_loss)
    assert alive
    assert max(alive) == 1
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_linear_scores_form_no_weight_gradient():
    model = make_model()
    shapes: set[tuple[int, ...]] = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "mm" in str(function):
                shapes.add(tuple(result.shape))
            return result

    with Record():
        sz.select(model, make_batches(), config(), tiny_loss)
    assert (20, 20) not in shapes
    assert (10, 20) not in shapes


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs", "random", "first"])
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


def test_a_budget_that_covers_everything_warns():
    with pytest.warns(sz.SelectionWarning, match="covers every candidate"):
        selection = sz.select(
            make_model(),
            None,
            sz.SelectionConfig(
                regions=(sz.RegionConfig(kind="row", modules=("*.k_proj",)),),
                score="random",
                budget=sz.BudgetConfig(fraction=1.0),
            ),
        )
    assert selection.num_parameters == 3 * 10 * 20


def test_fraction_counts_tied_parameters_once():
    tied, untied = make_model(tie=True), make_model()
    assert num_parameters(untied) - num_parameters(tied) == 32 * 20
    assert max_parameters(sz.BudgetConfig(fraction=0.1), 1005) == 100


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
    from sparse_zero.files import read_safetensors, write_safetensors

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
        (lambda: region(budget=sz.BudgetConfig(fraction=1.5)), r"fraction is 1.5.*\(0, 1\]"),
    ],
)
def test_bad_selections_are_named(make_config, message):
    with pytest.raises(InputError, match=message):
        sz.select(make_model(tie=True), None, make_config())


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
