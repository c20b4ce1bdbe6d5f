"""How does every rank get what every other rank found, as plain data?"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from sparse_zero.collectives import collective_device


def gather_json(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Collective; alone it is ``[value]``.

    Values travel as JSON bytes, never as pickles: they must be what JSON can say (tuples become lists).
    """
    data = json.dumps(value).encode()
    if not dist.is_initialized():
        return [json.loads(data)]
    device = collective_device()
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    num_bytes = [int(each) for each in lengths]
    padded = torch.zeros(max(num_bytes), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in num_bytes]
    dist.all_gather(gathered, padded)
    return [json.loads(bytes(each[:size].cpu().numpy())) for each, size in zip(gathered, num_bytes, strict=True)]
