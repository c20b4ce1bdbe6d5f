"""Where in a run does memory run out: how does the recorder of a run that trains differ from that of a simulation?"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from sparse_zero.memory.simulation.recorder import MemoryRecorder
from sparse_zero.memory.simulation.timeline import Timeline, sort_out

# Key of the module's name in the metadata of an autograd node.
_MODULE_KEY = "sparse_zero.module"
# Nodes that are looked at on the way to one with a name.
_MOST_NODES = 100


@contextmanager
def named_nodes(model: Any) -> Iterator[None]:
    """Note at the autograd nodes of every output, while the block runs, which module of ``model`` made it."""
    names = {id(module): name for name, module in model.named_modules()}

    def note(module: Any, args: Any, output: Any) -> None:
        name = names.get(id(module))
        for leaf in tree_leaves(output) if name else ():
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                # Inner modules are called first: what they made stays theirs.
                metadata: Any = leaf.grad_fn.metadata
                metadata.setdefault(_MODULE_KEY, name)

    handle = register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _module_of_backward() -> str:
    """The module whose output the autograd node at work is, or comes after; "" where there is none."""
    node = getattr(torch._C, "_current_autograd_node", lambda: None)()
    waiting = deque([node] if node is not None else [])
    for _ in range(_MOST_NODES):
        if not waiting:
            break
        node = waiting.popleft()
        if _MODULE_KEY in node.metadata:
            return str(node.metadata[_MODULE_KEY])
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(said in str(error) for said in ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"))
    )


class RunRecorder(MemoryRecorder):
    """Notes where memory ran out, too."""

    def __init__(self) -> None:
        super().__init__()
        # Events before the operation that failed, the innermost module at work, and the operation.
        self.failed: tuple[int, str, str] | None = None
        # Parts before this one are of the first optimizer step, in which there are no states of the optimizer yet.
        self._first_usual = 0

    def end_first_step(self) -> None:
        """Once there are later ones, forward and backward before count no more."""
        self._first_usual = len(self.spans)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (RuntimeError, MemoryError) as error:
            if self.failed is None and is_out_of_memory(error):
                self.failed = (len(self._modules), self._module() or _module_of_backward(), str(func))
            raise

    def timeline(self, head: str | None = None) -> Timeline:
        """What was recorded until now. Other threads, which write checkpoints, may release storages meanwhile."""
        modules = list(self._modules)
        storages = [dataclasses.replace(each) for each in self.storages if each.born < len(modules)]
        for each in storages:
            if each.died is not None and each.died >= len(modules):
                each.died = None
        sort_out(storages, self.spans, head)
        later = {span.phase for span in self.spans[self._first_usual :]}
        spans = [
            span
            for number, span in enumerate(self.spans)
            if number >= self._first_usual or span.phase not in {"forward", "backward"} & later
        ]
        return Timeline(storages, spans, modules)
