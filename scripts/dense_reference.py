"""What would plain AdamW on the dense model do that updates (and decays) some entries of it only?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def adamw_on_entries(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    loss_of: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    placement: str,
    *,
    learning_rate: float,
    decay: float,
    clip: float | None = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, and the parameters after them. Nothing of the library is in it.

    The gradients of all weights are formed, in one process; the masked entries are trained as vectors in fp32, and
    written into the weights, rounded to their dtype, after every step.

    Args:
        model: dense; changed.
        masks: bool, in the shape of each parameter that is trained in part.
        loss_of: mean loss of ``loss_of(model, batch)``.
        batches: one global batch per step.
        placement: inplace trains the entries, and decays them toward zero; delta trains what is added to them, and
            decays toward the base.
        learning_rate: of AdamW.
        decay: of AdamW.
        clip: largest norm of the gradient.
    """
    parameters = dict(model.named_parameters())
    base = {name: parameters[name].detach()[mask].float() for name, mask in masks.items()}
    trained = {
        name: nn.Parameter(torch.zeros_like(entries) if placement == "delta" else entries.clone())
        for name, entries in base.items()
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=decay)
    losses = []
    for tokens in batches:
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        for name, mask in masks.items():
            gradient = parameters[name].grad
            assert gradient is not None
            trained[name].grad = gradient[mask].float()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                entries = trained[name] + (base[name] if placement == "delta" else 0.0)
                parameters[name][mask] = entries.to(parameters[name].dtype)
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}
