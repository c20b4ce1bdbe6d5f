"""What does a sparse model look like to those who score it: plain, with everything that acts in its weights?"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparse_zero.layers.carriers import Carrier, carriers
from sparse_zero.layers.merge import fold, hooked_first, remove, restore
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import replace_module
from sparse_zero.zero import compat


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Take the values out of ``model`` while the block runs; its weights stay as they are.

    The modules are plain then, so that names, classes and the number of parameters are those of the base.
    """
    found = hooked_first(model)
    try:
        for name, carrier in found:
            remove(model, name, carrier)
        yield
    finally:
        for name, carrier in reversed(found):
            if isinstance(carrier, SparseLinear):
                replace_module(model, name, carrier)
            else:
                parent, _, last = name.rpartition(".")
                model.get_submodule(parent).add_module(last, carrier)
                carrier.attach()


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[None]:
    """Have what acts stand in the weights while the block runs, rounded once to their dtype. Collective if sharded."""
    # Inplace it stands there already.
    found = [carrier for _, carrier in carriers(model) if carrier.placement == "delta"]
    with ExitStack() as undo:
        for carrier in found:
            undo.callback(_change, carrier, restore)
            _change(carrier, fold)
        yield


@torch.no_grad()
def _change(carrier: Carrier, how: Callable[[Carrier], None]) -> None:
    """Let ``how`` write into the carrier's parameter, which it finds whole, like the values."""
    with ExitStack() as gathered:
        for values in carrier.values().values():
            gathered.enter_context(compat.whole(values))
        gathered.enter_context(compat.whole(carrier.parameter, writes=True))
        how(carrier)


@contextmanager
def _suspended(model: nn.Module) -> Iterator[None]:
    """Have every sparse linear act as the plain one of its weight while the block runs."""
    found = [carrier for _, carrier in carriers(model) if isinstance(carrier, SparseLinear)]
    try:
        for carrier in found:
            carrier.suspended = True
        yield
    finally:
        for carrier in found:
            carrier.suspended = False


@contextmanager
def plain(engine: Any) -> Iterator[nn.Module]:
    """The engine's model with its effective weights, for forward and backward passes outside the engine. Collective.

    Up to stage 2 its modules are those of the base. At stage 3 DeepSpeed's hooks, which gather the weights, are on the
    sparse linears: these stay, and act as plain ones. Afterwards everything is as it was, bit for bit.
    """
    model: nn.Module = engine.module
    sharded = compat.has_shards(model)
    compat.release_gathered(engine)
    with effective_weights(model), _suspended(model) if sharded else without_values(model):
        try:
            yield model
        finally:
            compat.release_gathered(engine)
