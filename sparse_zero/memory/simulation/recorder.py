"""How is every allocation of tensors seen, whether they have data or not?

A dispatch mode sees every operation of this thread, and of the backward pass it starts, and notes the storages of their
results. What kernels use inside of an operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_zero.memory.simulation.quantized_bases import constants_of, product_with_codes
from sparse_zero.memory.simulation.timeline import Kind, Place, Span, Storage, Timeline, sort_out
from sparse_zero.zero import compat

# Operators of torch.distributed that fill a tensor with what other ranks hold.
_GATHERS = ("allgather", "all_gather", "_allgather_base", "broadcast")


@cache
def _name(func: Any) -> str:
    """Of an operator, with its namespace."""
    found: str = func._schema.name
    return found


@cache
def _gathers(func: Any) -> bool:
    namespace, _, name = _name(func).partition("::")
    return namespace == "c10d" and name.startswith(_GATHERS)


class MemoryRecorder(TorchDispatchMode):
    """Notes the life of every storage that an operation inside the mode makes, or that :meth:`add` is told of.

    ``live_bytes`` is what lives now on the device, ``peak_bytes`` the most that did. A storage that several tensors
    share counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.storages: list[Storage] = []
        self.spans: list[Span] = []
        self._modules: list[str] = []
        # By address of the storage object, while it lives.
        self._alive: dict[int, Storage] = {}
        # Names of the modules that are at work, the innermost last.
        self._stack: list[str] = []
        # Where the part of the run that is under way began, and what it is like.
        self._first, self._role = 0, ""

    def add(self, tensor: Tensor, kind: Kind | None = None) -> None:
        """Note a tensor's storage, unless it is noted already; ``kind`` counts in either case, if given."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._alive.get(key)
        if found is None:
            # Asked for a device, a fake tensor takes its time.
            if tensor.device.type == "meta":
                return
            found = Storage(
                num_bytes=storage.nbytes(), born=len(self._modules), module=self._module(), place=self.place_of(tensor)
            )
            self._alive[key] = found
            self.storages.append(found)
            self._modules.append(found.module)
            if found.place == "device":
                self.live_bytes += found.num_bytes
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            # What lives at the end of the process is of no interest: nothing is to run then.
            weakref.finalize(storage, self._forget, key).atexit = False
        if kind is not None:
            found.kind = kind

    def _forget(self, key: int) -> None:
        storage = self._alive.pop(key)
        storage.died = len(self._modules)
        self._modules.append(self._module())
        if storage.place == "device":
            self.live_bytes -= storage.num_bytes

    def place_of(self, tensor: Tensor) -> Place:
        """Where a tensor lies: on a CPU, all of them on the device that computes."""
        return "device"

    def _module(self) -> str:
        return self._stack[-1] if self._stack else ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self.answer(func, args, kwargs or {})
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.add(result)
        elif _gathers(func):
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor):
                    self.add(leaf, self._gathered(leaf))
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return result

    def _gathered(self, tensor: Tensor) -> Kind | None:
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return "gathered" if found is None or found.kind is None else None

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operator gives that is not to be run; NotImplemented: run it."""
        if _name(func) == "bitsandbytes::gemm_4bit":
            with self:
                return product_with_codes(*args, **kwargs)
        return NotImplemented

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Call the block's part of the run ``name``; "forward" and "backward" are known to :func:`sort_out`."""
        self._first, self._role = len(self._modules), name
        try:
            yield
        finally:
            self._end_span(name)

    def role(self, phase: str, role: str) -> None:
        """From here on, what is made inside of ``phase`` is made as it is in the part of a run that ``role`` names."""
        self._end_span(phase)
        self._role = role

    def _end_span(self, phase: str) -> None:
        end = len(self._modules)
        self.spans.append(Span(phase=phase, role=self._role, first=self._first, end=end))
        self._first = end

    @contextmanager
    def modules_of(self, model: nn.Module) -> Iterator[None]:
        """Note, for what the block makes, which module of ``model`` was at work: in forward, and when it is recomputed.

        torch's own tracker knows it in backward, too, with hooks on tensors that keep recomputed ones alive.
        """
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(names.get(id(module), self._module()))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        # Also when forward raises, as a recomputation does that has all it needs.
        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def timeline(self, head: str | None = None) -> Timeline:
        """What was recorded, each storage with its kind; see :func:`sort_out`."""
        sort_out(self.storages, self.spans, head)
        return Timeline(self.storages, self.spans, self._modules)


def tag_model(recorder: MemoryRecorder, model: nn.Module) -> None:
    """Note a model's parameters and buffers: frozen ones are weights, the others values, buffers indices.

    Constants of a quantized base are weights, too.

    Of what ZeRO-3 has sharded, this rank's shards. Once more where an engine has laid them out anew.
    """
    for parameter in model.parameters():
        held = compat.padded_shard(parameter) if compat.is_sharded(parameter) else parameter
        recorder.add(held, "values" if parameter.requires_grad else "weights")
    for buffer in model.buffers():
        recorder.add(buffer, "indices")
    for constant in constants_of(model):
        recorder.add(constant, "weights")
