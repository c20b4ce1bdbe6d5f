"""How are regions scored by data, without ever holding more than one weight's gradient on the device?

Each micro-batch runs on one rank: forward, and backward down to the lowest scored matrix. Observers read what the rules
need off it (see :mod:`sparse_zero.selection.observers`). Then the sums of all ranks are added up, every weight's scores
are computed by one rank, and all get the same bits.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import check_equal_on_all_ranks, collective_device, failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.layers.quantized_linear import acting_parameter, adopted
from sparse_zero.module_map import Matrix, ModuleMap, parameter_shape
from sparse_zero.selection.accumulators import Accumulators
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import Kind, SelectionConfig
from sparse_zero.selection.observers import Observer, Pass, Tally, begin_everywhere, observe, peak
from sparse_zero.selection.scores import ScoreRule, check_reached, checked_scores, generator_for
from sparse_zero.zero.compat import has_shards, whole

Key = tuple[str, Kind]
# The gradients of a mean loss underflow where any of them is in fp16, be it by autocast. A power of two scales them up
# without rounding, and does nothing in wider dtypes.
LOSS_SCALE = 1024.0
LossFunction = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns when the batch contains labels."""
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise InputError("the model returned no loss for a calibration batch: put labels into it, or pass loss_fn")
    return loss


class BufferSnapshot:
    """A model's buffers, copied to the host: a forward may change them, as it does running statistics."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, buffer, buffer.detach().to("cpu", copy=True))
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back: the same tensors, with the same bits."""
        for module, name, buffer, kept in self._kept:
            buffer.copy_(kept)
            setattr(module, name, buffer)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze everything while calibrating, and put every flag, gradient and buffer back afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = BufferSnapshot(model)
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        buffers.restore()


@contextmanager
def own_random_state() -> Iterator[None]:
    """Leave the generators, all of which every micro-batch seeds anew, as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


class Runner:
    """Runs micro-batches through the model, and backwards as far as needed.

    Args:
        model: whatever ``loss_fn`` is to be called with.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar loss of a micro-batch.
        observation: of the candidates in the model.
        observers: that are installed for its tallies.
        stack: for hooks that turn out to be needed; closed after the last micro-batch.
        backward: from the loss.
        remedy: for a loss or gradient that is not finite.
        together: around a check between forward and backward. Where each of them is a collective, what makes a rank
            fail there, fail all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        observation: "Observation",
        observers: Sequence[Observer],
        stack: ExitStack,
        backward: Callable[[Tensor], object],
        remedy: str,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._loss_fn, self._observers, self._stack = model, loss_fn, observers, stack
        self._pass, self._tallies = observation.running, observation.tallies
        self._backward, self._remedy, self._together = backward, remedy, together
        self._begins_everywhere = False

    def _forward(self, batch: Any, seed: int, recording: bool) -> Tensor:
        self._pass.begin(batch, recording=recording)
        torch.manual_seed(seed)
        loss, failure = None, None
        try:
            with torch.set_grad_enabled(self._pass.needs_gradient):
                loss = self._loss_fn(self._model, batch)
        except InputError as error:  # Of a loss function that has looked at what the model returned.
            failure = error
        with self._together():
            if failure is not None:
                raise failure
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(
                    f"loss_fn returned {what} for a calibration micro-batch: it must return a scalar tensor"
                )
        assert loss is not None
        return loss

    def run(self, batch: Any, seed: int, *, recording: bool) -> float:
        """One micro-batch; returns its loss, which :meth:`check` is to be told.

        Args:
            batch: for the loss function.
            seed: of dropout; the same for the same micro-batch on whatever rank.
            recording: without, all runs alike, and nothing of it counts.
        """
        running = self._pass
        with warnings.catch_warnings():
            # Said by reentrant checkpointing at the first forward, and taken care of by the second one.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            loss = self._forward(batch, seed, recording)
        if running.needs_gradient and running.met_no_grad and not (running.trained or self._begins_everywhere):
            self._begins_everywhere = True
            del loss  # And its graph, before there is another one.
            begin_everywhere(self._model, running, self._stack)
            for observer in self._observers:
                observer.restart()
            loss = self._forward(batch, seed, recording)
        if running.needs_gradient:
            with self._together():
                if not loss.requires_grad:
                    raise InputError(
                        "the loss of a calibration micro-batch depends on none of the matrices in "
                        "selection.regions.modules: name matrices that the model computes its output with"
                    )
            running.in_backward = True
            self._backward(loss)
        for observer in self._observers:
            observer.finish()
        running.inputs.clear()
        return float(loss.detach())

    def check(self, index: int, loss: float) -> None:
        """Raise what was wrong with the micro-batch that has run. No rank raises it while others wait in a collective.

        Raises:
            InputError: a loss or gradient that is not finite.
            Exception: what a rule has raised.
        """
        if not math.isfinite(loss):
            raise InputError(f"calibration micro-batch {index} has the non-finite loss {loss}: {self._remedy}")
        met = [tally for tally in self._tallies if "peak" in tally.totals]
        if met:
            # Together: the device is waited for once.
            peaks = torch.stack([tally.totals["peak"].to(met[0].totals["peak"].device) for tally in met]).tolist()
            for tally, largest in zip(met, peaks, strict=True):
                if not math.isfinite(largest):
                    raise InputError(
                        f"calibration micro-batch {index} has a non-finite gradient of {tally.name}: {self._remedy}"
                    )
        for tally in self._tallies:
            failure, tally.failure = tally.failure, None
            if failure is not None:
                raise failure


def _tallies(
    candidates: Sequence[Candidates], rules: Mapping[str, ScoreRule], make: Callable[[list[Candidates]], Tally]
) -> list[Tally]:
    """One for every weight that a rule with data needs."""
    of_weight: dict[str, list[Candidates]] = {}
    for each in candidates:
        if rules[each.score].needs_data:
            of_weight.setdefault(each.weight, []).append(each)
    return [make(group) for group in of_weight.values()]


def _add_up(tallies: Sequence[Tally]) -> None:
    """Replace every total by its sum over all ranks, on the host: the same bits everywhere. Collective."""
    parts = []
    for tally in tallies:
        for name, shape in tally.shapes().items():
            found = tally.totals.get(name)
            parts.append(torch.zeros(math.prod(shape), dtype=torch.float64) if found is None else found.cpu())
    flat = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
    _agree(flat)
    offset = 0
    for tally in tallies:
        for name, shape in tally.shapes().items():
            tally.totals[name] = flat[offset : offset + math.prod(shape)].view(shape)
            offset += math.prod(shape)


def _agree(flat: Tensor) -> None:
    """Sum an fp64 host tensor over all ranks, in place, to the very same bits. Collective."""
    if dist.is_initialized() and flat.numel():
        travelling = flat.to(collective_device())
        dist.all_reduce(travelling)
        # The order of additions may differ from rank to rank; what rank 0 has counts.
        dist.broadcast(travelling, src=0)
        flat.copy_(travelling)


def _check_finite(tally: Tally, tensor: Tensor, what: str) -> None:
    if not math.isfinite(float(peak(tensor))):
        raise InputError(
            f"calibration met a non-finite {what} of {tally.name}: check the data, or use a wider dtype (model.dtype)"
        )


def _final_scores(
    tally: Tally, gradient: Tensor | None, num_batches: int, scale: float, seed: int
) -> dict[Kind, Tensor]:
    """Scores of one weight's regions; its parameter is whole if a rule reads the weight."""
    found: dict[Kind, Tensor] = {}
    device = torch.device("cpu")
    for kind, rule in tally.rules.items():
        candidates = tally.candidates[kind]
        if kind in tally.step_kinds:
            found[kind] = checked_scores(tally.totals[f"scores {kind}"] / num_batches, candidates)
            continue
        given: dict[str, Any] = {}
        if "weight" in rule.needs:
            given["weight"] = tally.weight()
            # A gradient is as large as the weight: the weight goes to it. Everything else is small.
            device = given["weight"].device if gradient is None else device
            given["weight"] = given["weight"].to(device)
        for side in tally.sides:
            if side in rule.needs:
                given[side] = tally.totals[side].sqrt().to(device)
        if "gradient_sums" in rule.needs:
            given["gradient_sums"] = (tally.totals[f"sums {kind}"] / (num_batches * scale)).to(device)
        if "gradient" in rule.needs:
            given["gradient"] = gradient
        if "generator" in rule.needs:
            given["generator"] = generator_for(candidates, seed)
        found[kind] = checked_scores(rule.function(candidates, **given), candidates)
    return found


def _at_hand(parameter: Tensor) -> AbstractContextManager[None]:
    """Have all of a parameter. The last backward may have left it gathered, on all ranks alike."""
    return nullcontext() if tuple(parameter.shape) == parameter_shape(parameter) else whole(parameter)


def _score_all(
    tallies: Sequence[Tally], accumulators: Accumulators, num_batches: int, scale: float, seed: int
) -> dict[Key, Tensor]:
    """Scores of all weights, each computed by one rank, in turn; equal bits on all. Collective."""
    rank, world_size = rank_and_world_size()
    keys = {(tally.name, kind): tally.candidates[kind].grid for tally in tallies for kind in tally.rules}
    flat = torch.zeros(sum(math.prod(grid) for grid in keys.values()), dtype=torch.float64)
    pieces = flat.split([math.prod(grid) for grid in keys.values()])
    scores = {key: piece.view(grid) for (key, grid), piece in zip(keys.items(), pieces, strict=True)}
    failure: Exception | None = None
    of_parameter: dict[Matrix, list[tuple[int, Tally]]] = {}
    for number, tally in enumerate(tallies):
        of_parameter.setdefault(tally.matrix, []).append((number, tally))
    for group in of_parameter.values():
        reads_weight = any("weight" in rule.needs for _, tally in group for rule in tally.rules.values())
        with _at_hand(group[0][1].parameter) if reads_weight else nullcontext():
            for number, tally in group:
                owner = number % world_size
                gradient = accumulators.take(tally.name, owner) if tally.name in accumulators else None
                if rank != owner or failure is not None:
                    continue
                try:
                    if gradient is not None:
                        _check_finite(tally, gradient.div_(num_batches * scale), "gradient")
                    for kind, found in _final_scores(tally, gradient, num_batches, scale, seed).items():
                        scores[tally.name, kind].copy_(found)
                except Exception as error:  # Whatever a rule raises; the other ranks wait in the next collective.
                    failure = error
    with failing_together():
        if failure is not None:
            raise failure
    _agree(flat)
    return scores


def _run_all(
    runner: Runner,
    batches: Iterable[Any],
    *,
    sharded: bool,
    seed: int,
    on_batch: Callable[[int], None] | None,
) -> int:
    """Run this rank's share of the micro-batches; returns the number of all."""
    rank, world_size = rank_and_world_size()
    num_batches = 0

    def own() -> Iterator[tuple[int, Any, bool]]:
        nonlocal num_batches
        batch = None
        for batch in batches:
            num_batches += 1
            if (num_batches - 1) % world_size == rank:
                yield num_batches - 1, batch, True
        # Sharded weights are fetched by all ranks together: those without a micro-batch in the last round take part.
        if sharded and rank >= num_batches % world_size > 0:
            yield num_batches - 1, batch, False

    # A rank that fails tells the others at the end; where each forward is a collective, before and after every one.
    together = failing_together if sharded else nullcontext
    own_share = own()
    with nullcontext() if sharded else failing_together():
        while True:
            with together():
                step = next(own_share, None)
            if step is None:
                break
            index, batch, recording = step
            loss = runner.run(batch, seed + index, recording=recording)
            with together():
                if recording:
                    runner.check(index, loss)
                    if on_batch is not None:
                        on_batch(index)
        if num_batches == 0:
            raise InputError("calibration got no batches: give at least one, or a score that needs no data")
    if world_size > 1:
        check_equal_on_all_ranks(str(num_batches), "the number of calibration micro-batches")
    return num_batches


class Observation:
    """What micro-batches of one calibration tell about the candidates; a context manager, for the accumulators.

    Args:
        model: that the candidates are in.
        candidates: whose rule reads data.
        rules: by the names in ``candidates``.
        config: accumulate, accumulator_dtype, accumulator_folder and seed are read.
        module_map: that the candidates were found in.
        scale: that the gradients come with, which is divided out of what the rules read.
        trained: whether all weights are being trained meanwhile.

    Raises:
        InputError: candidates of another model, or a place for accumulators that cannot hold them.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[Candidates],
        rules: Mapping[str, ScoreRule],
        *,
        config: SelectionConfig,
        module_map: ModuleMap,
        scale: float,
        trained: bool = False,
    ) -> None:
        strangers = {each.matrix for each in candidates} - set(module_map.matrices)
        if strangers:
            names = ", ".join(sorted(matrix.name for matrix in strangers)[:3])
            raise InputError(f"candidates in {names} are not in the model's module_map: find them in this model")
        parameters = dict(model.named_parameters())
        per_step = config.accumulate == "per_step"
        dense = {
            each.weight: each.shape
            for each in candidates
            if not per_step and "gradient" in rules[each.score].needs
        }  # fmt: skip
        used = [rules[each.score] for each in candidates]
        self.running = Pass(needs_gradient=any(rule.needs_gradient for rule in used), trained=trained)
        self._scale, self._seed = scale, config.seed
        self._candidates, self._rules = candidates, rules
        self._accumulators = Accumulators(dense, config.accumulator_dtype, config.accumulator_folder)

        def tally_of(group: list[Candidates]) -> Tally:
            return Tally(
                group,
                rules,
                parameters[group[0].matrix.parameter],
                partial(acting_parameter, model, group[0].matrix.parameter),
                self._accumulators,
                per_step=per_step,
                scale=scale,
                seed=config.seed,
                # In training, they are the optimizer's.
                owns_gradients=not trained,
            )

        self.tallies = _tallies(candidates, rules, tally_of)

    def __enter__(self) -> "Observation":
        return self

    def __exit__(self, *error: object) -> None:
        self._accumulators.close()

    def scores(self, num_batches: int) -> dict[Key, Tensor]:
        """Scores after ``num_batches`` micro-batches over all ranks; equal bits on all. Collective, once.

        Raises:
            InputError: a gradient or an activation was not finite, a parameter had no gradient, or a rule does not
                return scores.
        """
        _add_up(self.tallies)
        for tally in self.tallies:
            for name, total in tally.totals.items():
                if not name.startswith("scores"):
                    _check_finite(tally, total, "activation" if name in tally.sides else "gradient")
        reached = {tally.name: bool(tally.totals["peak"] > 0) for tally in self.tallies if "peak" in tally.totals}
        check_reached(self._rules, self._candidates, reached)
        return _score_all(self.tallies, self._accumulators, num_batches, self._scale, self._seed)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    candidates: Sequence[Candidates],
    rules: Mapping[str, ScoreRule],
    loss_fn: LossFunction,
    *,
    config: SelectionConfig,
    module_map: ModuleMap,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[Key, Tensor], int]:
    """Scores of all ``candidates`` whose rule reads data, with frozen weights. Collective; equal bits on all ranks.

    Micro-batch i runs on rank ``i % world_size``, under a seed of its own, so that the scores do not depend on the
    world size, up to the order in which sums are added: fp64 for sums over regions and channels,
    ``config.accumulator_dtype`` for dense gradients.

    Channel norms count every position of every micro-batch once, also under gradient checkpointing. Where a batch is a
    mapping with a two-dimensional ``attention_mask``, positions that it masks are left out of inputs and outputs that
    have its shape [B, L, features]; without it, padding counts. Gradients need no such care: padding has none if the
    loss does not read it.

    With ``accumulate: per_step``, a rule that reads gradients is called after every micro-batch, with that
    micro-batch's gradient and norms, and its scores are averaged. All other calls come at the end, with the mean
    gradient over all micro-batches and norms over all tokens.

    Where one rank meets an error, all of them end. Not so with sharded weights (stage 3), if the error comes in the
    middle of a forward or backward: the others wait for this rank's part of the weights, until the process group's time
    is over or a launcher ends them. What the loss function returns, or says of it by an ``InputError``, is checked
    between the two.

    Args:
        model: dense, sparse, in 4 bit, or inside a DeepSpeed engine (``engine.module``) at any stage; nothing of it is
            changed. At stage 3 the engine must have been made without an optimizer.
        batches: micro-batches of fixed composition, the same on every rank.
        candidates: that have passed ``scores.check_rule``.
        rules: by the names in ``candidates``.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar loss of a micro-batch.
        config: accumulate, accumulator_dtype, accumulator_folder and seed are read.
        module_map: that the candidates were found in.
        on_batch: called with the index of every micro-batch that this rank has done.

    Returns:
        fp64 scores on the host, by weight and kind, in the shape of each candidate's grid; and the number of
        micro-batches, over all ranks.

    Raises:
        InputError: candidates of another model, no micro-batch, a loss or gradient that is not finite, a place for
            accumulators that cannot hold them, a matrix that no gradient reached, or scores that are none.
    """
    sharded = has_shards(model)
    with (
        adopted(model),
        Observation(model, candidates, rules, config=config, module_map=module_map, scale=LOSS_SCALE) as observation,
    ):
        with ExitStack() as stack:
            stack.enter_context(_frozen(model))
            stack.enter_context(own_random_state())
            observers = observe(model, observation.tallies, observation.running, stack)
            runner = Runner(
                model,
                loss_fn,
                observation,
                observers,
                stack,
                # From above: the loss itself may be in fp16.
                lambda loss: loss.backward(torch.full_like(loss, LOSS_SCALE)),
                "check the data, or use a wider dtype (model.dtype)",
                failing_together if sharded else nullcontext,
            )
            num_batches = _run_all(runner, batches, sharded=sharded, seed=config.seed, on_batch=on_batch)
        return observation.scores(num_batches), num_batches
