"""How much memory would a step of a model hold at most, found by running its real code on tensors without data?

The model is built on the meta device, made sparse there, and given fake tensors: they have shapes, dtypes and storages
of a known size, and nothing in them. A dispatch mode sees every operation and adds up the storages that are alive.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations made inside the mode, as long as they live.

    ``live_bytes`` now, ``peak_bytes`` at most. A storage that several tensors share counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


@contextmanager
def simulated(model: nn.Module, device: str = "cpu") -> Iterator[LiveStorages]:
    """Run the block on fake tensors, and count what lives.

    Args:
        model: on the meta device; its parameters and buffers become fake tensors of ``device``, counted from the
            start. The model is of no use afterwards.
        device: which kernels are assumed: some operations keep other tensors on other devices.

    Yields:
        The counter. Tensors made inside the block are fake; operations that need their data fail.
    """
    counter = LiveStorages()
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            counter.add(tensor)
        counter.peak_bytes = counter.live_bytes
        yield counter
