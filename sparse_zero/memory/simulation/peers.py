"""With which engine are full fine-tuning, LoRA and DoRA compared with a selection?

With DeepSpeed's own, under the same settings: what is left open is filled in by the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_zero.zero.defaults import with_defaults
from sparse_zero.zero.optimizers import OptimizerConfig, build_optimizer


def peer_engine(
    model: nn.Module, settings: Mapping[str, Any], optimizer: OptimizerConfig, *, offloaded: bool = False
) -> Any:
    """A DeepSpeed engine that trains what requires grad in ``model``. Collective.

    Args:
        model: without values.
        settings: DeepSpeed's config.
        optimizer: over all that is trained, in one group beside those of ``per_module``.
        offloaded: whether ZeRO keeps the states in the host's memory.
    """
    import deepspeed

    settings = {**settings, "zero_optimization": with_defaults(model, settings.get("zero_optimization") or {})}
    group = {"kind": "whole", "params": [parameter for parameter in model.parameters() if parameter.requires_grad]}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer([group], optimizer, model=model, offloaded=offloaded),
        config=settings,
    )
    return engine
