"""How much memory would a step of a model hold at most, found by running its real code on tensors without data?

The model is built on the meta device, made sparse there, and given fake tensors: they have shapes, dtypes and storages
of a known size, and nothing in them. A recorder sees every operation and adds up the storages that are alive.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_zero.memory.simulation.recorder import MemoryRecorder, tag_model


@contextmanager
def simulated(model: nn.Module, device: str = "cpu") -> Iterator[MemoryRecorder]:
    """Run the block on fake tensors, and count what lives.

    Args:
        model: on the meta device; its parameters and buffers become fake tensors of ``device``, counted from the
            start. The model is of no use afterwards.
        device: which kernels are assumed: some operations keep other tensors on other devices.

    Yields:
        The recorder. Tensors made inside the block are fake; operations that need their data fail.
    """
    recorder = MemoryRecorder()
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        model.to_empty(device=device)
        tag_model(recorder, model)
        recorder.peak_bytes = recorder.live_bytes
        yield recorder
