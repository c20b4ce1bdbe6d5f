"""What does calibration do about what goes wrong: non-finite numbers, wrong losses, forwards that change the model?"""

import gc
import re
import weakref
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_zero as sz
from sparse_zero.errors import InputError
from sparse_zero.selection.calibration import BufferSnapshot, own_random_state
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.observers import peak
from tests.sparse_zero.helpers import TinyModel, tiny_loss
from tests.sparse_zero.test_calibration import (
    RULES,
    calibrated,
    families,
    make_batches,
    make_mixed,
    make_model,
    rule,
)


def rows_of(pattern: str, score: str) -> tuple[sz.RegionConfig, ...]:
    return (sz.RegionConfig(kind="row", modules=(pattern,), per_matrix=1, score=score),)


# -- buffers


class Normalised(nn.Module):
    """With running statistics, a counter and a buffer that every forward replaces by a larger one."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj, self.head = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, torch.ones(1)])
        x = self.norm(self.proj(self.embed(tokens)).transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.head(torch.tanh(x))
        return logits


def assert_buffers_survive(model: nn.Module, run: Any) -> None:
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    assert len(before) == 4
    run()
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, values) in before.items():
        assert after[name] is buffer, name
        assert torch.equal(buffer, values), name


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_a_forward_changes_are_put_back(fails):
    torch.manual_seed(3)
    model = Normalised().train()

    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        loss = tiny_loss(model, tokens)
        assert model.norm.num_batches_tracked > 0
        if fails and model.norm.num_batches_tracked == 2:
            raise ArithmeticError("after two forwards")
        return loss

    def run() -> None:
        if fails:
            with pytest.raises(ArithmeticError, match="after two forwards"):
                calibrated(model, rows_of("proj", "sums"), loss_fn=loss_fn)
        else:
            calibrated(model, rows_of("proj", "sums"), loss_fn=loss_fn)

    assert_buffers_survive(model, run)


@pytest.mark.parametrize("stage", [2, 3])
def test_full_calibration_puts_buffers_back_with_the_weights(stage):
    torch.manual_seed(3)
    model = Normalised().bfloat16().train()
    model.seen = torch.full((1,), 1 / 3)  # With more digits than the weights, as rotary frequencies have.
    config = sz.SelectionConfig(
        regions=rows_of("proj", "abs_of_mean"),
        calibration_batches=2,
        calibration_weights="full",
        full_calibration=sz.FullCalibrationConfig(batches_per_step=2, stage=stage),
    )
    assert_buffers_survive(model, lambda: sz.select(model, make_batches(2), config, tiny_loss))


def test_shared_buffers_and_none_are_put_back():
    model = nn.ModuleList([nn.Module(), nn.Module()])
    table = torch.arange(3.0)
    for module in model:
        module.register_buffer("table", table)
        module.register_buffer("nothing", None)
    snapshot = BufferSnapshot(model)
    table.zero_()
    model[1].table = torch.ones(5)
    snapshot.restore()
    assert model[0].table is table
    assert model[1].table is table
    assert table.tolist() == [0.0, 1.0, 2.0]


# -- scaling of the loss


@pytest.mark.parametrize("score", ["sums", "squares"])
@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
def test_gradients_under_fp16_autocast_do_not_underflow(score, accumulate):
    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(tokens)
        # As the mean over many tokens has it: without a scale, most gradients are less than fp16 has.
        return nn.functional.cross_entropy(logits.float()[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) * 2.0**-17

    regions = families(score)
    options: dict[str, Any] = {"accumulate": accumulate, "accumulator_dtype": "float64"}
    found, _ = calibrated(make_model(), regions, loss_fn=loss_fn, **options)
    wanted, _ = calibrated(make_model(), regions, loss_fn=lambda m, t: tiny_loss(m, t) * 2.0**-17, **options)
    for key, scores in wanted.items():
        difference = float((found[key] - scores).abs().max() / scores.abs().max())
        assert difference < 0.05, (key, difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_read_gradients_that_are_those_of_autograd_bit_for_bit(dtype):
    """The scale of the loss is a power of two, and what a rule is given has lost it."""
    seen: dict[str, list[Tensor]] = {}

    def watching(regions: Candidates, *, gradient: Tensor) -> Tensor:
        seen.setdefault(regions.weight, []).append(gradient.clone())
        return regions.sums(gradient.square())

    model = make_mixed().to(dtype)
    RULES["watching"] = rule(watching)
    try:
        calibrated(model, rows_of("layers.1.experts.{up,down}_proj", "watching"), accumulate="per_step")
    finally:
        del RULES["watching"]
    for number, batch in enumerate(make_batches()):
        model.zero_grad()
        tiny_loss(model, batch).backward()
        experts = model.get_submodule("layers.1.experts")
        for name, parameter in experts.named_parameters():
            assert parameter.grad is not None
            for index, gradient in enumerate(parameter.grad):
                found = seen[f"layers.1.experts.{name}[{index}]"][number]
                assert found.dtype == dtype
                assert torch.equal(found, gradient)


# -- what the loss function returns


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda loss: float(loss.detach()), "float"),
        (lambda loss: loss.expand(2), r"a tensor of shape \(2,\)"),
        (lambda loss: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("score", ["sums", "of_norms"])
def test_a_loss_that_is_no_scalar_is_named(change, what, score):
    with pytest.raises(InputError, match=rf"loss_fn returned {what} .*must return a scalar tensor"):
        calibrated(make_model(), families(score), loss_fn=lambda model, tokens: change(tiny_loss(model, tokens)))


def test_the_graph_of_a_forward_that_is_repeated_is_gone_before():
    """Reentrant checkpointing makes the first micro-batch run twice."""
    alive: list[bool] = []
    losses: list[weakref.ref[Tensor]] = []

    def loss_fn(model: Any, tokens: Tensor) -> Tensor:
        alive.extend(each() is not None for each in losses)
        loss = tiny_loss(model, tokens)
        losses.append(weakref.ref(loss))
        return loss

    gc.disable()
    try:
        regions = rows_of("layers.*.self_attn.q_proj", "sums")
        calibrated(make_mixed("reentrant"), regions, make_batches(1), loss_fn=loss_fn)
    finally:
        gc.enable()
    assert alive == [False]


# -- gradients that are zero or not finite


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("score", ["gradient_times_weight", "abs_of_mean"])
def test_a_weight_of_zeros_is_reached_and_an_unused_one_is_not(score, accumulate):
    model = make_model()
    nn.init.zeros_(model.get_parameter("layers.1.self_attn.q_proj.weight"))
    config = sz.SelectionConfig(regions=rows_of("layers.*.self_attn.q_proj", score), accumulate=accumulate)
    scores = sz.score_regions(model, make_batches(), config, tiny_loss).scores
    zeros = [key for key, found in scores.items() if not found.any()]
    assert zeros == ([("layers.1.self_attn.q_proj.weight", "row")] if score == "gradient_times_weight" else [])
    # Without its gradient: an o_proj of zeros keeps everything from v_proj, and nothing from itself.
    nn.init.zeros_(model.get_parameter("layers.1.self_attn.o_proj.weight"))
    calibrated(model, rows_of("layers.*.self_attn.o_proj", score), accumulate=accumulate)
    with pytest.raises(InputError, match=r"no gradient reached 'layers\.1\.self_attn\.v_proj'"):
        calibrated(model, rows_of("layers.*.self_attn.v_proj", score), accumulate=accumulate)


@pytest.mark.parametrize("accumulate", ["sum", "per_step"])
@pytest.mark.parametrize("score", ["sums", "squares", "everything"])
def test_a_gradient_that_is_not_finite_ends_calibration_at_its_micro_batch(score, accumulate):
    model, calls = make_model(), []

    def second_is_poisoned(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            output.register_hook(lambda gradient: gradient * float("inf"))

    model.layers[0].self_attn.register_forward_hook(second_is_poisoned)
    done: list[int] = []
    config = sz.SelectionConfig(regions=families(score), accumulate=accumulate)
    with pytest.raises(InputError, match=r"micro-batch 1 has a non-finite gradient of layers\.0\.self_attn\.\w_proj"):
        calibrated(model, config.regions, make_batches(20), accumulate=accumulate)
    assert len(calls) == 2
    calls.clear()
    trained = sz.SelectionConfig(
        regions=rows_of("layers.*.self_attn.q_proj", "l1"),
        calibration_batches=4,
        calibration_weights="full",
        accumulate=accumulate,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"micro-batch 1 has a non-finite gradient of .*full_calibration.learning_rate"
    ):
        sz.select(model, make_batches(8), trained, tiny_loss, on_batch=done.append)
    # The step, of four micro-batches, is taken to its end.
    assert done == [0, 1, 2, 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class LargestOutput(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in inputs:
                self.num_elements = max(self.num_elements, each.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whether_all_are_finite_is_seen_without_a_copy(dtype):
    torch.manual_seed(0)
    plain = torch.randn(40, 30, dtype=dtype)
    for tensor in (plain, plain.T, plain[:, 3:9], plain[2], plain[0, 0]):
        with LargestOutput() as made:
            found = peak(tensor)
        assert (found.dtype, found.shape) == (torch.float64, ())
        assert found == tensor.abs().max()
        assert made.num_elements == 1
        for wrong in (float("nan"), float("inf"), float("-inf")):
            spoiled = tensor.clone()
            spoiled[(-1,) * spoiled.dim()] = wrong
            assert not peak(spoiled).isfinite()
    assert peak(torch.zeros(3, 2, dtype=dtype)) == 0


# -- what fails otherwise


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_that_cannot_be_made_leaves_the_flags_as_they_were(stage, monkeypatch):
    model = make_model()
    model.embed_tokens.weight.requires_grad_(False)
    gradient = torch.ones(20)
    model.layers[0].self_attn.q_proj.bias.grad = gradient
    config = sz.SelectionConfig(
        regions=rows_of("layers.*.self_attn.q_proj", "l1"),
        calibration_batches=4,
        calibration_weights="full",
        full_calibration=sz.FullCalibrationConfig(stage=stage),
    )
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setenv("LOCAL_RANK", "no number")
        with pytest.raises(ValueError, match="no number"):
            sz.select(model, make_batches(4), config, tiny_loss)
    finally:
        deepspeed.comm.destroy_process_group()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["embed_tokens.weight"]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {"layers.0.self_attn.q_proj.bias"}
    assert found["layers.0.self_attn.q_proj.bias"] is gradient


@pytest.mark.parametrize("calibration_weights", ["frozen", "full"])
def test_what_a_rule_raises_in_backward_comes_out_after_its_micro_batch(calibration_weights):
    model: TinyModel = make_model()
    config = sz.SelectionConfig(
        regions=rows_of("layers.*.self_attn.q_proj", f"{__name__}:never"),
        calibration_batches=4,
        calibration_weights=calibration_weights,
        accumulate="per_step",
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArithmeticError, match=re.escape("never for layers.2.self_attn.q_proj.weight")):
        sz.select(model, make_batches(4), config, tiny_loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tiny_loss(model, make_batches(1)[0]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def never(regions: Candidates, *, gradient: Tensor) -> Tensor:
    """A rule that fails in the uppermost layer only."""
    if regions.weight.startswith("layers.2"):
        raise ArithmeticError(f"never for {regions.weight}")
    return regions.sums(gradient.abs())


@pytest.mark.gpu
def test_the_generators_of_all_devices_are_left_as_they_were():
    before = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    with own_random_state():
        torch.manual_seed(1234)
        torch.rand(3, device="cuda")
    after = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
