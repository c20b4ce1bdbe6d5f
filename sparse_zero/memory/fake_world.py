"""How does DeepSpeed's real engine run on one rank of a world that is not there, on tensors that have no data?

torch has both: fake tensors have shapes, dtypes and storages of a known size, and nothing in them; a fake process group
returns at once from every collective. Neither is a public interface; ``tests/distributed/test_simulation.py`` says what
broke when a new version changes one. A process can enter one such world, and no other world before or after it:
DeepSpeed keeps process groups for the life of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from sparse_zero.errors import InputError
from sparse_zero.memory.recorder import MemoryRecorder
from sparse_zero.selection.regions import WeightSelection

_entered = False
# Set on the result of "are all ...".
_SAYS_ALL = "_sparse_zero_says_all"


class FakeRecorder(MemoryRecorder):
    """A recorder that answers for the numbers which fake tensors do not have.

    A float is 1, an integer 0, "are all ..." is true and every other question is not: gradients are finite, no rank
    asks to stop. What a mask selects is as much as this rank's share of it.

    Args:
        world_size: of the world.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See the class."""
        operator = func.overloadpacket
        if operator is torch.ops.aten._local_scalar_dense:
            (tensor,) = args
            if tensor.dtype == torch.bool:
                return hasattr(tensor, _SAYS_ALL)
            return 1.0 if tensor.dtype.is_floating_point else 0
        if operator is torch.ops.aten.nonzero:
            (mask,) = args
            return mask.new_empty((mask.numel() // self.world_size, mask.dim()), dtype=torch.int64)
        if operator is torch.ops.aten.all:
            result = func(*args, **kwargs)
            setattr(result, _SAYS_ALL, True)
            return result
        return NotImplemented


def _with_numbers(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` outside of the fake tensors: where values lie is known, and decides how many there are."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return method(*args, **kwargs)

    return call


@contextmanager
def _real_selections() -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("flat_indices", "num_parameters_by_kind", "owned_mask"):
            method = _with_numbers(getattr(WeightSelection, name))
            stack.enter_context(patch.object(WeightSelection, name, method))
        yield


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[FakeRecorder]:
    """Be one rank of a world of ``world_size`` while the block runs, on fake tensors that a recorder sees.

    Yields:
        The recorder.

    Raises:
        InputError: this process has a process group, or had one of this kind.
    """
    global _entered
    if dist.is_initialized() or _entered:
        raise InputError("this process has, or had, a process group: simulate in a process of its own")
    if not 0 <= rank < world_size:
        raise InputError(f"rank is {rank} in a world of {world_size}: it must lie in 0 to {world_size - 1}")
    _entered = True
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
    from torch.testing._internal.distributed.fake_pg import FakeStore

    recorder = FakeRecorder(world_size)
    # Other ranks, which have nothing to say, are not asked whether they are of the same opinion.
    agreed = [
        patch.object(module, "assert_ints_same_as_other_ranks", lambda ints: None)
        for module in (partition_parameters, partitioned_param_coordinator, stage3)
    ]
    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with patch.dict(os.environ, variables), agreed[0], agreed[1], agreed[2]:
        dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            # What DeepSpeed takes the number of ranks from, where it shards before there is an engine.
            deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
            with FakeTensorMode(allow_non_fake_inputs=True), recorder, _real_selections():
                yield recorder
        finally:
            dist.destroy_process_group()
