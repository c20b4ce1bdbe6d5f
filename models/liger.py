"""Which of Liger's Triton kernels does a run use on a GPU, and when are they refused?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.chunked_loss import bare, why_at_once
from models.data import IGNORED
from sparse_zero.errors import InputError
from sparse_zero.layers.frozen_linear import FrozenLinear
from sparse_zero.optional import require

_MODULE = "liger_kernel.transformers"
_PURPOSE = "train with training.kernels 'liger'"


def check_kernels(device: torch.device) -> None:
    """Refuse Liger's kernels where they cannot run.

    Args:
        device: that the model computes on.

    Raises:
        InputError: the device is no GPU, or the package is missing.
    """
    if device.type != "cuda":
        raise InputError(
            f"training.kernels is 'liger', whose kernels need a GPU, and this run computes on {device.type}: use torch"
        )
    require(_MODULE, extra="liger", purpose=_PURPOSE)


def use_kernels(model: Any) -> None:
    """Give a loaded model Liger's norms, MLP and rotary positions; before it is sparse. Its loss stays this package's.

    Linears stay modules that are called, so they may be swapped for sparse ones afterwards. Rotary positions are
    exchanged in the module of the family's code, for every model of it in this process: that is Liger's way.

    Args:
        model: of transformers.

    Raises:
        InputError: the package is missing, or has no kernels for this family.
    """
    kind = model.config.model_type
    patch = getattr(require(_MODULE, extra="liger", purpose=_PURPOSE), f"apply_liger_kernel_to_{kind}", None)
    if patch is None:
        raise InputError(f"training.kernels is 'liger', which has none for model type {kind!r}: use torch")
    patch(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def why_not_fused(model: Any) -> str | None:
    """Why Liger's fused head and loss cannot be used for ``model``, which holds for others only; None if it can."""
    reason = why_at_once(model)
    if reason is not None:
        return reason
    head = bare(model).get_output_embeddings()
    # Others compute something else: with values, or of codes.
    if type(head) not in (nn.Linear, FrozenLinear) or any(each.requires_grad for each in head.parameters()):
        return "the head is no frozen linear"
    return None


def fused_nll(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    """Summed negative log-likelihood under a frozen linear head, by Liger's kernel; on a GPU.

    Args:
        hidden_NH: [N, H].
        weight_VH: [V, H].
        bias_V: [V], or None.
        targets_N: [N] int64, -100 where nothing is learned.
    """
    kernels = require(_MODULE, extra="liger", purpose=_PURPOSE)
    loss = kernels.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
    found: Tensor = loss(weight_VH, hidden_NH, targets_N, bias_V)
    return found
