"""What do scores read off a running model: region sums of gradients, gradients, norms of channels?

``Y = X W^T`` gives ``dW = dY^T X``, so whoever sees X and dY needs neither W nor autograd on it: a linear is observed
by hooks on its output, which work on frozen, sharded and 4-bit weights alike. The sum of dW over a region is linear
in it and needs no dW:

    block (i, j)   sum_t (sum over strip i of dY[t]) * (sum over strip j of X[t])
    row r          sum_t dY[t, r] * (sum of X[t])
    column c       sum_t (sum of dY[t]) * X[t, c]

Any other parameter (embeddings, tied heads, experts in one tensor) has its dense gradient formed by autograd, and read
and freed by a hook as soon as it is complete.

Sums run in two stages: along the features in fp32, which makes no wide copy of X or dY, and over the tokens, where they
may cancel, in fp64.

Legend: T = tokens of the micro-batch, F = features, O = out features, I = in features.
"""

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.module_map import Matrix, parameter_shape
from sparse_zero.selection.accumulators import Accumulators
from sparse_zero.selection.candidates import Candidates, strip_sums
from sparse_zero.selection.config import Kind
from sparse_zero.selection.scores import ScoreRule, checked_scores, generator_for

Side = Literal["input_norm", "output_norm"]
SIDES: tuple[Side, ...] = ("input_norm", "output_norm")
# Features that are summed in fp32 where no blocks say how many.
_STRIP = 64
# Tokens whose squares, which cannot cancel, are summed in fp32 before the sum goes on in fp64.
_GROUP_TOKENS = 64
# Elements that are copied to fp64 at once: on a CPU as many as its cache holds, else 128 MiB.
_CPU_PIECE = 2**17
_PIECE = 2**24


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """What the first stage of a sum runs in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_token_sums(tensor_TF: Tensor, weights_T: Tensor) -> Tensor:
    """``tensor.T @ weights`` in fp64: [F]."""
    device, features = tensor_TF.device, tensor_TF.shape[1]
    num_tokens = max(1, (_CPU_PIECE if device.type == "cpu" else _PIECE) // features)
    sums = torch.zeros(features, dtype=torch.float64, device=device)
    for weights, piece in zip(weights_T.split(num_tokens), tensor_TF.split(num_tokens), strict=True):
        sums += weights.double() @ piece.double()
    return sums


def channel_squares(tensor_TF: Tensor) -> Tensor:
    """Sum of the squares of every channel over the tokens: [F] in fp64."""
    num_tokens, features = tensor_TF.shape
    whole = num_tokens - num_tokens % _GROUP_TOKENS
    squares = tensor_TF.to(_narrow(tensor_TF.dtype)).square()
    groups = squares[:whole].reshape(whole // _GROUP_TOKENS, _GROUP_TOKENS, features).sum(1)
    return groups.sum(0, dtype=torch.float64) + squares[whole:].sum(0, dtype=torch.float64)


def peak(tensor: Tensor) -> Tensor:
    """The largest magnitude in a tensor, fp64, found without a copy; not finite if any entry is not."""
    low, high = torch.aminmax(tensor.T if tensor.dim() == 2 and tensor.stride(0) == 1 else tensor)
    return torch.maximum(-low, high).double()


class Tally:
    """What the rules of one weight read, added up over the micro-batches of this rank.

    Args:
        candidates: of one weight, whose rules read data.
        rules: by name of the score.
        parameter: that the weight lies in.
        read: the parameter's numbers, whole under ZeRO-3; where it holds codes, what they stand for.
        accumulators: for dense gradients; holds this weight if one is to be kept.
        per_step: rules that read gradients are called for every micro-batch, and what they return is added up.
        scale: of the loss, hence of all gradients.
        seed: of the rules' generators.
        owns_gradients: whether the dense gradients that it is given may be changed.
    """

    def __init__(
        self,
        candidates: Sequence[Candidates],
        rules: Mapping[str, ScoreRule],
        parameter: Tensor,
        read: Callable[[], Tensor],
        accumulators: Accumulators,
        *,
        per_step: bool,
        scale: float,
        seed: int,
        owns_gradients: bool = False,
    ) -> None:
        self.candidates: dict[Kind, Candidates] = {c.kind: c for c in candidates}
        self.rules: dict[Kind, ScoreRule] = {c.kind: rules[c.score] for c in candidates}
        self.matrix, self.slice_index = candidates[0].matrix, candidates[0].slice_index
        self.name = candidates[0].weight
        self.parameter, self._read = parameter, read
        self.per_step = per_step
        self._accumulators, self._scale, self._seed = accumulators, scale, seed
        self._owns_gradients = owns_gradients
        needs = {need for rule in self.rules.values() for need in rule.needs}
        self.sum_kinds: tuple[Kind, ...] = tuple(k for k, rule in self.rules.items() if "gradient_sums" in rule.needs)
        self.wants_gradient = "gradient" in needs
        self.sides: tuple[Side, ...] = tuple(side for side in SIDES if side in needs)
        # Kinds that are scored with every micro-batch.
        self.step_kinds: tuple[Kind, ...] = tuple(
            kind for kind, rule in self.rules.items() if per_step and rule.needs_gradient
        )
        # Sums over all micro-batches of this rank, fp64: what travels between the ranks.
        self.totals: dict[str, Tensor] = {}
        # Sums over the micro-batch that is running.
        self._step: dict[str, Tensor] = {}
        self._step_gradient: Tensor | None = None
        self._is_scored = False
        # What a rule has raised in backward, where other ranks may wait for this one: to be raised after it.
        self.failure: Exception | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of everything that ``totals`` may have, in an order that all ranks share."""
        lengths = {"input_norm": (self.matrix.shape[1],), "output_norm": (self.matrix.shape[0],)}
        shapes: dict[str, tuple[int, ...]] = {side: lengths[side] for side in self.sides}
        for kind, candidates in self.candidates.items():
            if kind in self.step_kinds:
                shapes[f"scores {kind}"] = candidates.grid
            elif kind in self.sum_kinds:
                shapes[f"sums {kind}"] = candidates.grid
        if self.sum_kinds or self.wants_gradient:
            # The largest magnitude of any gradient: 0 if none came by.
            shapes["peak"] = ()
        return shapes

    def _add(self, totals: dict[str, Tensor], name: str, part: Tensor) -> None:
        # A copy at first: siblings share what is computed of their input.
        totals[name] = totals[name].add_(part) if name in totals else part.to(torch.float64, copy=True)

    def _meet(self, part: Tensor) -> None:
        """A gradient, or its sums over regions, came by."""
        found, before = peak(part), self.totals.get("peak")
        self.totals["peak"] = found if before is None else torch.maximum(before, found)

    def add_squares(self, side: Side, squares: Tensor) -> None:
        """Add the channels' sums of squares over the tokens of one forward of the running micro-batch."""
        self._add(self._step, side, squares)

    def add_sums(self, kind: Kind, sums: Tensor) -> None:
        """Add (a part of) the running micro-batch's gradient, summed over the regions of a kind."""
        self._meet(sums)
        self._add(self._step if self.per_step else self.totals, f"sums {kind}", sums)

    def add_gradient(self, gradient_OI: Tensor) -> None:
        """Add (a part of) the running micro-batch's gradient."""
        self._meet(gradient_OI)
        if not self.per_step:
            self._accumulators.add(self.name, gradient_OI)
        elif self._step_gradient is None:
            self._step_gradient = gradient_OI
        else:
            self._step_gradient = self._step_gradient + gradient_OI

    def score_step(self) -> None:
        """The gradient of the running micro-batch is complete: score it, if that is due, and drop it."""
        if not self.step_kinds or self.failure is not None:
            return
        try:
            self._score_step()
        except Exception as error:  # Whatever a rule raises.
            self.failure = error

    def _score_step(self) -> None:
        if self._is_scored:
            raise InputError(
                f"the gradient of {self.name} came in parts, so that selection.accumulate: per_step cannot score it: "
                "use accumulate: sum, or gradient checkpointing with use_reentrant=False"
            )
        self._is_scored = True
        gradient, self._step_gradient = self._step_gradient, None
        device = self.parameter.device if gradient is None else gradient.device
        if gradient is not None:
            # A power of two goes back out without rounding, but for the narrow range of fp16.
            if gradient.dtype == torch.float16:
                gradient = gradient.float().div_(self._scale)
            elif self._scale != 1.0:
                gradient = gradient.div_(self._scale) if self._owns_gradients else gradient / self._scale
        elif self.wants_gradient:  # No token of this micro-batch came by.
            gradient = torch.zeros(self.matrix.shape, dtype=_narrow(self.parameter.dtype), device=device)
        for kind in self.step_kinds:
            candidates, rule = self.candidates[kind], self.rules[kind]
            given: dict[str, Any] = {}
            for side in self.sides:
                if side in rule.needs:
                    squares = self._step.get(side)
                    if squares is None:
                        squares = torch.zeros(self.shapes()[side], dtype=torch.float64, device=device)
                    given[side] = squares.sqrt()
            if "gradient_sums" in rule.needs:
                found = self._step.pop(f"sums {kind}", None)
                sums = torch.zeros(candidates.grid, dtype=torch.float64, device=device) if found is None else found
                given["gradient_sums"] = sums / self._scale
            if "gradient" in rule.needs:
                given["gradient"] = gradient
            if "weight" in rule.needs:
                given["weight"] = self.weight()
            if "generator" in rule.needs:
                given["generator"] = generator_for(candidates, self._seed)
            scores = rule.function(candidates, **given)
            if f"scores {kind}" not in self.totals:
                checked_scores(scores, candidates)
            self._add(self.totals, f"scores {kind}", scores)

    def weight(self) -> Tensor:
        """[O, I] view of the weight; whole also under ZeRO-3, in backward or inside ``compat.whole``."""
        if tuple(self.parameter.shape) != parameter_shape(self.parameter):
            raise InputError(
                f"the weight {self.name} is not at hand in backward, where ZeRO-3 holds it in shards: use "
                "selection.accumulate: sum, or zero.stage 2"
            )
        return self.matrix.view(self._read(), self.slice_index)

    def restart(self) -> None:
        """Forget the running micro-batch's forward: it runs again."""
        self._step.clear()

    def finish(self) -> None:
        """The micro-batch is over: what its tokens contribute is final."""
        if self.step_kinds and not self._is_scored:
            self.score_step()
        for side in self.sides:
            if side in self._step:
                self._add(self.totals, side, self._step[side])
        self._step.clear()
        self._step_gradient, self._is_scored = None, False


class _Kept(torch.autograd.Function):
    """A node beside the graph that saves tensors as every function does, so that gradient checkpointing drops and
    recomputes them as it does with all others."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        raise AssertionError("nothing depends on this node")


class _Begin(torch.autograd.Function):
    """Where the graph begins: the output is what it was, and requires grad, though nothing below it does."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        # Neither a leaf nor a view: the model may still change it in place.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        return None, None


class InputCache:
    """What was computed from the tensor read last: the siblings of a linear (k and v after q) read it next."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the tensor and what was computed from it."""
        self._tensor: weakref.ref[Tensor] | None = None
        self._version = -1
        self._found: dict[Hashable, Any] = {}

    def get(self, tensor: Tensor, what: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, unless that was found before for the very same, unchanged tensor."""
        if self._tensor is None or self._tensor() is not tensor or self._version != tensor._version:
            self._tensor, self._version, self._found = weakref.ref(tensor), tensor._version, {}
        if what not in self._found:
            self._found[what] = compute()
        return self._found[what]


class Pass:
    """What all observers share about the micro-batch that is running."""

    def __init__(self, *, needs_gradient: bool, trained: bool = False) -> None:
        self.needs_gradient = needs_gradient or trained
        # Whether all weights are being trained meanwhile: gradients are formed anyway, and the optimizer takes them.
        self.trained = trained
        # Whether what is seen counts. Without, everything runs alike and is forgotten.
        self.recording = True
        self.in_backward = False
        # Whether an observed module ran without autograd: as inside reentrant gradient checkpointing.
        self.met_no_grad = False
        self.inputs = InputCache()
        self._anchor = torch.zeros((), requires_grad=True)
        # [B, L] bool: which positions are no padding; None where all count.
        self._attended: Tensor | None = None

    def begin(self, batch: Any, *, recording: bool) -> None:
        """A micro-batch starts."""
        self.recording, self.in_backward, self.met_no_grad = recording, False, False
        self.inputs.clear()
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._attended = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all()):
            self._attended = mask != 0

    def starting(self, output: Tensor) -> Tensor:
        """``output``, which does not require grad, as the beginning of the graph."""
        begun: Tensor = _Begin.apply(self._anchor, output.detach())
        return begun

    def keep(self, tensors: Sequence[Tensor]) -> Any:
        """A node whose ``saved_tensors`` are these, to be read once, in backward."""
        return _Kept.apply(self._anchor, *tensors).grad_fn

    def squares(self, tensor: Tensor) -> Tensor:
        """[F] fp64 sums of squares over the positions that are no padding."""
        if self._attended is None or self._attended.shape != tensor.shape[:-1]:
            return channel_squares(tensor.reshape(-1, tensor.shape[-1]))
        return channel_squares(tensor[self._attended.to(tensor.device)])


def _hookable(output: Tensor) -> Tensor:
    """``output``, or the tensor that it shows in another shape: a hook on a view is lost when the view is changed in
    place, and a linear with a bias returns one."""
    base = output._base
    if base is None or not base.requires_grad or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base if base.shape[-1] == output.shape[-1] and base.numel() == output.numel() else output


class ProductObserver:
    """Hooks on a module that computes ``Y = X W^T (+ b)``; its weight is neither read nor given a gradient."""

    def __init__(self, module: nn.Module, tally: Tally, running: Pass) -> None:
        self.module, self.tally, self._pass = module, tally, running
        self._needs_gradient = bool(tally.sum_kinds) or tally.wants_gradient
        self._entered: Tensor | None = None
        # Forwards of the running micro-batch whose gradient has not come yet.
        self._num_open = 0

    def install(self, stack: ExitStack) -> None:
        """Hook the module until ``stack`` is closed. Before all other hooks: those of ZeRO-3 give every module a tensor
        of its own, and fetch the weight in backward on what these see."""
        entering = self.module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        stack.callback(entering.remove)
        stack.callback(self.module.register_forward_hook(self._leave, prepend=True).remove)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = args[0] if args else next(iter(kwargs.values()))

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        x, self._entered = self._entered, None
        assert x is not None
        running = self._pass
        if not running.in_backward:  # Where a forward is recomputed in backward, its tokens were counted before.
            self._count_squares(x.detach(), output.detach())
            self._num_open += 1
        if not self._needs_gradient:
            return None
        if not torch.is_grad_enabled():
            running.met_no_grad = running.met_no_grad or not running.in_backward
            return None
        begun = None if output.requires_grad else running.starting(output)
        output = output if begun is None else begun
        received = partial(self._receive, [running.keep(self._kept(x, output.dtype))])
        _hookable(output).register_hook(received)
        return begun

    def _count_squares(self, x: Tensor, output: Tensor) -> None:
        running = self._pass
        if running.recording:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if "input_norm" in self.tally.sides:
                    squares = running.inputs.get(x, "squares", lambda: running.squares(x))
                    self.tally.add_squares("input_norm", squares)
                if "output_norm" in self.tally.sides:
                    self.tally.add_squares("output_norm", running.squares(output))

    def _kept(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What backward needs of the input: strip sums for blocks, totals for rows, itself for columns and dW."""
        tally, cache = self.tally, self._pass.inputs
        x_TI = x.detach().reshape(-1, x.shape[-1])
        kept = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if {"block", "row"} & set(tally.sum_kinds):
                width = tally.candidates["block"].block_shape[1] if "block" in tally.sum_kinds else _STRIP
                strips = cache.get(x, ("strips", width), lambda: strip_sums(x_TI, width, _narrow(x_TI.dtype)))
                if "block" in tally.sum_kinds:
                    kept.append(strips)
                if "row" in tally.sum_kinds:
                    kept.append(cache.get(x, ("totals", width), lambda: strips.sum(1, dtype=torch.float64)))
            if "column" in tally.sum_kinds or tally.wants_gradient:
                # In the dtype that the product was computed in, as autograd would keep it.
                kept.append(cache.get(x, dtype, lambda: x_TI.to(dtype)))
        return kept

    def _receive(self, nodes: list[Any], dy: Tensor) -> None:
        if not nodes:
            return
        # Read also where nothing is recorded: it is what makes gradient checkpointing recompute at the same place.
        kept = list(nodes.pop().saved_tensors)
        if not self._pass.recording:
            return
        tally = self.tally
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            dy_TO = dy.detach().reshape(-1, dy.shape[-1])
            strips = None
            if {"block", "column"} & set(tally.sum_kinds):
                height = tally.candidates["block"].block_shape[0] if "block" in tally.sum_kinds else _STRIP
                strips = strip_sums(dy_TO, height, _narrow(dy_TO.dtype)).double()
            if strips is not None and "block" in tally.sum_kinds:
                tally.add_sums("block", strips.T @ kept.pop(0).double())
            if "row" in tally.sum_kinds:
                tally.add_sums("row", weighted_token_sums(dy_TO, kept.pop(0)))
            if strips is not None and "column" in tally.sum_kinds:
                tally.add_sums("column", weighted_token_sums(kept[0], strips.sum(1)))
            if tally.wants_gradient:
                tally.add_gradient(dy_TO.T @ kept[0])
            self._num_open -= 1
            if self._num_open == 0:
                tally.score_step()

    def restart(self) -> None:
        """The running micro-batch's forward runs again."""
        self._num_open = 0
        self.tally.restart()

    def finish(self) -> None:
        """The micro-batch is over."""
        self._entered, self._num_open = None, 0
        if self._pass.recording:
            self.tally.finish()


class ParameterObserver:
    """A hook on a parameter that autograd forms the dense gradient of; it is read and freed when it is complete."""

    def __init__(
        self, parameter: nn.Parameter, owners: Sequence[nn.Module], tallies: Sequence[Tally], running: Pass
    ) -> None:
        if not parameter.is_floating_point():
            raise InputError(
                f"{tallies[0].name} holds {parameter.dtype} codes, which have no gradient: leave it out of "
                "selection.regions.modules, or load the base in full precision"
            )
        self.parameter, self._owners, self._tallies, self._pass = parameter, owners, tallies, running
        # Forwards of its owners in the running micro-batch.
        self._num_uses = 0

    def install(self, stack: ExitStack) -> None:
        """Hook the parameter until ``stack`` is closed; that it requires grad is for the caller to undo."""
        self.parameter.requires_grad_(True)
        if self._pass.trained:
            # Before it is accumulated, whole also where ZeRO takes it away right after.
            stack.callback(self.parameter.register_hook(self._look_at).remove)
        else:
            stack.callback(self.parameter.register_post_accumulate_grad_hook(self._receive).remove)
        for owner in self._owners:
            stack.callback(owner.register_forward_hook(self._leave).remove)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        running = self._pass
        if not running.in_backward:
            self._num_uses += 1
            running.met_no_grad = running.met_no_grad or not torch.is_grad_enabled()

    def _receive(self, parameter: Tensor) -> None:
        # Used twice, as a tied head is, reentrant checkpointing may bring the gradient in parts: autograd adds them up.
        if self._num_uses <= 1 or not self._tallies[0].per_step:
            self._read()

    def _look_at(self, gradient: Tensor) -> None:
        # Nothing may keep it, or change it: it is the optimizer's.
        self._tell(gradient.detach())

    def _read(self) -> None:
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is not None:
            self._tell(gradient)

    def _tell(self, gradient: Tensor) -> None:
        if not self._pass.recording:
            return
        stored = gradient.to_dense() if gradient.is_sparse else gradient
        with torch.no_grad(), torch.autocast(stored.device.type, enabled=False):
            for tally in self._tallies:
                gradient_OI = tally.matrix.view(stored, tally.slice_index)
                for kind in tally.sum_kinds:
                    tally.add_sums(kind, tally.candidates[kind].sums(gradient_OI))
                if tally.wants_gradient:
                    tally.add_gradient(gradient_OI)
                tally.score_step()

    def restart(self) -> None:
        """The running micro-batch's forward runs again."""
        self._num_uses = 0

    def finish(self) -> None:
        """The micro-batch is over."""
        if not self._pass.trained:
            self._read()
        self._num_uses = 0
        if self._pass.recording:
            for tally in self._tallies:
                tally.finish()


Observer = ProductObserver | ParameterObserver


def observe(model: nn.Module, tallies: Sequence[Tally], running: Pass, stack: ExitStack) -> list[Observer]:
    """Hooks for all tallies, until ``stack`` is closed.

    Raises:
        InputError: a parameter without a gradient.
    """
    of_matrix: dict[Matrix, list[Tally]] = {}
    for tally in tallies:
        of_matrix.setdefault(tally.matrix, []).append(tally)
    observers: list[Observer] = []
    for matrix, group in of_matrix.items():
        owners = [model.get_submodule(name) for name, _ in matrix.owners]
        # Where autograd forms the gradient anyway, the product of X and dY need not be computed a second time.
        is_formed = running.trained and group[0].wants_gradient and not group[0].sides
        if matrix.is_product and not is_formed:
            observers.append(ProductObserver(owners[0], group[0], running))
        else:
            parameter = group[0].parameter
            assert isinstance(parameter, nn.Parameter)
            observers.append(ParameterObserver(parameter, owners, group, running))
    for observer in observers:
        observer.install(stack)
    return observers


def begin_everywhere(model: nn.Module, running: Pass, stack: ExitStack) -> None:
    """Have the graph begin at the lowest module that has parameters, instead of the lowest one that is scored.

    Reentrant gradient checkpointing passes no gradient to what it wraps unless one of its inputs requires one.
    """

    def begin(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        plain = isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad
        return running.starting(output) if plain and torch.is_grad_enabled() else None

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            stack.callback(module.register_forward_hook(begin, prepend=True).remove)
