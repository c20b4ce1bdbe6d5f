"""How is the loss formed while only some positions' logits exist at once?

For the time of one forward pass of a model, its output head computes the loss instead of the logits: inside of its own
call, where hooks of DeepSpeed have gathered its weights. For a chunk of positions it forms logits, loss, and at once
the gradients of the hidden states and of what is trained of the head; then comes the next chunk. So backward needs
neither logits nor weights, and no product is computed twice. The idea is that of Liger-Kernel's fused linear
cross-entropy (arXiv 2410.10989, section 3.2); here the head may be any module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.data import IGNORED
from sparse_zero.layers.sparse_parameter import reads_values

# Families whose logits are what the head gives, and nothing done to it: no factor, no capping. A test runs each.
PLAIN_HEADS = frozenset(
    {
        "bloom",
        "gemma",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
    }
)
# Gradients of logits lie in [-1, 1], and most of them are far smaller than what fp16 can tell from zero; entries of
# hidden states' gradients grow with it, and overflow at 65504.
_FP16_FACTOR = 1024.0


class LossChunkWarning(UserWarning):
    """The loss of a run is formed at once, though its config asks for chunks; the message says why."""


def bare(model: Any) -> Any:
    """The model of transformers in an engine, or the model itself."""
    return model.module if isinstance(getattr(model, "module", None), nn.Module) else model


def why_at_once(model: Any) -> str | None:
    """Why the loss of ``model`` cannot be formed in chunks; None if it can.

    Args:
        model: a causal LM of transformers, plain or sparse, or an engine over one.
    """
    model = bare(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in PLAIN_HEADS:
        return f"model type {kind!r} is not known to use the output of its head as it is"
    head = model.get_output_embeddings()
    # Each chunk would form the gradient of all of it: of a tied head of which entries are trained, too.
    weight = head._parameters.get("weight")
    if reads_values(head) or (weight is not None and weight.requires_grad):
        return "the gradient of a whole parameter of the head is formed"
    return None


def warn_of_chunks(model: Any, chunk: int | None) -> None:
    """Warn where ``training.loss_chunk`` asks for what a sparse model cannot have."""
    reason = None if chunk is None else why_at_once(model)
    if reason is not None:
        warnings.warn(
            f"training.loss_chunk is {chunk}, but the loss is formed at once: {reason}; null says the same",
            LossChunkWarning,
            stacklevel=3,
        )


def _nll_and_gradients(
    logits_of: Callable[[Tensor], Tensor], hidden_CH: Tensor, targets_C: Tensor, inputs: list[Tensor], factor: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Summed loss of a chunk, and the gradients of ``inputs``, ``factor`` times as large."""
    with torch.set_grad_enabled(bool(inputs)):
        logits_CV = logits_of(hidden_CH)
    log_CV = torch.log_softmax(logits_CV.detach().float(), -1)
    is_known_C = targets_C != IGNORED
    at_C1 = targets_C.clamp(min=0)[:, None]
    nll = -log_CV.gather(1, at_C1).squeeze(1).masked_fill(~is_known_C, 0.0).sum()
    if not inputs:
        return nll, ()
    # softmax - one-hot, and nothing where there is no label; in the memory of the logarithms.
    d_logits_CV = log_CV.exp_()
    d_logits_CV.scatter_add_(1, at_C1, torch.full_like(at_C1, -1, dtype=torch.float32))
    d_logits_CV.mul_((is_known_C * factor)[:, None])
    return nll, torch.autograd.grad(logits_CV, inputs, d_logits_CV.to(logits_CV.dtype))


class _ChunkedNll(torch.autograd.Function):
    """Summed loss of hidden states under a head, whose gradients are there when forward is done."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        chunk: int,
        hidden_NH: Tensor,
        targets_N: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        wants_hidden = hidden_NH.requires_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        d_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        # Sums over chunks: in fp32, whatever the values are in.
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in trained]
        factor = _FP16_FACTOR if hidden_NH.dtype == torch.float16 else 1.0
        for first in range(0, len(targets_N), chunk):
            hidden_CH = hidden_NH[first : first + chunk].detach().requires_grad_(wants_hidden)
            inputs = [*([hidden_CH] if wants_hidden else []), *trained]
            nll, found = _nll_and_gradients(logits_of, hidden_CH, targets_N[first : first + chunk], inputs, factor)
            total += nll
            if d_hidden_NH is not None:
                d_hidden_NH[first : first + chunk] = found[0]
            for each, gradient in zip(sums, found[wants_hidden:], strict=True):
                each += gradient
            del found
        ctx.factor, ctx.dtypes = factor, [each.dtype for each in trained]
        ctx.save_for_backward(d_hidden_NH, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        d_hidden_NH, *sums = ctx.saved_tensors
        scale = gradient.float() / ctx.factor
        # The product in fp32: a scale that is rounded to bf16 would move all gradients by the same 0.2%.
        d_hidden_NH = None if d_hidden_NH is None else (d_hidden_NH.float() * scale).to(d_hidden_NH.dtype)
        own = [(each * scale).to(dtype) for each, dtype in zip(sums, ctx.dtypes, strict=True)]
        return None, None, d_hidden_NH, None, *own


def chunked_nll(
    logits_of: Callable[[Tensor], Tensor], hidden_NH: Tensor, targets_N: Tensor, chunk: int, trained: list[nn.Parameter]
) -> Tensor:
    """Summed negative log-likelihood, in fp32, of which ``chunk`` positions' logits exist at once.

    Args:
        logits_of: from hidden states [C, H] to logits [C, V]; it keeps no state that a second call would change.
        hidden_NH: [N, H], fp32, bf16 or fp16.
        targets_N: [N] int64, -100 where nothing is learned.
        chunk: positions; the last chunk may have fewer.
        trained: what requires grad of ``logits_of``.

    Returns:
        Scalar; its gradients are those of the loss of all logits at once, rounded to the dtype of the hidden states.
    """
    learned = trained if torch.is_grad_enabled() else []
    total: Tensor = _ChunkedNll.apply(logits_of, chunk, hidden_NH, targets_N, *learned)
    return total


@contextmanager
def loss_in_head(model: Any, loss_of: Callable[[Any, Any, Tensor], Tensor]) -> Iterator[None]:
    """In the block, ``model(...).logits`` is a tuple of one: the loss, computed inside of the head's call.

    A tuple, since a model that did anything else to its logits would fail on it, and never train on something wrong.

    Args:
        model: with a head of its own, see :func:`why_at_once`; or an engine over it.
        loss_of: from the head, its own forward, and hidden states [B, K, H], to the loss.
    """
    head = bare(model).get_output_embeddings()
    own = head.forward
    before = vars(head).get("forward")

    def forward(hidden_BKH: Tensor) -> tuple[Tensor]:
        return (loss_of(head, own, hidden_BKH),)

    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
