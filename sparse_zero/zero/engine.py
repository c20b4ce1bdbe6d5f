"""How does DeepSpeed get the values and nothing else, and when are they written back into the weights?"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_zero.errors import InputError
from sparse_zero.files import read_json
from sparse_zero.layers.carriers import carriers, parameter_name
from sparse_zero.layers.sparse_parameter import SparseParameter
from sparse_zero.layers.sparsify import parameter_groups, placement_of, trainable_parameters, write_back
from sparse_zero.zero import compat


def _check_only_values_train(model: nn.Module) -> None:
    values = {id(parameter) for parameter in trainable_parameters(model).values()}
    if not values:
        raise InputError("the model has no trainable values: call sparsify before initialize")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in values:
            raise InputError(f"{name} requires grad but is not a selected value: freeze it, or select it")


def _zero_stage(config: Mapping[str, Any]) -> int:
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def initialize(
    *,
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a sparsified model, with write-back after each real optimizer step.

    Args:
        model: a model that :func:`sparse_zero.sparsify` has prepared, on every rank alike.
        config: DeepSpeed's config, or the name of its JSON file.
        optimizer: an optimizer over :func:`sparse_zero.parameter_groups`, or a function from those groups
            to one; default: what ``config`` names.
        model_parameters: optimizer groups; default: one group per region kind.
        **kwargs: passed to ``deepspeed.initialize``.

    Returns:
        ``(engine, optimizer, loader, scheduler)``, as DeepSpeed does.

    Raises:
        InputError: something besides values requires grad, an inplace model at stage 3, or stage 0 without fp32.
    """
    import deepspeed

    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else read_json(Path(config))
    _check_only_values_train(model)
    low = [name for name in ("bf16", "fp16") if (settings.get(name) or {}).get("enabled")]
    if low and _zero_stage(settings) == 0:
        raise InputError(
            f"zero stage 0 with {low[0]} is not supported (its masters cannot be saved): use stage 1 to 3, or fp32"
        )
    if _zero_stage(settings) == 3:
        for name, carrier in carriers(model):
            if isinstance(carrier, SparseParameter):
                raise InputError(
                    f"zero stage 3 would shard {parameter_name(name, carrier)}, whose entries are trained through "
                    "hooks: use a stage up to 2, or select linears only"
                )
    if _zero_stage(settings) == 3 and placement_of(model) == "inplace":
        raise InputError(
            "zero stage 3 shards the weights that placement 'inplace' writes into: "
            "sparsify with placement='delta', or use a stage up to 2"
        )
    engine, zero_optimizer, loader, scheduler = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=parameter_groups(model) if model_parameters is None else model_parameters,
        config=dict(settings),
        **kwargs,
    )
    attach(engine)
    return engine, zero_optimizer, loader, scheduler


def attach(engine: Any) -> None:
    """Write values back after every real step of ``engine``, and skip steps with a non-finite gradient.

    ZeRO gathers the updated values at the end of its optimizer's ``step``, after the hooks of the inner optimizer
    have fired; so ``step`` is wrapped on the instance. It is called once per accumulation boundary, and a step
    that an overflow discarded (``optimizer.overflow``) changes nothing, so nothing is written back then.

    Raises:
        InputError: the engine's model has no values, or trains something else too.
    """
    _check_only_values_train(engine.module)
    optimizer = engine.optimizer
    if getattr(optimizer, "_sparse_zero_attached", False):
        return
    compat.check_version()
    step = optimizer.step
    checks_itself = hasattr(optimizer, "overflow")

    def step_and_write_back(*args: Any, **kwargs: Any) -> Any:
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
            write_back(engine.module)
        return result

    optimizer.step = step_and_write_back
    optimizer._sparse_zero_attached = True
    # What stands in the weights before the first step is what the values say, also after a broadcast.
    if not compat.has_shards(engine.module):
        write_back(engine.module)


def step_was_applied(engine: Any) -> bool:
    """Whether the last accumulation boundary changed the values (False after a non-finite gradient)."""
    return not getattr(engine.optimizer, "overflow", False)
