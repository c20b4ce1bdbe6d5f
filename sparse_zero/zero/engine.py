"""How does DeepSpeed get the values and nothing else, and when are they written back into the weights?"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_zero.errors import InputError
from sparse_zero.files import read_json
from sparse_zero.layers.carriers import carriers, parameter_name
from sparse_zero.layers.frozen_linear import freeze_linears
from sparse_zero.layers.quantized_linear import check_same_constants
from sparse_zero.layers.sparse_parameter import SparseParameter
from sparse_zero.layers.sparsify import parameter_groups, placement_of, trainable_parameters, write_back
from sparse_zero.zero import compat
from sparse_zero.zero.config import Rounding, low_precision
from sparse_zero.zero.defaults import with_defaults
from sparse_zero.zero.optimizer_state import optimizer_step_count
from sparse_zero.zero.rounding import check_rounding, round_values
from sparse_zero.zero.same_weights import check_same_weights
from sparse_zero.zero.unsupported import check_finds_overflow, check_not_split, check_sequence_parallel, check_settings


def _check_only_values_train(model: nn.Module) -> None:
    values = {id(parameter) for parameter in trainable_parameters(model).values()}
    if not values:
        raise InputError("the model has no trainable values: call sparsify before initialize")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in values:
            raise InputError(f"{name} requires grad but is not a selected value: freeze it, or select it")


def initialize(
    *,
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    broadcast_weights: bool = True,
    rounding: Rounding = "nearest",
    rounding_seed: int = 0,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a sparsified model, with write-back after each real optimizer step.

    Args:
        model: a model that :func:`sparse_zero.sparsify` has prepared, on every rank alike.
        config: DeepSpeed's config, or the name of its JSON file; :mod:`sparse_zero.zero.defaults` fill in what it
            leaves open of ``zero_optimization``.
        optimizer: an optimizer over :func:`sparse_zero.parameter_groups`, or a function from those groups
            to one; default: what ``config`` names.
        model_parameters: optimizer groups; default: one group per region kind.
        broadcast_weights: whether rank 0 sends all weights to the others at the start, as DeepSpeed does. False, where
            every rank has loaded the same files: the ranks compare sums over their weights instead.
        rounding: see :func:`attach`.
        rounding_seed: see :func:`attach`.
        **kwargs: passed to ``deepspeed.initialize``.

    Returns:
        ``(engine, optimizer, loader, scheduler)``, as DeepSpeed does.

    Raises:
        InputError: something besides values requires grad, or ``config`` has what a sparse model does not go along
            with, see :mod:`sparse_zero.zero.unsupported`.
    """
    import deepspeed

    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else read_json(Path(config))
    _check_only_values_train(model)
    check_rounding(model, rounding, is_cast=low_precision(settings) is not None)
    check_settings(settings, placement_of(model))
    check_not_split(model, settings)
    settings = {**settings, "zero_optimization": with_defaults(model, settings.get("zero_optimization") or {})}
    if not dist.is_initialized():
        # As deepspeed.initialize would: what is compared between ranks needs them.
        deepspeed.init_distributed(dist_init_required=kwargs.get("dist_init_required"))
    check_same_constants(model)
    if not broadcast_weights:
        check_same_weights(model)
    with nullcontext() if broadcast_weights else compat.without_broadcast():
        engine, zero_optimizer, loader, scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=parameter_groups(model) if model_parameters is None else model_parameters,
            config=dict(settings),
            **kwargs,
        )
    attach(engine, rounding=rounding, rounding_seed=rounding_seed)
    return engine, zero_optimizer, loader, scheduler


def _fetch_values_with(carrier: SparseParameter) -> None:
    """Have stage 3 gather the values of a hooked parameter for its owners: the module of values is not called."""
    import deepspeed

    for owner in carrier.owners:
        for values in carrier.values().values():
            deepspeed.zero.register_external_parameter(owner, values)


@torch.no_grad()
def _begin_with_loaded(engine: Any) -> None:
    """Have masters begin with the fp32 numbers of values that an adapter brought. Collective.

    DeepSpeed has made them from values that it cast before: in bf16 most of what was learned inplace is less than a
    weight can show.
    """
    for name, carrier in carriers(engine.module):
        for kind, parameter in carrier.values().items():
            loaded = carrier.loaded.pop(kind, None)
            if loaded is None or not parameter.requires_grad:
                continue
            rounded = loaded.to(parameter.dtype)
            if torch.equal(rounded.float(), loaded):
                continue
            if compat.states_on_disk(engine) or (compat.is_sharded(parameter) and compat.is_out_of_reach(parameter)):
                raise InputError(
                    f"the values of {parameter_name(name, carrier)} are an adapter's in fp32, and their masters are "
                    "offloaded to nvme, where they cannot be put: use offload_optimizer and offload_param cpu or none, "
                    "or train in fp32"
                )
            master = compat.full_master(engine, parameter).view(-1)
            # What somebody has trained since then stays.
            is_loaded = master.to(parameter.dtype) == rounded.to(master.device)
            compat.write_master(engine, parameter, torch.where(is_loaded, loaded.to(master.device), master))


def attach(engine: Any, *, rounding: Rounding = "nearest", rounding_seed: int = 0) -> None:
    """Write values back after every real step of ``engine``, and skip steps with a non-finite gradient.

    ZeRO gathers the updated values at the end of its optimizer's ``step``, after the hooks of the inner optimizer
    have fired; so ``step`` is wrapped on the instance. It is called once per accumulation boundary, and a step
    that an overflow discarded (``optimizer.overflow``) changes nothing, so nothing is written back then.

    Args:
        engine: over a sparsified model.
        rounding: how inplace values in bf16 or fp16 come from their fp32 masters: nearest, or stochastic, see
            :mod:`sparse_zero.zero.rounding`. Once an engine is attached, it stays as it was.
        rounding_seed: of stochastic rounding, equal on all ranks.

    Raises:
        InputError: the engine's model has no values, or trains something else too; stochastic rounding has nothing to
            round; DeepSpeed would not find gradients that are not finite; or stage 3 holds weights where inplace values
            cannot be written into them, or masters where those of an adapter cannot.
    """
    _check_only_values_train(engine.module)
    optimizer = engine.optimizer
    if getattr(optimizer, "_sparse_zero_attached", False):
        return
    check_rounding(engine.module, rounding)
    check_sequence_parallel(engine)
    check_finds_overflow(compat.settings_of(engine))
    for name, carrier in carriers(engine.module):
        parameter = carrier.parameter
        if carrier.placement == "inplace" and compat.is_sharded(parameter) and compat.is_out_of_reach(parameter):
            raise InputError(
                f"ZeRO-3 holds {parameter_name(name, carrier)} on a disk or quantized, and placement 'inplace' writes "
                "into it: leave that out of DeepSpeed's config, or sparsify with placement='delta'"
            )
        if compat.is_sharded(parameter) and isinstance(carrier, SparseParameter):
            _fetch_values_with(carrier)
    freeze_linears(engine.module)
    optimizer._sparse_zero_rounding = (rounding, rounding_seed)
    compat.undo_first_step(engine)
    compat.check_version()
    _begin_with_loaded(engine)
    step = optimizer.step
    checks_itself = hasattr(optimizer, "overflow")

    @wraps(step)
    def step_and_write_back(_: Any, *args: Any, **kwargs: Any) -> Any:
        if not checks_itself:
            # Plain data parallelism (stage 0): gradients are already averaged, so every rank decides alike.
            parameters = trainable_parameters(engine.module).values()
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            optimizer.overflow = not bool(finite)
            if optimizer.overflow:
                return None
        result = step(*args, **kwargs)
        if not getattr(optimizer, "overflow", False):
            write_values(engine, in_step=True)
        return result

    # A method, as schedulers of torch expect.
    optimizer.step = MethodType(step_and_write_back, optimizer)
    optimizer._sparse_zero_attached = True
    # What stands in the weights before the first step is what the values say, also after a broadcast.
    write_back(engine.module)
    if compat.has_shards(engine.module):
        compat.shards_are_written()


def write_values(engine: Any, *, in_step: bool = False) -> None:
    """Put the values into the weights as training does after a step. Collective where they are rounded or sharded.

    Args:
        engine: attached.
        in_step: whether the engine is within its step, so that it has not counted it yet.
    """
    rounding, seed = getattr(engine.optimizer, "_sparse_zero_rounding", ("nearest", 0))
    if rounding == "stochastic":
        round_values(engine, seed, optimizer_step_count(engine, in_step=in_step))
    write_back(engine.module)


def step_was_applied(engine: Any) -> bool:
    """Whether the last accumulation boundary changed the values (False after a non-finite gradient)."""
    return not getattr(engine.optimizer, "overflow", False)
