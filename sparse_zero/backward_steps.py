"""How does a plain training loop step values within backward, so that no two gradients live at once?

PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward pass" is the source of the idea.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import Carrier, carriers
from sparse_zero.layers.sparsify import parameter_groups
from sparse_zero.selection.config import Kind
from sparse_zero.zero import compat


class StepInBackward:
    """One optimizer for each values parameter, which steps in ``loss.backward()``; see :func:`step_in_backward`."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], hooks: list[Any]) -> None:
        self.optimizers = optimizers
        self._hooks = hooks

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers, for learning rates; each has the ``kind`` of its values."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def remove(self) -> None:
        """Leave gradients to the loop again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def step_in_backward(
    model: nn.Module, make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> StepInBackward:
    """Let every ``loss.backward()`` be an optimizer step too: step, write-back, gradient freed, weight by weight.

    For loops in one process without an engine: gradients of values never exist together, and the loop calls neither
    ``step`` nor ``zero_grad`` nor ``write_back``. Each backward is a step, so there is no accumulation over several;
    and nothing can be done with all gradients, such as clipping their norm, or skipping a step for one of them that is
    not finite. DeepSpeed reduces gradients after they are formed: under an engine this cannot be.

    Args:
        model: sparsified, whole, and in no engine.
        make_optimizer: from optimizer groups, of one values parameter each time, to an optimizer.

    Returns:
        The optimizers; :meth:`StepInBackward.remove` ends it.

    Raises:
        InputError: the model is an engine or in shards, there are several ranks, the model has no values, or has
            gradients that were accumulated.
    """
    if hasattr(model, "optimizer"):
        raise InputError("the model is an engine, which steps by itself: give the model before there is one")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(
            f"there are {dist.get_world_size()} ranks, and each would step by its own gradient: use initialize"
        )
    groups = {id(values): group for group in parameter_groups(model) for values in group["params"]}
    found = [
        (carrier, kind, values)
        for _, carrier in carriers(model)
        for kind, values in carrier.values().items()
        if id(values) in groups
    ]
    for carrier, _, values in found:
        if compat.is_sharded(carrier.parameter) or compat.is_sharded(values):
            raise InputError("the model is in shards of ZeRO-3, whose engine steps: use sparse_zero.initialize")
        if values.grad is not None:
            raise InputError("the values have gradients already: step with them, or call zero_grad, before")
    optimizers, hooks = [], []
    for carrier, kind, values in found:
        optimizer = make_optimizer([{**groups[id(values)], "params": [values]}])
        optimizers.append(optimizer)
        hooks.append(values.register_post_accumulate_grad_hook(partial(_step, optimizer, carrier, kind)))
    return StepInBackward(optimizers, hooks)


def _step(optimizer: torch.optim.Optimizer, carrier: Carrier, kind: Kind, values: Tensor) -> None:
    """Of one values parameter, whose gradient is complete: the node that reads its weight is done with that."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if carrier.placement == "inplace":
        carrier.set_entries(kind, values.detach())
