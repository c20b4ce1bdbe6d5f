"""What is the training loss of a micro-batch, without computing logits that no label reads?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.data import IGNORED


def response_nll(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed negative log-likelihood of the response tokens, in fp32.

    Logits are formed only at positions that predict a label in some row, so a long prompt costs no head.

    Args:
        model: a causal LM of transformers, or an engine over one.
        batch: from :mod:`models.collate`; ``labels`` [B, L] with -100 where nothing is learned.

    Returns:
        Scalar; zero (but connected to the graph) when no position has a label.
    """
    targets_BL = batch["labels"][:, 1:]
    positions_K = (targets_BL != IGNORED).any(0).nonzero().squeeze(1)
    if not len(positions_K):
        positions_K = targets_BL.new_zeros(1)
    return nll_at(model, batch, positions_K)


def nll_at(model: Any, batch: Mapping[str, Tensor], positions_K: Tensor) -> Tensor:
    """:func:`response_nll` with the logits of ``positions_K`` [K] int64, which predict the labels behind them."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets_BL = batch["labels"][:, 1:]
    # Packed samples are kept apart only without a cache.
    logits_BKV = model(**inputs, logits_to_keep=positions_K, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BKV.float().flatten(0, 1),
        targets_BL[:, positions_K].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
