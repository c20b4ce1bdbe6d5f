"""How are regions scored while the whole model is really fine-tuned, as SMT does, and what becomes of its weights?

SMT (arXiv 2405.15525, section 3.2) runs 100 steps of full fine-tuning and scores their gradients. Here these steps run
under DeepSpeed ZeRO 2 or 3, with torch's AdamW, and the observers of :mod:`sparse_zero.selection.calibration` see the
gradient of every micro-batch. Then the engine is taken apart, the model is a plain one again, and its weights are what
they were before, or, if they are to be kept, what the steps have made of them.

This needs the memory of full fine-tuning: weights, gradients that are accumulated in fp32, fp32 masters and two moments
(18 bytes per parameter in bf16), spread over the ranks as the stage says, and activations. ``calibration_weights:
frozen`` needs weights and activations only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import PeerError, failing_together, lone_process_group, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection.calibration import (
    BufferSnapshot,
    Key,
    LossFunction,
    Observation,
    Runner,
    own_random_state,
)
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import FullCalibrationConfig, SelectionConfig
from sparse_zero.selection.observers import observe
from sparse_zero.selection.scores import ScoreRule
from sparse_zero.zero.compat import check_version, is_sharded, make_plain
from sparse_zero.zero.defaults import with_defaults


def check_world_size(settings: FullCalibrationConfig, world_size: int) -> None:
    """Raise unless the micro-batches of a step come out even over the ranks.

    Raises:
        InputError: names both numbers.
    """
    if settings.batches_per_step % world_size:
        raise InputError(
            f"selection.full_calibration.batches_per_step is {settings.batches_per_step}, not a multiple of the "
            f"{world_size} ranks: make it one, or start another number of ranks"
        )


def check_can_train(model: nn.Module) -> None:
    """Raise unless every parameter of ``model`` can be fine-tuned.

    Raises:
        InputError: the model is sparse, sharded or quantized, is in fp16, or mixes dtypes.
    """
    what = "selection.calibration_weights is 'full', and"
    if next(iter(carriers(model)), None) is not None:
        raise InputError(f"{what} the model is sparse: select before sparsify, or set it to 'frozen'")
    first: Tensor | None = None
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise InputError(f"{what} {name} is sharded by ZeRO-3 already: pass a plain model, or set it to 'frozen'")
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise InputError(
                f"{what} {name} is quantized ({parameter.dtype}): load the base in full precision, or set it to "
                "'frozen'"
            )
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(
                f"{what} {name} is {parameter.dtype}: load the model in bfloat16 or float32, or set it to 'frozen'"
            )
        first = parameter if first is None else first
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise InputError(
                f"{what} {name} is {parameter.dtype} on {parameter.device}, while others are {first.dtype} on "
                f"{first.device}: give the model one dtype and one device, or set it to 'frozen'"
            )
    if first is None:
        raise InputError(f"{what} the model has no parameters: pass a model with weights")


class _Snapshot:
    """The weights before training, each on the host of one rank; with the buffers, which are small, on all of them."""

    def __init__(self, model: nn.Module) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        loads = [0] * world_size
        self._weights: list[tuple[int, Tensor | None]] = []
        for parameter in model.parameters():
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            self._weights.append((owner, parameter.detach().to("cpu", copy=True) if owner == rank else None))
        self._buffers = BufferSnapshot(model)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put everything back, bit for bit. Collective."""
        for parameter, (owner, kept) in zip(model.parameters(), self._weights, strict=True):
            if kept is not None:
                parameter.copy_(kept)
            if dist.get_world_size() > 1:
                # As bytes, which every backend sends as they are.
                travelling = parameter.detach().contiguous()
                dist.broadcast(travelling.view(-1).view(torch.uint8), src=owner)
                parameter.copy_(travelling)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Put the buffers back."""
        self._buffers.restore()


def _deepspeed_config(
    model: nn.Module, settings: FullCalibrationConfig, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    # DeepSpeed's own buckets would take gigabytes, however small the model is.
    zero: dict[str, Any] = with_defaults(model, {"stage": settings.stage})
    if settings.offload:
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = host
        if settings.stage == 3:
            zero["offload_param"] = host
    return {
        # DeepSpeed counts samples with it, and nothing else; how many a micro-batch has is the caller's affair.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.batches_per_step // world_size,
        # Off: DeepSpeed's default is 1.0.
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31 - 1,
    }


def _failed_alone(error: BaseException) -> bool:
    """Whether other ranks may be waiting for this one, in a collective that it does not come to any more."""
    if dist.get_world_size() == 1:
        return False
    return not (isinstance(error, PeerError) or getattr(error, "speaks_for_all", False))


@contextmanager
def _fully_trained(model: nn.Module, settings: FullCalibrationConfig) -> Iterator[Any]:
    """A DeepSpeed engine that trains all of ``model`` in the block, and is gone after it. Collective.

    The weights are then as the settings say; everything else about the parameters is as it was. After an error that one
    rank alone has met in the block, nothing is put back.
    """
    import deepspeed

    check_version()
    snapshot = None if settings.keep_weights_in is not None else _Snapshot(model)
    parameters = list(model.parameters())
    device, dtype = parameters[0].device, parameters[0].dtype
    before = [(parameter.requires_grad, parameter.grad, dict(parameter.__dict__)) for parameter in parameters]
    engine, failure = None, None
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        # No decay: it would move weights that no gradient speaks for.
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        config = _deepspeed_config(model, settings, dtype, dist.get_world_size())
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        del optimizer
        yield engine
    except BaseException as error:
        if engine is not None and _failed_alone(error):
            raise
        failure = error
    if engine is not None:
        make_plain(engine)
    model.to(device)
    for parameter, (requires_grad, grad, attributes) in zip(parameters, before, strict=True):
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad
        parameter.__dict__.update(attributes)
    if snapshot is not None and engine is not None:
        snapshot.restore(model)
    elif snapshot is not None:  # Nothing was trained.
        snapshot.restore_buffers()
    if failure is not None:
        raise failure


def _steps(batches: Iterable[Any], batches_per_step: int) -> Iterator[list[Any]]:
    """The micro-batches of each step.

    Raises:
        InputError: the last step is not full, or there is none.
    """
    remaining, number = iter(batches), 0
    while step := list(islice(remaining, batches_per_step)):
        number += len(step)
        if len(step) < batches_per_step:
            raise InputError(
                f"calibration got {number} micro-batches, not a multiple of "
                f"selection.full_calibration.batches_per_step {batches_per_step}: make it one"
            )
        yield step
    if number == 0:
        raise InputError("calibration got no batches: give at least one step of them")


def _run_steps(
    runner: Runner,
    engine: Any,
    batches: Iterable[Any],
    settings: FullCalibrationConfig,
    seed: int,
    on_batch: Callable[[int], None] | None,
) -> int:
    """Take all steps, with this rank's share of the micro-batches; returns the number of all micro-batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps = _steps(batches, settings.batches_per_step)
    num_batches = 0
    while True:
        with failing_together():
            step = next(steps, None)
        if step is None:
            return num_batches
        failure: Exception | None = None
        for index, batch in list(enumerate(step, num_batches))[rank::world_size]:
            loss = runner.run(batch, seed + index, recording=True)
            if failure is None:
                try:
                    runner.check(index, loss)
                except Exception as error:  # Also whatever a rule raises; the others go on to the end of the step.
                    failure = error
            engine.step()
            if on_batch is not None:
                on_batch(index)
        num_batches += len(step)
        with failing_together():
            if failure is not None:
                raise failure


def calibrate_full(
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
    """Scores of all ``candidates`` whose rule reads data, while all weights are fine-tuned. Collective; equal bits.

    Every ``config.full_calibration.batches_per_step`` micro-batches make a step of AdamW (no weight decay, no clipping)
    on the mean of their gradients. Micro-batch i runs on rank ``i % world_size``, under a seed of its own, so that
    nothing depends on the world size, up to the order of summation. With ``accumulate: sum`` the rules are called after
    the last step, with the mean over all micro-batches of the gradient at the weights of its time; a rule that reads
    weights gets those that the model has after calibration. With ``per_step``, they are called with every micro-batch,
    and get its gradient and the weights of that time.

    Afterwards the model is plain: its parameters are the same objects with the same flags, gradients and attributes,
    and no state of DeepSpeed is left. Their data is bit for bit what it was; with ``full_calibration.keep_weights_in``
    set, it is what the steps have made of it (this function writes no folder). For restoring, the ranks together keep
    one copy of the weights on their hosts, in the weights' dtype.

    An error that one of several ranks meets alone, in the middle of a step, leaves the model unusable: the others may
    be waiting for this one, so nothing that needs all of them can be done. After any other error it is plain again,
    and its weights are restored (unless they were to be kept).

    Args:
        model: plain: dense, on the device that DeepSpeed will use, in one dtype, float32 or bfloat16.
        batches: micro-batches of fixed composition, the same on every rank.
        candidates: that have passed ``scores.check_rule``.
        rules: by the names in ``candidates``.
        loss_fn: ``loss_fn(engine, batch)`` gives the mean loss of a micro-batch; the engine is called as the model is.
        config: accumulate, accumulator_dtype, accumulator_folder, seed and full_calibration are read.
        module_map: that the candidates were found in.
        on_batch: called with the index of every micro-batch that this rank has done.

    Returns:
        fp64 scores on the host, by weight and kind, in the shape of each candidate's grid; and the number of
        micro-batches, over all ranks.

    Raises:
        InputError: the model cannot be trained as a whole, steps that do not come out even over the ranks or the
            micro-batches, a loss or gradient that is not finite, a place for accumulators that cannot hold them, a
            matrix that no gradient reached, or scores that are none.
    """
    settings = config.full_calibration
    _, world_size = rank_and_world_size()
    check_world_size(settings, world_size)
    check_can_train(model)
    per_rank = settings.batches_per_step // world_size
    with ExitStack() as stack:
        stack.enter_context(lone_process_group())
        # The engine divides a micro-batch's loss by the number of those that it accumulates.
        observation = stack.enter_context(
            Observation(
                model, candidates, rules, config=config, module_map=module_map, scale=1.0 / per_rank, trained=True
            )
        )
        with _fully_trained(model, settings) as engine, own_random_state(), ExitStack() as hooks:
            observers = observe(model, observation.tallies, observation.running, hooks)
            remedy = f"check the data, or lower selection.full_calibration.learning_rate ({settings.learning_rate})"
            runner = Runner(engine, loss_fn, observation, observers, hooks, engine.backward, remedy)
            num_batches = _run_steps(runner, engine, batches, settings, config.seed, on_batch)
        return observation.scores(num_batches), num_batches
