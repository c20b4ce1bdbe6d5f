"""On a GPU, the layers, the calibration and merge give what they give on the host; and fp16, which runs nowhere else."""

import copy
from typing import Any

import pytest
import torch

import sparse_zero as sz
from sparse_zero.collectives import lone_process_group
from sparse_zero.layers import kernels
from sparse_zero.layers.quantized import dense_parameter
from sparse_zero.layers.sparsify import selection_of
from sparse_zero.zero.engine import step_was_applied
from sparse_zero.zero.optimizer_state import read_loss_scale
from sparse_zero.zero.optimizers import OptimizerConfig, build_optimizer
from sparse_zero.zero.state import read_masters
from tests.sparse_zero.helpers import TinyModel, mixed_selection, tiny_loss
from tests.sparse_zero.quantizing import FORMS, quantize, stored_bytes

pytestmark = pytest.mark.gpu


def calibration_batches(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 32, (2, 9), generator=generator).to(device) for _ in range(3)]


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_gradients_of_values_equal_those_of_the_host(placement):
    host = TinyModel().double()
    device = copy.deepcopy(host).cuda()
    tokens = calibration_batches("cpu")[0]
    for model in (host, device):
        sz.sparsify(model, mixed_selection(model), placement)
    tiny_loss(host, tokens).backward()
    tiny_loss(device, tokens.cuda()).backward()
    on_device = sz.trainable_parameters(device)
    for name, values in sz.trainable_parameters(host).items():
        torch.testing.assert_close(on_device[name].grad.cpu(), values.grad, rtol=1e-9, atol=1e-12)
    undo = sz.merge(device)
    assert all(tensor.device.type == "cpu" for kinds in undo.originals.values() for tensor in kinds.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_triton_give_what_torch_gives(dtype, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "_chosen", "auto")
    model = TinyModel(hidden=200).to("cuda", dtype)
    sz.sparsify(model, mixed_selection(model), "delta")
    for values in sz.trainable_parameters(model).values():
        torch.nn.init.normal_(values, std=0.1)
    tokens = calibration_batches("cuda")[0]
    found = []
    for chosen in ("plain", "triton"):
        sz.set_kernels(chosen)
        model.zero_grad()
        tiny_loss(model, tokens).backward()
        found.append([values.grad.clone() for values in sz.trainable_parameters(model).values()])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs"])
def test_the_selection_equals_that_of_the_host(score):
    config = sz.SelectionConfig(
        regions=(
            sz.RegionConfig(kind="block", modules=("*.{q,k}_proj",), block_size=6),
            sz.RegionConfig(kind="row", modules=("*.v_proj",)),
            sz.RegionConfig(kind="column", modules=("*.o_proj",)),
        ),
        score=score,
        budget=sz.BudgetConfig(parameters=500),
    )
    host = TinyModel().double()
    chosen = sz.select(host, calibration_batches("cpu"), config, tiny_loss)
    assert sz.select(copy.deepcopy(host).cuda(), calibration_batches("cuda"), config, tiny_loss) == chosen


@pytest.mark.parametrize("form", FORMS)
def test_codes_stand_for_the_same_numbers_as_on_the_host(form):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
    host = TinyModel()
    quantize(host, form)
    sz.sparsify(host, mixed_selection(TinyModel()), "delta")
    device = copy.deepcopy(host).cuda()
    tokens = calibration_batches("cpu")[0]
    for name in selection_of(host).weights:
        # Bit for bit: an adapter names its base by them.
        assert torch.equal(dense_parameter(device, name).cpu(), dense_parameter(host, name))
    tiny_loss(host, tokens).backward()
    tiny_loss(device, tokens.cuda()).backward()
    on_device = sz.trainable_parameters(device)
    for name, values in sz.trainable_parameters(host).items():
        torch.testing.assert_close(on_device[name].grad.cpu(), values.grad, rtol=1e-4, atol=1e-6)
    sz.unmerge(device, sz.merge(device))
    assert stored_bytes(device.cpu()) == {n: data for n, data in stored_bytes(host).items() if "values" not in n}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_skips_overflows_and_resumes_with_its_loss_scale(stage, tmp_path):
    batches = [tokens.repeat(2, 1) for tokens in calibration_batches("cuda")] * 3

    def engine_with(init_power: int) -> Any:
        model = TinyModel().half().cuda()
        sz.sparsify(model, mixed_selection(model), "inplace")
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "fp16": {"enabled": True, "initial_scale_power": init_power, "loss_scale_window": 2, "hysteresis": 1},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        optimizer = OptimizerConfig(learning_rate=1e-3)
        return sz.initialize(model=model, config=config, optimizer=lambda groups: build_optimizer(groups, optimizer))[0]

    def train(engine: Any, steps: list[torch.Tensor]) -> list[float]:
        losses = []
        for tokens in steps:
            loss = tiny_loss(engine, tokens)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    with lone_process_group():
        # 2**32 overflows in fp16 for sure; the scale comes down by halves, and the values stay where they are.
        engine = engine_with(32)
        before = read_masters(engine)
        train(engine, batches[:2])
        assert not step_was_applied(engine)
        assert read_loss_scale(engine)["cur_scale"] == 2.0**30
        assert all(torch.equal(before[name], master) for name, master in read_masters(engine).items())
        engine.destroy()
        torch.manual_seed(0)
        engine = engine_with(8)
        train(engine, batches[:4])
        assert step_was_applied(engine)
        sz.save_checkpoint(engine, tmp_path / "checkpoint")
        stored, uninterrupted = read_loss_scale(engine), train(engine, batches[4:])
        engine.destroy()
        torch.manual_seed(0)
        engine = engine_with(3)
        sz.load_checkpoint(engine, tmp_path / "checkpoint")
        assert read_loss_scale(engine) == stored
        assert train(engine, batches[4:]) == pytest.approx(uninterrupted, rel=2e-3)
        engine.destroy()
