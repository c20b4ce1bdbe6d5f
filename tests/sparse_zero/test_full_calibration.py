"""Full calibration in one process that has no process group: does it leave nothing behind, and refuse what it must?"""

import os

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from tests.sparse_zero.helpers import TinyModel, mixed_selection, tiny_loss


def make_model() -> TinyModel:
    torch.manual_seed(7)
    return TinyModel()


def make_batches(number: int = 4) -> Tensor:
    return torch.randint(0, 32, (number, 2, 9), generator=torch.Generator().manual_seed(5))


def make_config(**options: object) -> sz.SelectionConfig:
    return sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", modules=("*.{q,k}_proj",), block_size=6),),
        budget=sz.BudgetConfig(regions=4),
        calibration_batches=4,
        calibration_weights="full",
        full_calibration=sz.FullCalibrationConfig(learning_rate=1e-3, batches_per_step=2, **options),  # type: ignore[arg-type]
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_no_process_group_is_needed_and_none_is_left(stage, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    model = make_model()
    before = weights_of(model)
    first = sz.select(model, make_batches(), make_config(stage=stage), tiny_loss)
    assert not dist.is_initialized()
    assert "LOCAL_RANK" not in os.environ
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Another one, and then a process group of the user's own.
    assert sz.select(model, make_batches(), make_config(stage=5 - stage), tiny_loss) == first
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert sz.select(model, make_batches(), make_config(stage=stage), tiny_loss) == first
        assert dist.is_initialized()
    finally:
        deepspeed.comm.destroy_process_group()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("call", [1, 3])
def test_an_error_in_the_loss_restores_the_model(stage, call):
    model = make_model()
    before, calls = weights_of(model), []

    def loss_fn(engine: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        loss = tiny_loss(engine, batch)
        if len(calls) == call:
            raise KeyError("the data")
        return loss

    with pytest.raises(KeyError, match="the data"):
        sz.select(model, make_batches(), make_config(stage=stage), loss_fn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not dist.is_initialized()
    # It works as ever.
    assert sz.select(model, make_batches(), make_config(stage=stage), tiny_loss).num_parameters > 0
    tiny_loss(model, make_batches()[0]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def half(model: TinyModel) -> None:
    model.half()


def mixed(model: TinyModel) -> None:
    model.lm_head.bfloat16()


def sparse(model: TinyModel) -> None:
    sz.sparsify(model, mixed_selection(model))


def quantized(model: TinyModel) -> None:
    model.embed_tokens.weight = nn.Parameter(torch.zeros(32, 20, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (half, r"embed_tokens\.weight is torch\.float16: load the model in bfloat16 or float32"),
        (mixed, r"lm_head\.weight is torch\.bfloat16 on cpu, while others are torch\.float32"),
        (sparse, "the model is sparse: select before sparsify"),
        (quantized, r"embed_tokens\.weight is quantized \(torch\.uint8\): load the base in full precision"),
    ],
)
def test_models_that_cannot_be_trained_as_a_whole_are_refused(change, says):
    model = make_model()
    change(model)
    with pytest.raises(sz.InputError, match=f"calibration_weights is 'full', and {says}"):
        sz.select(model, make_batches(), make_config(), tiny_loss)


def test_micro_batches_that_fill_no_step_are_refused():
    with pytest.raises(sz.InputError, match=r"got 3 micro-batches, not a multiple of .*batches_per_step 2"):
        sz.select(make_model(), make_batches(3), make_config(), tiny_loss)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"batches_per_step": 0}, "batches_per_step is 0"),
        ({"stage": 1}, "stage is 1: choose 2 or 3"),
        ({"keep_weights_in": " "}, "keep_weights_in is ' ': name a folder"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, says):
    with pytest.raises(sz.InputError, match=says):
        sz.FullCalibrationConfig(**options)


def test_only_full_calibration_that_is_done_makes_a_base():
    assert make_config(keep_weights_in="new").keeps_weights_in == "new"
    assert make_config().keeps_weights_in is None
    chosen = sz.SelectionConfig(
        file="selection.safetensors",
        calibration_weights="full",
        full_calibration=sz.FullCalibrationConfig(keep_weights_in="new"),
    )
    assert chosen.keeps_weights_in is None
