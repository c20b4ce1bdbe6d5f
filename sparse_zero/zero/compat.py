"""Which private parts of DeepSpeed are relied on, and for which of its versions were they read?

All uses of names that DeepSpeed does not document are here. ``tests/distributed/test_compat.py`` says what broke when
a new version changes one of them.
"""

import gc
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from sparse_zero.collectives import collective_device, rank_and_world_size
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


def settings_of(engine: Any) -> dict[str, Any]:
    """The config that DeepSpeed made the engine from, as it was given or read from a file."""
    found: dict[str, Any] = engine._config._param_dict
    return found


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What the inner optimizer is handed at once, and the values that are in it."""

    # Which of the inner optimizer's groups it belongs to.
    group: int
    # The values themselves (stage 0 in fp32), their fp32 masters (stage 0 in bf16), or one flat fp32 tensor.
    tensors: list[Tensor]
    values: list[nn.Parameter]

    def tensor_of(self, index: int) -> Tensor:
        """The tensor that has, among others perhaps, the entries of value number ``index``."""
        return self.tensors[index if len(self.tensors) == len(self.values) else 0]


# What DeepSpeed's optimizers call their groups of values, and what they step in their place: stages 1 and 2, stage 1
# in bf16.
_GROUP_NAMES = (
    ("bit16_groups", "single_partition_of_fp32_groups"),
    ("bf16_groups", "fp32_groups_flat_partition"),
)


def stepped(engine: Any) -> list[Stepped]:
    """Everything that the inner optimizer steps, in its order."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # Stage 3 shows the optimizer one sub-group at a time; each has states of its own.
        sub_groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        return [
            Stepped(group=optimizer.sub_group_to_group_id[number], tensors=[flat], values=list(values))
            for number, (values, flat) in enumerate(sub_groups)
        ]
    for values_name, flat_name in _GROUP_NAMES:
        if hasattr(optimizer, values_name):
            flats = zip(getattr(optimizer, values_name), getattr(optimizer, flat_name), strict=True)
            return [
                Stepped(group=number, tensors=[flat], values=list(values))
                for number, (values, flat) in enumerate(flats)
            ]
    groups = [group["params"] for group in inner_optimizer(engine).param_groups]
    # Stage 0: the values, or in bf16 a master for each of them (one flat one for all, of a fused optimizer).
    values_of = getattr(optimizer, "fp16_groups", groups)
    return [
        Stepped(group=number, tensors=list(params), values=list(values))
        for number, (params, values) in enumerate(zip(groups, values_of, strict=True))
    ]


def own_state(engine: Any, parameter: nn.Parameter, key: str | None = None) -> Tensor:
    """At stage 0: the fp32 master of ``parameter``, or the optimizer's state ``key`` of it; whole, and no copy."""
    inner = inner_optimizer(engine)
    for each in stepped(engine):
        start = 0
        for index, values in enumerate(each.values):
            tensor = each.tensor_of(index)
            if values is parameter:
                held = tensor if key is None else inner.state[tensor][key]
                return held.detach().view(-1)[start : start + values.numel()]
            start += values.numel() if len(each.tensors) < len(each.values) else 0
    raise KeyError("the optimizer does not have the parameter")


def full_master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 master of ``parameter``, whole, not to be changed. Collective where it is partitioned."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter) if is_partitioned(parameter) else own_state(engine, parameter)
    return found


@torch.no_grad()
def undo_first_step(engine: Any) -> None:
    """At stage 0 in bf16, take back the step with gradients of zero that DeepSpeed takes when the engine is built.

    It would count as a step, and decay the masters.
    """
    if engine.global_steps or hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return
    for values in (each for group in getattr(engine.optimizer, "fp16_groups", ()) for each in group):
        own_state(engine, values).copy_(values)
    if hasattr(engine.optimizer, "fp16_groups"):
        inner_optimizer(engine).state.clear()


def link_optimizer_states(engine: Any) -> None:
    """Make every value find its moments in the flat partitions of stages 1 and 2.

    DeepSpeed links them after the first group's first step and then counts all groups as linked, so that with
    several groups ``safe_get_full_optimizer_state`` fails for all but the first.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds ``parameter`` in shards, one on each rank."""
    return hasattr(parameter, "ds_id")


def full_numel(parameter: Any) -> int:
    """Entries of ``parameter``, also where this rank holds a shard only."""
    return int(parameter.ds_numel if is_sharded(parameter) else parameter.numel())


def is_persistent(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps ``parameter`` whole within a step, as it does with small ones."""
    return bool(getattr(parameter, "ds_persist", False))


def inputs_require_grad(model: nn.Module) -> bool:
    """Whether transformers makes the embedding's output require grad, so that backward runs through every layer."""
    return any(getattr(module, "_require_grads_hooks", None) for module in model.modules())


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
        for shard in own_shards(parameter)[1:]:
            # hpZ gathers from it until the next step drops it.
            shard.tensor.copy_(value[shard.start : shard.start + shard.length])
        if is_available(parameter):
            # A small one that stays gathered between steps.
            parameter.data.copy_(value)
        return
    if is_partitioned(parameter):
        safe_set_full_fp32_param(parameter, value.to(engine.device))
    else:
        own_state(engine, parameter).copy_(value)
    parameter.data.copy_(value)


def write_moment(engine: Any, parameter: Any, value: Tensor, key: str) -> None:
    """Set one state of ``parameter`` from a whole 1-D fp32 ``value``."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_sharded(parameter):
        safe_set_local_optimizer_state(parameter, _local_part(parameter, value, engine.device), key)
    elif is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value.to(engine.device), key)
    else:
        own_state(engine, parameter, key).copy_(value)


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
    if hasattr(engine.optimizer, "zero_grad"):  # Else it has none: at stage 3 something else stands there then.
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
        each.__class__ = getattr(type(each), "UNTIL_DETACHED", type(each))
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


@contextmanager
def without_broadcast() -> Iterator[None]:
    """Let ``deepspeed.initialize`` send no weights from rank 0 to the others while the block runs.

    The engine broadcasts every parameter when it is made, and stage 3 once more each parameter that it shards.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    def shard_only(self: Any, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    broadcast, shard = DeepSpeedEngine._broadcast_model, Init._zero_init_param
    DeepSpeedEngine._broadcast_model = lambda engine: None
    Init._zero_init_param = shard_only
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model, Init._zero_init_param = broadcast, shard


def start_sharding(config: Mapping[str, Any]) -> Any:
    """What :func:`new_shards` and :func:`shards_of_rank_zero` make shards with. Collective.

    It is the ``zero.Init`` that ``deepspeed.initialize`` makes at stage 3, with no module to shard: as there, it puts
    DeepSpeed's own function, which does not keep gathered weights alive, in the place of torch's linear.

    Args:
        config: DeepSpeed's, of the engine that will take the shards over.
    """
    import deepspeed

    return deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(config))


def _own_ranges(init: Any, parameter: Any) -> list[tuple[int, int]]:
    """The parts of a flat parameter that this rank is to hold: its shard, and with hpZ that of its node."""
    size = -(-parameter.ds_numel // parameter.ds_zero_partition_world_size)
    ranges = [(size * parameter.ds_zero_partition_rank, size)]
    if init.zero_param_process_group is not None:
        size = size * parameter.ds_zero_partition_world_size // init.num_ranks_in_param_group
        ranges.append((size * init.rank_in_group, size))
    ends = [(start, min(start + size, parameter.ds_numel)) for start, size in ranges]
    return [(start, end) for start, end in ends if start < end]


def _reserved(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor that costs a host only what is written to, and nothing any more when it is gone."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device != torch.device("cpu") or not num_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)


def _clear_padding(parameter: Any) -> None:
    """Make what a shard has beyond the parameter's end zeros; DeepSpeed leaves there what it finds."""
    shard = parameter.ds_tensor
    if shard.numel() == shard.ds_numel:  # Else it is on a disk already.
        own = parameter.ds_numel - shard.ds_numel * parameter.ds_zero_partition_rank
        shard[max(0, own) :].zero_()


def new_shards(
    init: Any, shape: Sequence[int], dtype: torch.dtype, read: Callable[[Tensor, int], None]
) -> nn.Parameter:
    """A frozen parameter that ZeRO-3 holds in shards, of which this rank has read no more than its own.

    DeepSpeed's way would fill the whole weight on rank 0 and broadcast it. Here memory for the whole is only reserved
    (on a GPU: allocated, one weight at a time), and written to where this rank's shard lies.

    Args:
        init: of :func:`start_sharding`.
        shape: of the whole parameter.
        dtype: of the parameter.
        read: ``read(out, start)`` fills the 1-D ``out`` with the entries of the flat parameter from ``start`` on.
    """
    parameter: Any = nn.Parameter(_reserved(tuple(shape), dtype, init.local_device), requires_grad=False)
    init._convert_to_deepspeed_param(parameter)
    flat, ranges = parameter.data.view(-1), _own_ranges(init, parameter)
    for start, end in ranges:
        read(flat[start:end], start)
    parameter.partition()
    _clear_padding(parameter)
    return parameter


def on_rank_zero(parameter: Any) -> Tensor | None:
    """All of a parameter that ZeRO-3 holds in shards, on rank 0's host; None on the others. Collective.

    DeepSpeed's own gathering gives every rank the whole; here the others only send.
    """
    shard, size = parameter.ds_tensor, parameter.ds_tensor.ds_numel
    rank, world_size = rank_and_world_size()
    if shard.numel() != size or parameter.ds_zero_partition_world_size != world_size:
        # On a disk, or split over a part of the ranks.
        with whole(parameter):
            return parameter.detach().to("cpu", copy=True) if rank == 0 else None
    device = collective_device()
    if rank != 0:
        dist.send(shard.to(device), dst=0)
        return None
    found = _reserved((size * world_size,), shard.dtype, torch.device("cpu"))
    found[:size].copy_(shard)
    for source, part in enumerate(found.split(size)[1:], start=1):
        received = part if device.type == "cpu" else torch.empty_like(part, device=device)
        dist.recv(received, src=source)
        if received is not part:
            part.copy_(received)
    return found[: parameter.ds_numel].view(parameter.ds_shape)


def shards_of_rank_zero(init: Any, parameter: Tensor) -> None:
    """Give every rank its shard of what rank 0 has in ``parameter``, and free the whole. Collective.

    Args:
        init: of :func:`start_sharding`.
        parameter: whole; its numbers count on rank 0 only.
    """
    init._convert_to_zero_parameters([parameter])
    _clear_padding(parameter)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Entries of a value that stand in a tensor which an optimizer steps on this rank."""

    # Number of the value within its group.
    value: int
    tensor: Tensor
    # Where they begin in the tensor, and in the value.
    start: int
    offset: int
    # At least one.
    length: int


def pieces(values: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> tuple[list[Piece], Any, bool]:
    """Which entries of a group's ``values`` the ``tensors`` of a step have, whatever the stage.

    Returns:
        The pieces that this rank has; the process group that has the others; and whether there are others at all.
    """
    if len(values) == len(tensors) and all(v.shape == t.shape for v, t in zip(values, tensors, strict=True)):
        # Stage 0, and one value alone on one rank.
        whole_ones = [
            Piece(value=number, tensor=tensor, start=0, offset=0, length=tensor.numel())
            for number, tensor in enumerate(tensors)
            if tensor.numel()
        ]
        return whole_ones, None, False
    (flat,) = tensors
    found, group = [], None
    for number, values_of_weight in enumerate(values):
        value: Any = values_of_weight
        if is_sharded(value):
            sub_group, start, length = value._z3_optimizer.grad_position[value._z3_optimizer.get_param_id(value)]
            if value._z3_optimizer.fp32_partitioned_groups_flat[sub_group] is not flat:
                continue
            group = value.ds_process_group
            offset = length * _rank_in(group)
            # The last ranks may have padding.
            length = min(length, value.ds_numel - offset)
        else:
            group = value._dp_group
            if value._hp_mapping is None:
                continue
            start = value._hp_mapping.hp_fragment_address.start
            offset = value._hp_mapping.lp_fragment_address.start
            length = value._hp_mapping.lp_fragment_address.numel
        if length > 0:
            found.append(Piece(value=number, tensor=flat, start=start, offset=offset, length=length))
    return found, group, True


def _rank_in(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def engine_of(model: nn.Module) -> Any:
    """The newest DeepSpeed engine over ``model``, which others made (accelerate, a Trainer); None without one.

    An engine leaves no public trace on its module; the hook that it registers there, a closure, knows it.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    found = None
    for hook in model._forward_pre_hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            if isinstance(cell.cell_contents, DeepSpeedEngine) and cell.cell_contents.module is model:
                found = cell.cell_contents
    return found


def recorded_tensor_parallel_size() -> int:
    """Ranks that ``deepspeed.tp_model_init`` was told to split linears over in this process; 1 without it."""
    from deepspeed.runtime.tensor_parallel import init_utils

    return int((init_utils._TP_MODEL_INIT_ARGS or {}).get("tp_size", 1))


@torch.no_grad()
def set_shard(parameter: Any, change: Callable[[Tensor, int], Tensor]) -> None:
    """Set a ZeRO-3 parameter to what ``change`` makes of its fp32 master. Collective where it is kept gathered.

    Args:
        parameter: sharded.
        change: of part of the master, 1-D, and the place where that begins; gives the new numbers, in any dtype.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    part = parameter.ds_tensor.ds_numel
    local = safe_get_local_fp32_param(parameter)
    parameter.ds_tensor.data.copy_(change(local, part * _rank_in(parameter.ds_process_group)))
    if is_available(parameter):
        # A small one that stays gathered between steps.
        parameter.data.copy_(change(safe_get_full_fp32_param(parameter).view(-1), 0).view_as(parameter))


# What transformers sets on a model that it has loaded in 4 or 8 bits. With these there, it refuses to cast or train
# the model, and writes the quantization into the config of what is saved.
QUANTIZATION_ATTRIBUTES = (
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
)


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a transformers model, and of those inside it, each once."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return list(found.values())


def forget_quantization(model: nn.Module) -> dict[str, Any]:
    """Take away what transformers knows of the quantization of ``model``; nothing where that is no model of its.

    Returns:
        What was taken away, for :func:`recall_quantization`.
    """
    kept = {name: vars(model).pop(name) for name in QUANTIZATION_ATTRIBUTES if name in vars(model)}
    for config in _configs(model):
        for name in ("quantization_config", "_is_quantized"):
            if name in vars(config):
                kept.setdefault(name, []).append((config, vars(config).pop(name)))
    return kept


def recall_quantization(model: nn.Module, kept: dict[str, Any]) -> None:
    """Give back what :func:`forget_quantization` took away."""
    for name, value in kept.items():
        if name in QUANTIZATION_ATTRIBUTES:
            vars(model)[name] = value
        else:
            for config, setting in value:
                vars(config)[name] = setting


class Shard(NamedTuple):
    """A contiguous range of a parameter's entries that this rank holds."""

    # 1-D; DeepSpeed's own memory, without padding.
    tensor: Tensor
    # Position of its first entry in the flat parameter, and how many it has.
    start: int
    length: int


def is_available(parameter: Any) -> bool:
    """Whether all of ``parameter`` is on this rank now: it is not sharded, or gathered at the moment."""
    return not is_sharded(parameter) or parameter.ds_status.name == "AVAILABLE"


def states_on_disk(engine: Any) -> bool:
    """Whether stage 3 keeps masters and the optimizer's states on a disk."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def is_out_of_reach(parameter: Any) -> bool:
    """Whether a sharded parameter cannot be read and written in its shards: they are on a disk, or quantized."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    shard = parameter.ds_tensor
    return shard.final_location == OffloadDeviceEnum.nvme or hasattr(shard, "ds_quant_scale")


def shards_are_written() -> None:
    """Wait until what was written into shards is there: DeepSpeed gathers them on a stream of its own."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def own_shards(parameter: Any) -> list[Shard]:
    """What this rank holds of a sharded parameter: its shard, and that of its node with hpZ, if there is one now."""
    held = [(parameter.ds_tensor, parameter.ds_process_group)]
    if parameter.ds_secondary_tensor is not None:
        held.append((parameter.ds_secondary_tensor, parameter.ds_zero_param_process_group))
    found = []
    for tensor, group in held:
        start = min(tensor.ds_numel * _rank_in(group), parameter.ds_numel)
        length = min(tensor.ds_numel, parameter.ds_numel - start)
        found.append(Shard(tensor=tensor.data[:length], start=start, length=length))
    return found


def padded_shard(parameter: Any) -> Tensor:
    """This rank's shard with its padding: as long on every rank."""
    found: Tensor = parameter.ds_tensor.data
    return found


def shard_group(parameter: Any) -> Any:
    """The process group over which a parameter is sharded."""
    return parameter.ds_process_group


def end_gathers(model: nn.Module) -> None:
    """Let gathers of stage 3 that were started ahead end, and give back what nobody has used.

    The last forward may have started some for a backward that never came.
    """
    for module in model.modules():
        # On the module that the engine was made over.
        registry: Any = vars(module).get("ds_inflight_param_registry") or {}
        for parameter in list(registry):
            registry.pop(parameter).wait()
            if not parameter.ds_persist and not parameter.ds_active_sub_modules:
                parameter.partition()


def fetch(parameter: Any) -> Tensor:
    """The whole of ``parameter``, detached. Where stage 3 has not gathered it for a forward or backward: collective."""
    if not is_available(parameter):
        if parameter.ds_status.name == "INFLIGHT":
            # Its memory is there and not yet filled, and only DeepSpeed knows when it will be.
            raise RuntimeError(
                "a parameter is needed that stage 3 gathers ahead and has not waited for: set "
                "zero_optimization.stage3_prefetch_bucket_size to 0, and report the model"
            )
        # It is released with all others, at the latest when the optimizer steps.
        parameter.all_gather()
    found: Tensor = parameter.detach()
    return found


def has_saved_tensor_hooks() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` are in force: only the innermost ones are called."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def shares_storage(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same storage."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
