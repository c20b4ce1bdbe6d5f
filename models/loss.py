"""What is the training loss of a micro-batch, without computing logits that no label reads?"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from models import liger
from models.chunked_loss import chunked_nll, loss_in_head, why_at_once
from models.classification import classified_loss
from models.data import IGNORED


def batch_loss(model: Any, batch: Mapping[str, Tensor], *, chunk: int | None = None, fused: bool = False) -> Tensor:
    """Summed loss of a batch of :func:`models.collate.collate`: of tokens by :func:`response_nll`, or of classes."""
    if "targets" in batch:
        return classified_loss(model, batch)
    return response_nll(model, batch, chunk=chunk, fused=fused)


def batch_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """What the loss of a batch is a sum over: its response tokens, or its samples; scalar int64."""
    if "targets" in batch:
        return (~batch["targets"].isnan()).sum()
    return (batch["labels"][:, 1:] != IGNORED).sum()


def response_nll(model: Any, batch: Mapping[str, Tensor], *, chunk: int | None = None, fused: bool = False) -> Tensor:
    """Summed negative log-likelihood of the response tokens, in fp32.

    Logits are formed only at positions that predict a label in some row, so a long prompt costs no head.

    Args:
        model: a causal LM of transformers, or an engine over one.
        batch: from :mod:`models.collate`; ``labels`` [B, L] with -100 where nothing is learned.
        chunk: positions, over all rows, of which logits exist at once; None: all. All, too, where
            :func:`models.chunked_loss.why_at_once` names a reason.
        fused: by Liger's kernel where the head is a frozen linear, see :mod:`models.liger`; it chooses its own chunks.

    Returns:
        Scalar; zero (but connected to the graph) when no position has a label.
    """
    return nll_at(model, batch, label_positions(batch["labels"]), chunk=chunk, fused=fused)


def label_positions(labels_BL: Tensor) -> Tensor:
    """[K] int64: the positions that predict a label in some row; the first one, where there is none.

    Their number is read by the host. On a GPU it would wait for that; so ask before the labels are there.
    """
    targets_BL = labels_BL[:, 1:]
    positions_K = (targets_BL != IGNORED).any(0).nonzero().squeeze(1)
    return positions_K if len(positions_K) else targets_BL.new_zeros(1)


def nll_at(
    model: Any, batch: Mapping[str, Tensor], positions_K: Tensor, *, chunk: int | None = None, fused: bool = False
) -> Tensor:
    """:func:`response_nll` with the logits of ``positions_K`` [K] int64, which predict the labels behind them."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets_N = batch["labels"][:, 1:][:, positions_K].flatten()

    def logits() -> Any:
        # Packed samples are kept apart only without a cache.
        return model(**inputs, logits_to_keep=positions_K, use_cache=False).logits

    is_fused = fused and liger.why_not_fused(model) is None
    if is_fused or (chunk is not None and len(targets_N) > chunk and why_at_once(model) is None):

        def loss_of(head: Any, own: Callable[[Tensor], Tensor], hidden_BKH: Tensor) -> Tensor:
            hidden_NH = hidden_BKH.flatten(0, 1)
            if is_fused:
                return liger.fused_nll(hidden_NH, head.weight, head.bias, targets_N)
            assert chunk is not None
            trained = [each for each in head.parameters() if each.requires_grad]
            return chunked_nll(own, hidden_NH, targets_N, chunk, trained)

        with loss_in_head(model, loss_of):
            (nll,) = logits()
        return nll
    logits_BKV = logits()
    return torch.nn.functional.cross_entropy(
        logits_BKV.float().flatten(0, 1), targets_N, ignore_index=IGNORED, reduction="sum"
    )
