"""Which private parts of DeepSpeed are relied on, and for which of its versions were they read?

All uses of names that DeepSpeed does not document are here. ``tests/distributed/test_compat.py`` says what broke when
a new version changes one of them.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from sparse_zero.errors import InputError

# The oldest version whose ZeRO optimizers treat a non-finite gradient as an overflow in fp32, too.
OLDEST_DEEPSPEED = Version("0.19.8")


def check_version() -> None:
    """Refuse a DeepSpeed older than the one whose internals were read.

    Raises:
        InputError: names both versions.
    """
    import deepspeed

    if Version(deepspeed.__version__) < OLDEST_DEEPSPEED:
        raise InputError(
            f"deepspeed {deepspeed.__version__} is older than {OLDEST_DEEPSPEED}: "
            f"pip install 'deepspeed>={OLDEST_DEEPSPEED}'"
        )


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a ZeRO optimizer; the engine's own one at stage 0 in fp32."""
    optimizer = engine.optimizer
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def check_optimizer(engine: Any) -> None:
    """Refuse an optimizer whose state is not Adam's: it could not be saved, nor go on with another selection.

    Raises:
        InputError: names the optimizer.
    """
    inner = inner_optimizer(engine)
    wanted = {"exp_avg", "exp_avg_sq"}
    plain = all("betas" in group and "eps" in group and not group.get("amsgrad") for group in inner.param_groups)
    for state in inner.state.values():
        plain = plain and (not state or wanted <= set(state) <= wanted | {"step"})
    if not plain:
        raise InputError(
            f"the optimizer {type(inner).__name__} has a state other than Adam's two moments, which cannot be saved: "
            "use Adam or AdamW without amsgrad"
        )


def create_optimizer_states(engine: Any, keys: tuple[str, ...], step: int) -> None:
    """Give the optimizer the zero moments and step counters that its first step would create.

    DeepSpeed creates them lazily, and its setters need them in place.
    """
    inner = inner_optimizer(engine)
    partitions = [parameter for group in inner.param_groups for parameter in group["params"]]
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        # Stage 3 shows the optimizer one sub-group at a time; all of them have states of their own.
        partitions = list(engine.optimizer.fp32_partitioned_groups_flat)
    for partition in partitions:
        state = inner.state[partition]
        state["step"] = torch.tensor(float(step))
        for key in keys:
            state[key] = torch.zeros_like(partition, memory_format=torch.preserve_format).detach()
    link_optimizer_states(engine)


def link_optimizer_states(engine: Any) -> None:
    """Make every value find its moments in the flat partitions of stages 1 and 2.

    DeepSpeed links them after the first group's first step and then counts all groups as linked, so that with
    several groups ``safe_get_full_optimizer_state`` fails for all but the first.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_step_count(engine: Any) -> int:
    """Steps that the inner optimizer has taken; 0 before the first."""
    for state in inner_optimizer(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds ``parameter`` in shards, one on each rank."""
    return hasattr(parameter, "ds_id")


def has_shards(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds any parameter of ``model`` in shards."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO holds the master and the moments of ``parameter`` (stages 1 to 3, bf16 and fp16 optimizers)."""
    return (
        is_sharded(parameter)
        or getattr(parameter, "_hp_mapping", None) is not None
        or hasattr(parameter, "get_full_hp_param")
    )


def _local_part(parameter: Any, value: Tensor, device: Any) -> Tensor:
    """This rank's part of a whole 1-D ``value`` under stage 3, padded with zeros as DeepSpeed pads."""
    import torch.distributed as dist

    part = parameter.ds_tensor.ds_numel
    group = parameter.ds_process_group
    padded = torch.nn.functional.pad(value, (0, part * dist.get_world_size(group) - value.numel()))
    return padded.narrow(0, part * dist.get_rank(group), part).to(device)


def write_master(engine: Any, parameter: Any, value: Tensor) -> None:
    """Set the fp32 master of ``parameter``, and the parameter itself, from a whole 1-D fp32 ``value``."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if is_sharded(parameter):
        # DeepSpeed's setter for whole values fails where the world size does not divide their number.
        local = _local_part(parameter, value, engine.device)
        safe_set_local_fp32_param(parameter, local)
        parameter.ds_tensor.data.copy_(local)
        return
    if is_partitioned(parameter):
        safe_set_full_fp32_param(parameter, value.to(engine.device))
    parameter.data.copy_(value)


def write_moment(engine: Any, parameter: Any, value: Tensor, key: str) -> None:
    """Set one moment of ``parameter`` from a whole 1-D fp32 ``value``."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_sharded(parameter):
        safe_set_local_optimizer_state(parameter, _local_part(parameter, value, engine.device), key)
    elif is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value.to(engine.device), key)
    else:
        inner_optimizer(engine).state[parameter][key].copy_(value)


@contextmanager
def whole(parameter: Tensor, *, writes: bool = False) -> Iterator[None]:
    """Have all of ``parameter`` on every rank while the block runs, also under ZeRO-3. Collective there.

    Args:
        parameter: sharded or not.
        writes: whether the block changes it, on every rank alike; otherwise its changes are lost where it is sharded.
    """
    if not is_sharded(parameter):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None):
        yield


def release_gathered(engine: Any) -> None:
    """Under stage 3, give back every weight that a forward or backward outside the engine left gathered."""
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.optimizer.empty_partition_cache()


# What stage 3 leaves on modules: the hooks' functions and counters of the engine that set them.
MODULE_ATTRIBUTES = (
    "_external_params",
    "_original_parameters",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "ds_external_parameters",
    "ds_grads_remaining",
    "ds_id",
    "ds_recompute_parameters",
    "post_bwd_fn",
    "pre_bwd_fn",
)


def detach_engine(engine: Any) -> nn.Module:
    """End ``engine`` and give back its module, ready for another engine; its optimizer's memory is freed.

    ``engine.destroy`` alone leaves hooks on the module that keep the engine alive, and at stage 3 functions of it that
    the next engine would call. What is sharded stays sharded, and the next engine goes on with the shards.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    module: nn.Module = engine.module
    engine.optimizer.zero_grad()
    release_gathered(engine)
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.destroy()
    engine.optimizer = engine.basic_optimizer = engine.client_optimizer = engine.lr_scheduler = None
    # Process-wide lists and caches of stage 3 that hold on to the engine's module and coordinator.
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [each for each in stack if each is not module]
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    for each in module.modules():
        for name in MODULE_ATTRIBUTES:
            each.__dict__.pop(name, None)
        if type(each._parameters) is not dict:
            each._parameters = dict(each._parameters)
        for parameter in each._parameters.values():
            if parameter is not None and is_sharded(parameter):
                parameter.__dict__.pop("_z3_optimizer", None)
                parameter.__dict__["ds_active_sub_modules"].clear()
    gc.collect()
    return module


def make_plain(engine: Any) -> nn.Module:
    """End ``engine`` and give back its module as it was before DeepSpeed saw it, with its present weights.

    Collective at stage 3. Every parameter is the same object as before (so ties, names and references to it hold),
    whole, in memory of its own, without a gradient; attributes that were set on parameters are gone, all of them.
    """
    module = detach_engine(engine)
    for parameter in module.parameters():
        # Stages 1 and 2 have made it a view of a flat buffer, which lives until the last of its views is gone.
        with whole(parameter):
            data = parameter.detach().clone()
        # The attributes hold closures of the engine, and at stage 3 methods that the next engine would find.
        parameter.__dict__.clear()
        parameter.data = data
        parameter.grad = None
    for each in module.modules():
        each.__dict__.pop("ds_inflight_param_registry", None)
    gc.collect()
    return module
