"""How does a micro-batch get to the device without the host waiting for it?"""

from collections.abc import Mapping

import torch
from torch import Tensor


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on ``device``.

    To a GPU from pinned memory, in the order of its work: the host goes on. A copy from other memory would wait until
    the GPU has done all that it was told before.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
