"""How are regions scored by gradients, without ever holding more than one weight's gradient?

``Y = X W^T`` gives ``dW = dY^T X``. The sum of ``dW`` over a region is linear in it and needs no ``dW``:

    block (i, j)   sum_t (sum over strip i of dY[t]) * (sum over strip j of X[t])
    row r          sum_t dY[t, r] * (sum of X[t])
    column c       sum_t (sum of dY[t]) * X[t, c]

``mean_of_abs`` is not linear: autograd forms one weight's gradient, a hook scores it and frees it.

Legend: T = tokens of the micro-batch, O = out features, I = in features, S = block size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.selection.candidates import Candidates, strip_sums
from sparse_zero.selection.config import Kind

Key = tuple[str, Kind]
FP16_LOSS_SCALE = 1024.0
LossFunction = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns when the batch contains labels."""
    loss = model(**batch).loss
    if loss is None:
        raise InputError("the model returned no loss for a calibration batch: put labels into it, or pass loss_fn")
    return loss


class _Accumulator:
    """Sums of one weight's gradient over its candidate regions, filled by hooks during backward."""

    def __init__(self, linear: nn.Linear, candidates: Sequence[Candidates]) -> None:
        self.linear = linear
        device = linear.weight.device
        self.linear_sums = {c.kind: c for c in candidates if c.score == "abs_of_mean"}
        self.absolute_sums = {c.kind: c for c in candidates if c.score == "mean_of_abs"}
        self.sums: dict[Kind, Tensor] = {
            c.kind: torch.zeros(c.grid, dtype=torch.float64, device=device) for c in candidates
        }

    def install(self, stack: ExitStack) -> None:
        stack.callback(self.linear.register_forward_pre_hook(self._require_input_gradient).remove)
        if self.linear_sums:
            stack.callback(self.linear.register_forward_hook(self._keep_input_sums).remove)
        if self.absolute_sums:
            self.linear.weight.requires_grad_(True)
            stack.callback(self.linear.weight.register_post_accumulate_grad_hook(self._score_and_free).remove)

    def _require_input_gradient(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # In the lowest scored layer nothing below needs a gradient; the graph starts here.
        if torch.is_grad_enabled() and not args[0].requires_grad:
            return (args[0].detach().requires_grad_(), *args[1:])
        return None

    def _keep_input_sums(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x_TI = args[0].detach().reshape(-1, args[0].shape[-1])
        blocks, row, column = (self.linear_sums.get(kind) for kind in ("block", "row", "column"))
        x_strips = strip_sums(x_TI, blocks.block_shape[1]) if blocks else None
        x_total = x_TI.sum(1, dtype=torch.float64) if row else None
        x_kept = x_TI if column else None

        def accumulate(grad: Tensor) -> None:
            dy_TO = grad.detach().reshape(-1, grad.shape[-1])
            if blocks is not None and x_strips is not None:
                self.sums["block"] += strip_sums(dy_TO, blocks.block_shape[0]).T @ x_strips
            if x_total is not None:
                self.sums["row"] += dy_TO.T.double() @ x_total
            if x_kept is not None:
                self.sums["column"] += dy_TO.sum(1, dtype=torch.float64) @ x_kept.double()

        output.register_hook(accumulate)

    def _score_and_free(self, weight: Tensor) -> None:
        assert weight.grad is not None
        magnitude = weight.grad.abs_()
        for kind, candidates in self.absolute_sums.items():
            self.sums[kind] += candidates.sums(magnitude)
        weight.grad = None


@contextmanager
def _only_scored_gradients(model: nn.Module) -> Any:
    """Freeze everything while calibrating, and put every flag and gradient back afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def gradient_scores(
    model: nn.Module,
    batches: Iterable[Any],
    candidates: Sequence[Candidates],
    loss_fn: LossFunction,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[Key, Tensor], int]:
    """Scores of all ``candidates`` that read gradients, equal on all ranks.

    Args:
        model: the dense model; its weights, flags and gradients are the same afterwards.
        batches: micro-batches of fixed composition. Every rank iterates over all of them and computes
            number ``i`` if ``i % world_size == rank``, so the result does not depend on the world size.
        candidates: what to score; abs_of_mean is ``|sum g| / (n * B)`` (SMT, section 3.2 of arXiv 2405.15525),
            mean_of_abs ``sum_b sum |g_b| / (n * B)`` with n entries in the region and B micro-batches.
        loss_fn: scalar loss of a micro-batch.
        on_batch: called with the index of every micro-batch that this rank has done.

    Returns:
        fp64 scores on the host in the shape of each candidate's grid, and the number of micro-batches.

    Raises:
        InputError: no micro-batch, or a non-finite loss or gradient.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_module: dict[str, list[Candidates]] = defaultdict(list)
    for candidate in candidates:
        by_module[candidate.module].append(candidate)
    accumulators: dict[str, _Accumulator] = {}
    num_batches = 0
    # The gradients of a mean loss underflow in fp16; a power of two scales them up without rounding.
    in_fp16 = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    scale = FP16_LOSS_SCALE if in_fp16 else 1.0
    with ExitStack() as stack:
        stack.enter_context(_only_scored_gradients(model))
        for module, group in by_module.items():
            linear = model.get_submodule(module)
            assert isinstance(linear, nn.Linear)
            accumulators[module] = _Accumulator(linear, group)
            accumulators[module].install(stack)
        for index, batch in enumerate(batches):
            num_batches += 1
            if index % world_size == rank:
                (loss_fn(model, batch) * scale).backward()
                if on_batch is not None:
                    on_batch(index)
    if num_batches == 0:
        raise InputError("calibration got no batches: give at least one, or a score that needs no data")
    flat = torch.cat([accumulators[c.module].sums[c.kind].reshape(-1) for c in candidates])
    if dist.is_initialized():
        dist.all_reduce(flat)
        # Every rank chooses from the very same bits, whatever order its own reduction took.
        dist.broadcast(flat, src=0)
    flat = flat.cpu()
    if not bool(torch.isfinite(flat).all()):
        raise InputError("calibration met a non-finite gradient: check the data, or use a wider dtype (model.dtype)")
    scores: dict[Key, Tensor] = {}
    offset = 0
    for candidate in candidates:
        sizes = candidate.sizes()
        sums = flat[offset : offset + sizes.numel()].reshape(sizes.shape)
        scores[candidate.weight, candidate.kind] = sums.abs() / (sizes * num_batches * scale)
        offset += sizes.numel()
    return scores, num_batches
