"""Does a batch arrive on the device as it was?"""

from __future__ import annotations

import pytest
import torch

from models.transfer import to_device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_arrives_whole_even_if_the_host_goes_on(device: str) -> None:
    numbers = torch.arange(1_000_000)
    # On a GPU many batches are under way at once, whose host copies are let go.
    arrived = [to_device({"numbers": numbers + step}, torch.device(device))["numbers"] for step in range(20)]
    for step, each in enumerate(arrived):
        assert each.device.type == device
        assert torch.equal(each.cpu(), numbers + step)
