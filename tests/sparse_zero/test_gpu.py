"""On a GPU, the layers, the calibration and merge give what they give on the host."""

import copy

import pytest
import torch

import sparse_zero as sz
from tests.sparse_zero.helpers import TinyModel, mixed_selection, tiny_loss

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
