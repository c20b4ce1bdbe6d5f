"""How does a model in shards answer before and after its training, when no training engine fetches its weights?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from sparse_zero.layers.frozen_linear import freeze_linears
from sparse_zero.zero import compat
from sparse_zero.zero.defaults import with_defaults
from sparse_zero.zero.unsupported import check_settings_not_split

# What of a run's config an engine without an optimizer has no use for.
_OF_TRAINING = ("optimizer", "scheduler")
_OF_TRAINING_IN_ZERO = ("offload_optimizer", "zenflow")


@contextmanager
def sharded_forward(model: nn.Module, config: Mapping[str, Any]) -> Iterator[None]:
    """Let forward and backward of ``model`` fetch the weights that ZeRO-3 holds in shards, while the block runs.

    Collective, as is every forward and backward in the block: all ranks make the same number of them. Nothing is
    trained: weights stay as they are, and the gradients of what requires one are the caller's. A model without shards
    is left alone. Afterwards the model has no hooks of DeepSpeed any more, and every weight lies in shards.

    Args:
        model: with all of its parameters in shards, or none; values that are not are sharded, too.
        config: DeepSpeed's, of stage 3, with the same defaults as for training; what it says of an optimizer is not
            read.
    """
    if not compat.has_shards(model):
        yield
        return
    check_settings_not_split(config)
    import deepspeed

    section = {name: value for name, value in config["zero_optimization"].items() if name not in _OF_TRAINING_IN_ZERO}
    settings = {name: value for name, value in config.items() if name not in _OF_TRAINING}
    settings["zero_optimization"] = with_defaults(model, section)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    try:
        # Backward comes through frozen linears when calibration reads gradients.
        freeze_linears(model)
        yield
    except BaseException:
        # A weight may be on its way: what went wrong in the block is what counts.
        with suppress(Exception):
            compat.detach_engine(engine)
        raise
    compat.detach_engine(engine)
