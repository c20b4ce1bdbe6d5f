"""How does what a forward saves for backward not keep a gathered parameter alive?

Under ZeRO-3 a parameter is gathered for a forward, given back, and gathered again for backward. An operation that
saves the parameter itself goes along with that, for its memory is exchanged under it. One that saves a view of it (what
is read through values, a transposed or sliced weight) would keep all of the gathered memory. So what lies there is
saved as a note, of which parameter and which part of it, and read again from what is gathered in backward. Of a copy
with values added (delta) the note makes the copy again.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_zero.zero import compat


class SharedCopy:
    """A tensor that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self.made: Tensor | None = None

    def get(self) -> Tensor:
        """The one tensor that all get, until it is dropped."""
        if self.made is None:
            self.made = self._make()
        return self.made

    def drop(self) -> None:
        """Let it go; who asks again gets one that is made anew."""
        self.made = None


class _Note(NamedTuple):
    """Where a saved tensor is found again."""

    # Gives the whole parameter, or the copy of it.
    source: Callable[[], Tensor]
    # Of the saved tensor; ``offset`` in entries from the beginning of the whole.
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _note(saved: Tensor, whole: Tensor, source: Callable[[], Tensor]) -> _Note | None:
    """How to find ``saved`` again, if it is a part of ``whole``."""
    if saved.dtype != whole.dtype or not compat.shares_storage(saved, whole):
        return None
    offset = int(saved.storage_offset()) - int(whole.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(saved.shape, saved.stride(), strict=True))
    # A storage may be shared with other parameters.
    inside = saved.numel() > 0 and offset >= 0 and offset + reach < whole.numel()
    return _Note(source, saved.shape, saved.stride(), offset) if inside else None


def _read(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    whole = packed.source()
    return whole.as_strided(packed.size, packed.stride, whole.storage_offset() + packed.offset)


@contextmanager
def saved_as_notes(owner: nn.Module, own: Collection[nn.Module], copies: Sequence[SharedCopy]) -> Iterator[None]:
    """Let what operations in the block save of the owner's sharded parameters, or of ``copies``, be notes.

    Numbers are the same without it, and so it is left out where it cannot be had: inside other hooks on saved tensors
    (gradient checkpointing drops what is saved anyway), and around modules inside the owner that have parameters of
    their own, which save them as ZeRO-3 wants.

    Args:
        owner: the module whose forward the block runs.
        own: children that only hold its values.
        copies: that the block may make.
    """
    sharded = [each for each in owner._parameters.values() if each is not None and compat.is_sharded(each)]
    inner = (each for child in owner.children() if child not in own for each in child.parameters())
    if not sharded or not torch.is_grad_enabled() or next(inner, None) is not None or compat.has_saved_tensor_hooks():
        yield
        return

    def pack(saved: Tensor) -> Any:
        for copy in copies:
            if copy.made is not None and (note := _note(saved, copy.made, copy.get)):
                return note
        for parameter in sharded:
            if compat.is_available(parameter) and (
                note := _note(saved, parameter.data, partial(compat.fetch, parameter))
            ):
                return note
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, _read):
        yield
