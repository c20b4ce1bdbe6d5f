"""How do optimizers that look at more than one entry at a time see the values behind ZeRO's flat partitions?

ZeRO concatenates the values of a group and cuts the result into equal parts, one for each rank; what an optimizer is
given as a tensor is such a part. An update that depends on a tensor's norm or shape would then depend on the number of
ranks and the stage. The optimizers here know which entries of which values they were given, and combine what they need
over the ranks: with any number of ranks, at any stage, they compute what one process computes on the values themselves.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import collective_device
from sparse_zero.errors import InputError
from sparse_zero.zero import compat
from sparse_zero.zero.optimizer_state import fill_missing_gradients
from sparse_zero.zero.optimizers import PER_MODULE


def _key(group: Mapping[str, Any]) -> tuple[str, int | None]:
    """What tells one group from another: ZeRO replaces their tensors, and may show them one by one."""
    return group["kind"], group.get(PER_MODULE)


class _OverValues(torch.optim.Optimizer, ABC):
    """An optimizer that remembers the values of each group, whose tensors ZeRO replaces.

    Args:
        groups: each with ``kind``, its own among them, and ``params``.
        defaults: of the settings that groups may have.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__([dict(group) for group in groups], defaults)
        # Not in the groups: these are what state_dict saves.
        self._values = {_key(group): list(group["params"]) for group in groups}
        if len(self._values) < len(groups):
            kinds = ", ".join(group["kind"] for group in groups)
            raise InputError(
                f"{type(self).__name__} got several groups of one kind ({kinds}): give each kind one group"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; collective where ZeRO has partitioned the values."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Without DeepSpeed, values that no batch has reached have none: their blocks and sums belong to the step.
            fill_missing_gradients(group["params"])
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:
                continue
            for tensor in tensors:
                state = self.state[tensor]
                state["step"] = state.get("step", 0) + 1
            self._step_group(group, tensors, self._values[_key(group)])
        return loss

    @abstractmethod
    def _step_group(self, group: dict[str, Any], tensors: list[Tensor], values: list[nn.Parameter]) -> None:
        """One step of one group: its tensors that have a gradient, and its values, as they were given."""


def _add_up(tensor: Tensor, group: Any) -> None:
    """Add ``tensor`` up over the ranks, in place, also where states are offloaded to the host."""
    travelling = tensor.to(collective_device())
    dist.all_reduce(travelling, group=group)
    tensor.copy_(travelling)


class Adafactor(_OverValues):
    """Adafactor (arXiv 1804.04235) as ``torch.optim.Adafactor`` computes it for 1-D tensors, of each weight and kind.

    A flat tensor has no rows and columns to factor the second moment by: it is kept for every entry, half of AdamW's
    state. What is left of the method is the step relative to the values' root mean square (at least 1e-3 of it), and
    the bound on the root mean square of the update. Under delta the values are differences to the base, which start at
    zero: steps begin at 1e-3 of the learning rate there, whatever the weights are.

    Two sums per values are added up over the ranks in each step.
    """

    algorithm = "adafactor"
    # The constants of torch.optim.Adafactor: decay of the second moment, floors, bound on the update.
    BETA2_DECAY, SMALLEST_SCALE, CLIP = -0.8, 1e-3, 1.0

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def _step_group(self, group: dict[str, Any], tensors: list[Tensor], values: list[nn.Parameter]) -> None:
        found, process_group, is_cut = compat.pieces(values, tensors)
        updates: dict[int, Tensor] = {}
        for tensor in tensors:
            state, gradient = self.state[tensor], tensor.grad
            assert gradient is not None
            if "variance" not in state:
                state["variance"] = torch.zeros_like(gradient)
            state["variance"].lerp_(gradient.square(), state["step"] ** self.BETA2_DECAY)
            smallest = torch.finfo(tensor.dtype).eps ** 2
            updates[id(tensor)] = state["variance"].clamp(min=smallest).rsqrt_().mul_(gradient)
        # [values, 3]: entries, sum of squares of the values, of the update.
        sums = torch.zeros(len(values), 3, dtype=torch.float64, device=tensors[0].device)
        for piece in found:
            part = slice(piece.start, piece.start + piece.length)
            sums[piece.value, 0] += piece.length
            sums[piece.value, 1] += piece.tensor[part].square().sum(dtype=torch.float64)
            sums[piece.value, 2] += updates[id(piece.tensor)][part].square().sum(dtype=torch.float64)
        if is_cut:
            _add_up(sums, process_group)
        # Values of another sub-group of stage 3 have no entries here.
        means = (sums[:, 1:] / sums[:, :1].clamp(min=1)).sqrt()
        rate, step = group["lr"], self.state[tensors[0]]["step"]
        scales = means[:, 0].clamp(min=self.SMALLEST_SCALE) * min(rate, 1 / math.sqrt(step))
        scales = (scales / (means[:, 1] / self.CLIP).clamp(min=1.0)).tolist()
        for tensor in tensors:
            tensor.mul_(1 - rate * group["weight_decay"])
        for piece in found:
            part = slice(piece.start, piece.start + piece.length)
            piece.tensor[part].sub_(updates[id(piece.tensor)][part], alpha=scales[piece.value])


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, nearly: singular values in about [0.7, 1.2].

    Five steps of the quintic Newton-Schulz iteration with the constants of Jordan
    (https://kellerjordan.github.io/posts/muon/); in bf16 on a GPU, in fp32 elsewhere.

    Args:
        matrices: [N, height, width].
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class BlockMuon(_OverValues):
    """Muon whose matrices are the blocks, each orthogonalized alone; AdamW for rows, columns and vectors.

    Muon replaces the momentum of a weight's gradient by the nearest orthogonal matrix. Of a weight trained in blocks no
    whole gradient exists, so that each block is a matrix of its own. Momentum 0.95 with Nesterov's look-ahead; the rate
    is multiplied by ``0.2 * sqrt(max(height, width))``, with which AdamW's learning rate and weight decay can be kept
    (arXiv 2502.16982). ``torch.optim.Muon`` and DeepSpeed's own refuse values, which are 1-D.

    The updates of all blocks are gathered on every rank in each step, in fp32: 4 bytes per value.

    Args:
        groups: see :func:`sparse_zero.zero.optimizers.configured_groups`.
        lr: learning rate.
        betas, eps: of AdamW.
        weight_decay: decoupled, of both.
        block_shapes: by identity of the values, (height, width) of each block.
    """

    algorithm = "muon"
    MOMENTUM = 0.95

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        block_shapes: Mapping[int, list[tuple[int, int]]],
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._block_shapes = dict(block_shapes)

    def _step_group(self, group: dict[str, Any], tensors: list[Tensor], values: list[nn.Parameter]) -> None:
        for tensor in tensors:
            tensor.mul_(1 - group["lr"] * group["weight_decay"])
        if group["kind"] == "block":
            self._muon(group, tensors, values)
        else:
            for tensor in tensors:
                self._adamw(group, tensor)

    def _adamw(self, group: dict[str, Any], tensor: Tensor) -> None:
        state, gradient, (beta1, beta2) = self.state[tensor], tensor.grad, group["betas"]
        assert gradient is not None
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(gradient)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(bias2)).add_(group["eps"])
        tensor.addcdiv_(state["exp_avg"], root, value=-group["lr"] / bias1)

    def _muon(self, group: dict[str, Any], tensors: list[Tensor], values: list[nn.Parameter]) -> None:
        found, process_group, is_cut = compat.pieces(values, tensors)
        sizes = [sum(height * width for height, width in self._block_shapes[id(each)]) for each in values]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        # All blocks of the group, one value after the other.
        gathered = torch.zeros(sum(sizes), dtype=torch.float32, device=tensors[0].device)
        ahead: dict[int, Tensor] = {}
        for tensor in tensors:
            state, gradient = self.state[tensor], tensor.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            state["momentum_buffer"].lerp_(gradient, 1 - self.MOMENTUM)
            ahead[id(tensor)] = gradient.lerp(state["momentum_buffer"], self.MOMENTUM)
        for piece in found:
            at = starts[piece.value] + piece.offset
            gathered[at : at + piece.length] = ahead[id(piece.tensor)][piece.start : piece.start + piece.length]
        if is_cut:
            _add_up(gathered, process_group)
        for piece in found:
            shapes = self._block_shapes[id(values[piece.value])]
            blocks = gathered[starts[piece.value] : starts[piece.value] + sizes[piece.value]]
            update = self._of_blocks(blocks, shapes, piece.offset, piece.offset + piece.length)
            part = slice(piece.start, piece.start + piece.length)
            piece.tensor[part].sub_(update[piece.offset : piece.offset + piece.length], alpha=group["lr"])

    @staticmethod
    def _of_blocks(blocks: Tensor, shapes: list[tuple[int, int]], begin: int, end: int) -> Tensor:
        """Updates of the blocks of one value, of which those that reach into [begin, end) are computed: [entries]."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        at = 0
        for height, width in shapes:
            if at < end and at + height * width > begin:
                by_shape.setdefault((height, width), []).append(at)
            at += height * width
        update = torch.zeros_like(blocks)
        for (height, width), places in by_shape.items():
            # [N, entries of a block]
            index = torch.tensor(places, device=blocks.device)[:, None] + torch.arange(
                height * width, device=blocks.device
            )
            orthogonal = orthogonalize(blocks[index].view(-1, height, width))
            update[index] = orthogonal.flatten(1) * (0.2 * math.sqrt(max(height, width)))
        return update
