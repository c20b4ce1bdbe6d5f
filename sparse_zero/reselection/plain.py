"""What does a sparse model look like to those who score it: plain, with everything that acts in its weights?"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sparse_zero.layers.carriers import carriers
from sparse_zero.layers.merge import fold, hooked_first, remove, restore
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import replace_module
from sparse_zero.zero import compat


@contextmanager
def without_values(model: nn.Module, *, keep_quantized: bool = False) -> Iterator[None]:
    """Take the values out of ``model`` while the block runs; its weights stay as they are.

    The modules are plain then, so that names, classes and the number of parameters are those of the base.

    Args:
        model: a sparsified model.
        keep_quantized: whether quantized linears keep their values, which act in nothing but their product.
    """
    found = [each for each in hooked_first(model) if not (keep_quantized and each[1].has_codes)]
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
    """Have what acts stand in the weights while the block runs, rounded once to their dtype. Collective if sharded.

    Quantized weights stay as they are.
    """
    # Inplace it stands there already.
    found = [each for _, each in carriers(model) if each.placement == "delta" and not each.has_codes]
    sharded = any(compat.is_sharded(carrier.parameter) for carrier in found)
    with ExitStack() as undo:
        if sharded:
            undo.callback(compat.shards_are_written)
        for carrier in found:
            undo.callback(restore, carrier)
            fold(carrier)
        if sharded:
            compat.shards_are_written()
        yield


@contextmanager
def _suspended(model: nn.Module) -> Iterator[None]:
    """Have every parameter under values act alone while the block runs; not a quantized one."""
    found = [carrier for _, carrier in carriers(model) if not carrier.has_codes]
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

    Up to stage 2 its modules are those of the base, but for quantized linears, which keep their values to be effective.
    At stage 3 DeepSpeed's hooks, which gather the weights, are on the sparse linears: these stay, and act as plain
    ones, as hooked parameters do. Afterwards everything is as it was, bit for bit.
    """
    model: nn.Module = engine.module
    sharded = compat.has_shards(model)
    compat.release_gathered(engine)
    with effective_weights(model), _suspended(model) if sharded else without_values(model, keep_quantized=True):
        try:
            yield model
        finally:
            compat.release_gathered(engine)
