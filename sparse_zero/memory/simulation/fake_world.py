"""How does DeepSpeed's real engine run on one rank of a world that is not there, on tensors that have no data?

torch has both: fake tensors have shapes, dtypes and storages of a known size, and nothing in them; a fake process group
returns at once from every collective. Neither is a public interface; ``tests/distributed/test_simulation.py`` says what
broke when a new version changes one. A process can enter one such world, and no other world before or after it:
DeepSpeed keeps process groups for the life of the process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from sparse_zero.errors import InputError
from sparse_zero.memory.simulation.recorder import MemoryRecorder
from sparse_zero.memory.simulation.timeline import Place
from sparse_zero.selection.regions import WeightSelection

# What the model computes on, as it were: torch takes it for another device than HOST, while its code for CPUs serves
# both.
DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")
_META = torch.device("meta")

_entered = False
# Set on the result of "are all ...".
_SAYS_ALL = "_sparse_zero_says_all"
# Set on a buffer that is cut into parts for all ranks: a weak reference to a part.
_PART = "_sparse_zero_part"


class FakeRecorder(MemoryRecorder):
    """A recorder that answers for the numbers which fake tensors do not have.

    A float is 1, an integer 0, "are all ..." is true and every other question is not: gradients are finite, no rank
    asks to stop. What a mask selects is as much as this rank's share of it; in a module of experts, every expert has as
    many tokens as the others.

    Args:
        world_size: of the world.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self._num_experts = 1

    def place_of(self, tensor: Tensor) -> Place:
        """See the base class."""
        return "host" if tensor.device == HOST else "device"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # More than half of all that is asked, and by torch itself.
        if func is torch.ops.prim.device.default:
            (tensor,) = args
            return _META if tensor.fake_mode.in_kernel_invocation else tensor.fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)

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
            return mask.new_empty((self._num_true(mask), mask.dim()), dtype=torch.int64)
        if operator is torch.ops.aten.all:
            result = func(*args, **kwargs)
            setattr(result, _SAYS_ALL, True)
            return result
        if operator is torch.ops.aten._grouped_mm and args[0].dtype != torch.bfloat16:
            return _grouped_product(*args, **kwargs)
        return super().answer(func, args, kwargs)

    def _num_true(self, mask: Tensor) -> int:
        """Entries of a mask that are true: see the class."""
        if self._module().rpartition(".")[2] != "experts":
            return mask.numel() // self.world_size
        if mask.dim() == 1:
            # Which experts have tokens; the last one stands for none.
            self._num_experts = mask.numel() - 1
            return self._num_experts
        # [choices, tokens] of one expert.
        return mask.numel() // self._num_experts


def _grouped_product(first: Tensor, second: Tensor, ends: Tensor | None = None, **options: Any) -> Tensor:
    """What ``grouped_mm`` gives: torch knows it without data in bf16 only."""
    if second.dim() == 3:
        shape = (*first.shape[:-1], second.shape[-1])
    else:
        groups = () if first.dim() == 3 or ends is None else (len(ends),)
        shape = (*groups, first.shape[-2], second.shape[-1])
    # Rows begin at multiples of 16 bytes.
    step = 16 // first.element_size()
    return first.new_empty(*shape[:-1], -(-shape[-1] // step) * step)[..., : shape[-1]]


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
def _apart_from_host() -> Iterator[None]:
    """DeepSpeed takes :data:`DEVICE` for its accelerator, so that what it offloads goes to another place."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import linear

    accelerator = get_accelerator()
    # Its function for linears asks for a type of device, not for a device.
    plain = SimpleNamespace(device_name=lambda: DEVICE.type)
    make_tensor: Any = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        # torch's own forgets the number of a CPU, and so does moving what it made.
        made = make_tensor(*args, device=device, **kwargs)
        is_there = device is not None and torch.device(device) == DEVICE
        return torch.empty(made.shape, dtype=made.dtype, device=DEVICE) if is_there else made

    with (
        patch.object(torch, "tensor", tensor),
        # What is laid flat is laid flat there, not by way of the host, however little room this machine has.
        patch.object(accelerator, "available_memory", lambda index=None: 2**60),
        patch.object(accelerator, "device_name", lambda index=None: str(DEVICE)),
        patch.object(accelerator, "current_device_name", lambda: str(DEVICE)),
        patch.object(accelerator, "on_accelerator", lambda tensor: tensor.device == DEVICE),
        patch.object(linear, "get_accelerator", lambda: plain),
    ):
        yield


def _one_view_for_all_ranks(self: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``narrow``, where a buffer is cut into as many parts as there are ranks: one view stands for all of them.

    Without numbers, one part is as good as another, and a thousand of them take a second.
    """
    if self.dim() != 1 or length * dist.get_world_size() != self.numel() or self.requires_grad:
        return Tensor.narrow(self, dim, start, length)
    known: Any = getattr(self, _PART, None)
    view: Tensor | None = None if known is None else known()
    if view is None:
        view = Tensor.narrow(self, dim, start, length)
        setattr(self, _PART, weakref.ref(view))
    return view


def _put_together(recorder: MemoryRecorder) -> Callable[..., None]:
    """``AllGatherCoalescedHandle.wait``, where each parameter is put together of its parts of all ranks: at once."""
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle

    original = AllGatherCoalescedHandle.wait

    def wait(handle: Any, handle_dependency: bool = True) -> None:
        if handle.complete or handle.quantization:
            original(handle, handle_dependency)
            return
        handle.allgather_handle.wait()
        part = handle.partitions[0]
        for parameter in handle.params:
            whole = torch.empty(parameter.ds_shape, dtype=part.dtype, device=part.device)
            parameter.data = whole.to(parameter.ds_tensor.dtype)
            recorder.add(parameter.data, "gathered")
            parameter.ds_status = type(parameter.ds_status).AVAILABLE
        handle.complete = True

    return wait


@torch.no_grad()
def _reduce_scatter(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """``reduce_scatter_coalesced``, without cutting each gradient into as many parts as there are ranks."""
    from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn

    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [-(-tensor.numel() // world_size) for tensor in tensors]
    missing = [size * world_size - tensor.numel() for size, tensor in zip(sizes, tensors, strict=True)]
    padding = tensors[0].new_empty(sum(missing))
    if len(tensors) == 1 and not len(padding):
        flat = tensors[0].view(-1)
    else:
        flat = tensors[0].new_empty(world_size * sum(sizes))
    flat.div_(world_size)
    own = flat.narrow(0, rank * sum(sizes), sum(sizes))
    _torch_reduce_scatter_fn(flat, own, group=group)
    found, offset = [], 0
    for size, tensor in zip(sizes, tensors, strict=True):
        found.append(own.narrow(0, offset, max(0, min(size, tensor.numel() - rank * size))))
        offset += size
    return found


class _Broadcasts:
    """Handle of several collectives."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


@contextmanager
def communicating_in_place() -> Iterator[None]:
    """Let real ranks under gloo take for stage 3's collectives what they take under NCCL, and in a simulation.

    gloo gathers into a copy of the whole result, and reduces and scatters a copy of all that it is given (seen with
    torch 2.13); NCCL needs neither, where what a rank gives, or gets, is a part of the whole. In the block, part after
    part is broadcast from the rank that has it, or reduced to the rank that it is for, where it lies.
    """
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.runtime.comm import coalesced_collectives

    def all_gather(
        backend: Any, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        group = group or dist.group.WORLD
        parts = output_tensor.chunk(dist.get_world_size(group))
        mine = parts[dist.get_rank(group)]
        if input_tensor.data_ptr() != mine.data_ptr():
            mine.copy_(input_tensor.view_as(mine))
        works = [
            dist.broadcast(part, dist.get_global_rank(group, rank), group=group, async_op=True)
            for rank, part in enumerate(parts)
        ]
        handle = _Broadcasts(works)
        return handle if async_op else handle.wait()

    def reduce_scatter(source: Tensor, out: Tensor, group: Any = None, **options: Any) -> None:
        parts, group = source.chunk(dist.get_world_size(group)), group or dist.group.WORLD
        # DeepSpeed takes a part of what it gives for the result.
        assert out.data_ptr() == parts[dist.get_rank(group)].data_ptr()
        for rank, part in enumerate(parts):
            dist.reduce(part, dist.get_global_rank(group, rank), group=group)

    with (
        patch.object(coalesced_collectives, "_torch_reduce_scatter_fn", reduce_scatter),
        patch.object(TorchBackend, "all_gather_into_tensor", all_gather),
    ):
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
    agreed: list[Any] = [
        patch.object(module, "assert_ints_same_as_other_ranks", lambda ints: None)
        for module in (partition_parameters, partitioned_param_coordinator, stage3)
    ]
    # DeepSpeed puts its own in the place of torch's linear, and leaves it there.
    agreed.append(patch.object(torch.nn.functional, "linear", torch.nn.functional.linear))
    agreed.append(patch("sparse_zero.zero.engine.check_same_constants", lambda model: None))
    agreed.append(patch.object(FakeTensor, "narrow", _one_view_for_all_ranks, create=True))
    agreed.append(patch.object(stage3, "reduce_scatter_coalesced", _reduce_scatter))
    agreed.append(patch.object(partition_parameters.AllGatherCoalescedHandle, "wait", _put_together(recorder)))
    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with patch.dict(os.environ, variables), ExitStack() as stack:
        for each in agreed:
            stack.enter_context(each)
        dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            # What DeepSpeed takes the number of ranks from, where it shards before there is an engine.
            deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
            with _apart_from_host(), FakeTensorMode(allow_non_fake_inputs=True), recorder, _real_selections():
                yield recorder
        finally:
            dist.destroy_process_group()
