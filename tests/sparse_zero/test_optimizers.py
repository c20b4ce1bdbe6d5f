"""Optimizers by configuration: groups, refusals, and what decay means, without a process group."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import sparse_zero as sz
from sparse_zero.checkpoint.checkpoint import take_snapshot
from sparse_zero.integrations.loop_state import PlainEngine
from sparse_zero.zero.optimizers import (
    RATE_FACTOR,
    KindOptimizerConfig,
    ModuleOptimizerConfig,
    OptimizerConfig,
    PerKindConfig,
    block_shapes,
    build_optimizer,
    check_kinds,
    check_modules,
    configured_groups,
)
from sparse_zero.zero.shaped_optimizers import Adafactor, BlockMuon, orthogonalize
from tests.sparse_zero.helpers import TinyModel, mixed_selection, tiny_loss


def sparse_model(placement="inplace"):
    torch.manual_seed(3)
    model = TinyModel()
    sz.sparsify(model, mixed_selection(model), placement)
    return model


def config_with(**per_kind):
    return OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, per_kind=PerKindConfig(**per_kind))


def test_groups_get_the_rate_and_decay_of_their_kind():
    config = config_with(
        row=KindOptimizerConfig(learning_rate_factor=0.5),
        column=KindOptimizerConfig(learning_rate=4e-3, weight_decay=0.0),
    )
    groups = {group["kind"]: group for group in configured_groups(sz.parameter_groups(sparse_model()), config)}
    found = {kind: (group["lr"], group[RATE_FACTOR], group["weight_decay"]) for kind, group in groups.items()}
    assert found == {
        "block": (1e-3, 1.0, 0.1),
        "row": (5e-4, 0.5, 0.1),
        "column": (pytest.approx(4e-3), pytest.approx(4.0), 0.0),
    }


def of_modules(*patterns, **settings):
    return ModuleOptimizerConfig(modules=patterns, **settings)


def test_modules_have_groups_of_their_own_with_what_they_set_and_else_what_their_kind_has():
    config = dataclasses.replace(
        config_with(row=KindOptimizerConfig(learning_rate_factor=0.5, weight_decay=0.2)),
        per_module=(
            of_modules("*.q_proj", "layers.9", learning_rate=2e-3),
            of_modules("layers.1", weight_decay=0.0),
            of_modules("lm_head", weight_decay=0.5),
        ),
    )
    model = sparse_model()
    groups = configured_groups(sz.parameter_groups(model), config, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for values in group["params"]:
            found[names[id(values)]] = group["lr"], group["weight_decay"]
    assert found.keys() == sz.trainable_parameters(model).keys()
    for name, (rate, decay) in found.items():
        is_row, is_query, is_first = ".values_row" in name, ".q_proj." in name, name.startswith("layers.1.")
        assert rate == pytest.approx(2e-3 if is_query else 5e-4 if is_row else 1e-3), name
        # The first entry that matches is followed alone.
        assert decay == (0.0 if is_first and not is_query else 0.2 if is_row else 0.1), name
    # A head that trains nothing has no group.
    assert len(groups) == len({(group["kind"], group.get("per_module")) for group in groups})
    assert {group.get("per_module") for group in groups} == {None, 0, 1}
    plain = configured_groups(sz.parameter_groups(model), config_with())
    assert [group["kind"] for group in plain] == ["block", "row", "column"]


@pytest.mark.parametrize("pattern", ["layers.1", "*.v_proj", "*.v_proj.weight", "{lm_head,embed_tokens}", "*"])
def test_patterns_of_modules_name_parameters_or_what_is_around_them(pattern):
    names = [name for name, _ in TinyModel().named_parameters()]
    check_modules(OptimizerConfig(per_module=(of_modules(pattern, weight_decay=0.0),)), names)


def test_a_pattern_that_matches_nothing_is_refused_with_its_place():
    names = [name for name, _ in TinyModel().named_parameters()]
    entries = (of_modules("*.q_proj", weight_decay=0.0), of_modules("*.v_porj", weight_decay=0.0))
    with pytest.raises(sz.InputError, match=r"per_module.1.modules pattern '\*.v_porj' .*did you mean '\*.v_proj'"):
        check_modules(OptimizerConfig(per_module=entries), names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_modules("*.q_proj"), r"per_module of \*.q_proj sets nothing: give it a learning_rate"),
        (lambda: of_modules(learning_rate=1.0), "per_module modules is empty"),
        (lambda: of_modules("q", learning_rate=-1.0), "per_module learning_rate is -1.0"),
        (
            lambda: build_optimizer(
                sz.parameter_groups(sparse_model()),
                OptimizerConfig(per_module=(of_modules("*.q_proj", learning_rate=1.0),)),
            ),
            "per_module needs the model",
        ),
        (
            lambda: OptimizerConfig(name="sgd"),  # type: ignore[arg-type]
            "optimizer name is 'sgd': choose one of adamw",
        ),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate is 0.0: it must be a positive number"),
        (lambda: OptimizerConfig(eps=math.nan), "eps is nan"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"betas are \(0.9, 1.0\): give two numbers in \[0, 1\)"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: KindOptimizerConfig(learning_rate=-1.0), "per_kind learning_rate is -1.0"),
        (lambda: KindOptimizerConfig(weight_decay=math.inf), "per_kind weight_decay is inf"),
        (lambda: KindOptimizerConfig(learning_rate=1.0, learning_rate_factor=2.0), "set at most one of them"),
        (lambda: check_kinds(config_with(whole=KindOptimizerConfig()), ["row", "row"]), "trains row only: remove it"),
        (lambda: check_kinds(OptimizerConfig(name="muon"), ["row", "column"]), "muon is for matrices"),
        (
            lambda: build_optimizer(sz.parameter_groups(sparse_model()), OptimizerConfig(name="muon")),
            "muon needs the model",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(sz.InputError, match=message):
        make()


def test_8_bits_need_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.delitem(__import__("sys").modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(sz.InputError, match=r"sparse-zero\[quant\]"):
        build_optimizer(sz.parameter_groups(sparse_model()), OptimizerConfig(name="adamw_8bit"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_decay_pulls_towards_zero_inplace_and_towards_the_base_under_delta(name, placement):
    model = sparse_model(placement)
    base = {key: parameter.detach().clone() for key, parameter in model.named_parameters() if "values" not in key}
    values = sz.trainable_parameters(model)
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.5)
    optimizer = build_optimizer(sz.parameter_groups(model), config, model=model)
    with torch.no_grad():
        for each in values.values():
            each.add_(0.25)
    sz.write_back(model)
    before = {key: each.detach().clone() for key, each in values.items()}
    for each in values.values():
        # No gradient: what is left of a step is the decay.
        each.grad = torch.zeros_like(each)
    optimizer.step()
    sz.write_back(model)
    for key, each in values.items():
        torch.testing.assert_close(each.detach(), before[key] * (1 - 1e-2 * 0.5), rtol=1e-6, atol=1e-9)
    # What acts, relative to what it decays to: zero inplace, the base under delta.
    for name_of_weight, carrier in ((n, m) for n, m in model.named_modules() if isinstance(m, sz.SparseLinear)):
        weight = f"{name_of_weight}.weight"
        for kind, each in carrier.values().items():
            acting = carrier.entries(kind) + (each.detach() if placement == "delta" else 0.0)
            start = base[weight].view(-1)[carrier.positions(kind)]
            goal = start if placement == "delta" else torch.zeros_like(start)
            was = start + 0.25
            torch.testing.assert_close(acting - goal, (was - goal) * (1 - 5e-3), rtol=1e-5, atol=1e-7)


def test_orthogonalized_matrices_have_singular_values_near_one():
    matrices = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0))
    for each in (matrices, matrices.mT.contiguous()):
        singular = torch.linalg.svdvals(orthogonalize(each))
        assert float(singular.min()) > 0.6
        assert float(singular.max()) < 1.25
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_muon_of_one_block_that_is_the_whole_weight_is_torchs_muon():
    """Torch iterates in bf16, which leaves a hundredth."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False)
    dense = nn.Parameter(linear.weight.detach().clone())
    model = nn.ModuleDict({"q_proj": linear})
    selection = sz.Selection({"q_proj.weight": sz.WeightSelection(shape=(16, 16), block_size=16, blocks=[[0, 0]])})
    sz.sparsify(model, selection)
    config = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.1)
    ours = build_optimizer(sz.parameter_groups(model), config, model=model)
    theirs = torch.optim.Muon([dense], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    (values,) = sz.trainable_parameters(model).values()
    start = dense.detach().clone()
    for _ in range(5):
        gradient = torch.randn(16, 16)
        values.grad, dense.grad = gradient.reshape(-1).clone(), gradient.clone()
        ours.step()
        theirs.step()
    change = (dense.detach() - start).norm()
    assert float((values.detach().view(16, 16) - dense.detach()).norm() / change) < 0.02


def test_ragged_blocks_have_their_own_shapes():
    model = TinyModel()
    name = "layers.1.self_attn.k_proj.weight"
    selection = sz.WeightSelection(shape=(10, 20), block_size=6, blocks=[[0, 0], [0, 3], [1, 1], [1, 3]])
    sz.sparsify(model, sz.Selection({name: selection}))
    ((key, values),) = sz.trainable_parameters(model).items()
    assert key.endswith("values_block")
    assert block_shapes(model)[id(values)] == [(6, 6), (6, 2), (4, 6), (4, 2)]
    assert sum(height * width for height, width in block_shapes(model)[id(values)]) == values.numel()


@pytest.mark.parametrize(("kind", "placement"), [(Adafactor, "inplace"), (BlockMuon, "inplace"), (BlockMuon, "delta")])
def test_shaped_optimizers_converge_with_a_plain_loop(kind, placement):
    model = sparse_model(placement)
    config = OptimizerConfig(name="adafactor" if kind is Adafactor else "muon", learning_rate=5e-2)
    optimizer = build_optimizer(sz.parameter_groups(model), config, model=model)
    assert isinstance(optimizer, kind)
    tokens = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(60):
        loss = tiny_loss(model, tokens)
        loss.backward()
        optimizer.step()
        sz.write_back(model)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("name", "state"), [("NAdam", "mu_product"), ("ASGD", "eta"), ("RAdam", None), ("Adamax", None), ("SGD", None)]
)
def test_numbers_that_change_with_the_steps_are_refused_by_checkpoints(name, state):
    model = sparse_model()
    optimizer = getattr(torch.optim, name)(sz.parameter_groups(model), lr=1e-3)
    engine = PlainEngine(module=model, optimizer=optimizer)
    tiny_loss(model, torch.arange(18).reshape(2, 9)).backward()
    optimizer.step()
    if state is None:
        assert take_snapshot(engine) is not None
    else:
        with pytest.raises(sz.InputError, match=f"the optimizer {name} has a state {state} that is neither its step"):
            take_snapshot(engine)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
@pytest.mark.parametrize("reached", [("a",), ("a", "c")])
def test_values_that_no_batch_reaches_take_a_step_of_gradient_zero(name, reached):
    """Without DeepSpeed they have no gradient; with it, one of zero."""

    def trained(filled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({each: nn.Linear(32, 32) for each in "abc"})
        regions = sz.WeightSelection(shape=(32, 32), blocks=[[0, 1]], block_size=16, rows=[3])
        sz.sparsify(model, sz.Selection({f"{each}.weight": regions for each in "abc"}))
        config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
        optimizer = build_optimizer(sz.parameter_groups(model), config, model=model)
        for _ in range(2):
            optimizer.zero_grad()
            sum(model[each](torch.ones(4, 32)).square().sum() for each in reached).backward()
            if filled:
                for values in sz.trainable_parameters(model).values():
                    values.grad = torch.zeros_like(values) if values.grad is None else values.grad
            optimizer.step()
        return list(sz.trainable_parameters(model).values())

    for found, expected in zip(trained(filled=False), trained(filled=True), strict=True):
        assert torch.equal(found, expected)
