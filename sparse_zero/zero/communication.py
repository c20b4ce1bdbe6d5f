"""How many bytes travel between ranks in a step: counted for a block of code, and by a formula?

The size of a collective is, here, that of the whole tensor it reduces, gathers or sends, as one rank hands it over or
gets it: of an all-reduce the tensor, of a reduce-scatter its input, of an all-gather its output, of a broadcast the
tensor. A ring of n ranks sends 2 (n - 1) / n of it per rank for an all-reduce, and (n - 1) / n for the others
(:func:`ring_bytes`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import placement_of, trainable_parameters
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement

# torch's operators below every function of torch.distributed, whatever the backend, by what they are.
_OPERATIONS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "send": "send",
    "recv": "receive",
    "barrier": "barrier",
}
_NAMESPACES = ("c10d", "_c10d_functional")
# Overflow flags and gradient norms on which the ranks agree, per optimizer step by stage (DeepSpeed 0.19.8).
_CONSTANT_BYTES = {0: 4, 1: 12, 2: 12, 3: 24}


@dataclass(kw_only=True)
class Traffic:
    """What one operation moved."""

    calls: int = 0
    # By the convention above.
    bytes: int = 0


class _Counter(TorchDispatchMode):
    """Sees every operator of this thread, and of the backward pass that it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[str, Traffic] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES:
            operation = _operation(func._schema.name.partition("::")[2])
            if operation is not None:
                traffic = self.traffic.setdefault(operation, Traffic())
                traffic.calls += 1
                if operation != "barrier":
                    traffic.bytes += max(map(_num_bytes, (*args, *(kwargs or {}).values(), result)))
        return result


def _operation(name: str) -> str | None:
    """What the operator ``name`` is; None where it only waits for another. Unknown ones keep their name."""
    plain = name.strip("_")
    if plain.startswith(("wait", "monitored_barrier")):
        return None
    found = [known for known in _OPERATIONS if plain.startswith(known)]
    return _OPERATIONS[max(found, key=len)] if found else plain


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors in one argument of an operator."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


@contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """Count the collectives of the block, DeepSpeed's and all others, on this rank.

    It looks at every tensor operation, so it costs time: count a few steps, not a run.

    Yields:
        Operation (``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast``, ...) to calls and bytes, filled
        as the block runs.
    """
    with _Counter() as counter:
        yield counter.traffic


def ring_bytes(traffic: Mapping[str, Traffic], world_size: int) -> int:
    """Bytes that one rank sends for ``traffic`` where every collective is a ring over ``world_size`` ranks."""
    shares = {"all_reduce": 2.0, "send": world_size / max(world_size - 1, 1), "receive": 0.0}
    return round(
        sum(
            each.bytes * shares.get(operation, 1.0) * (world_size - 1) / world_size
            for operation, each in traffic.items()
        )
    )


def step_communication(
    *,
    stage: int,
    world_size: int,
    num_values: int,
    num_weights: int = 0,
    values_itemsize: int = 4,
    weights_itemsize: int = 4,
    gradients_itemsize: int | None = None,
    accumulation: int = 1,
    placement: Placement = "inplace",
    gathered_values: int | None = None,
    gathered_weights: int | None = None,
    kept_values: int = 0,
    kept_weights: int = 0,
) -> dict[str, int]:
    """Bytes of one optimizer step's collectives, on one rank, by what they carry; by the module's convention.

    Stages 0 and 1 reduce the gradients of the values once a step; stages 2 and 3 after every micro-batch. Stages 1 and
    2 gather the updated values once a step. Stage 3 gathers what it shards when a module needs it: in forward, again in
    backward, and with gradient checkpointing for the repeated forward; what it keeps, once a step. Inplace it gathers
    the other values once more, for write-back. Padding to multiples of the ranks is left out.

    Args:
        stage: of ZeRO.
        world_size: ranks; alone, nothing travels.
        num_values: trained entries.
        num_weights: entries of the base that stage 3 shards.
        values_itemsize: bytes per value in the model.
        weights_itemsize: bytes per entry of the base.
        gradients_itemsize: bytes per gradient as it is reduced; default: that of the values.
        accumulation: micro-batches per optimizer step.
        placement: of the values; it matters at stage 3.
        gathered_values: stage 3: values gathered for one micro-batch; default: all of them, twice.
        gathered_weights: stage 3: entries of the base gathered for one micro-batch; default: all of them, twice.
        kept_values: stage 3: values that it keeps whole within a step, as it does with small parameters.
        kept_weights: stage 3: the same of the base.

    Returns:
        ``gradients``, ``values``, ``weights`` and ``constants`` (overflow flags and gradient norms).

    Raises:
        InputError: there is no such stage.
    """
    if stage not in _CONSTANT_BYTES:
        raise InputError(f"stage is {stage!r}: choose 0, 1, 2 or 3")
    found = {"gradients": 0, "values": 0, "weights": 0, "constants": 0}
    if world_size == 1:
        return found
    gradients_itemsize = values_itemsize if gradients_itemsize is None else gradients_itemsize
    found["gradients"] = num_values * gradients_itemsize * (accumulation if stage >= 2 else 1)
    found["constants"] = _CONSTANT_BYTES[stage]
    if stage in (1, 2):
        found["values"] = num_values * values_itemsize
    if stage == 3:
        gathered = 2 * num_weights if gathered_weights is None else gathered_weights
        found["weights"] = weights_itemsize * (accumulation * gathered + kept_weights)
        gathered = 2 * num_values if gathered_values is None else gathered_values
        written = num_values - kept_values if placement == "inplace" else 0
        found["values"] = values_itemsize * (accumulation * gathered + kept_values + written)
    return found


def engine_communication(engine: Any) -> dict[str, int]:
    """:func:`step_communication` of an engine over a sparsified model, with its settings and sizes.

    At stage 3 modules are taken to run in the order in which they are registered, backward to end at the lowest one
    with values, and a parameter to stay gathered from forward to backward where ``stage3_max_reuse_distance`` says so.
    What DeepSpeed keeps beyond that, since it has fetched ahead (``stage3_prefetch_bucket_size``), is left out: then
    fewer bytes travel than this says.
    """
    module: nn.Module = engine.module
    values = trainable_parameters(module)
    first = next(iter(values.values()))
    weights = [each for name, each in module.named_parameters() if name not in values]
    arguments: dict[str, int] = {}
    if engine.zero_optimization_stage() == 3:
        arguments = _gathered(module, {id(each) for each in values.values()}, engine.zero_max_reuse_distance())
    return step_communication(
        stage=engine.zero_optimization_stage(),
        world_size=dist.get_world_size(),
        num_values=sum(map(compat.full_numel, values.values())),
        values_itemsize=first.element_size(),
        weights_itemsize=weights[0].element_size() if weights else 0,
        gradients_itemsize=engine.communication_data_type.itemsize,
        accumulation=engine.gradient_accumulation_steps(),
        placement=placement_of(module),
        **arguments,
    )


def _gathered(module: nn.Module, values: set[int], reuse_distance: int) -> dict[str, int]:
    """What ZeRO-3 gathers for a micro-batch, and keeps: arguments of :func:`step_communication`."""
    found = {"gathered_values": 0, "gathered_weights": 0, "kept_values": 0, "kept_weights": 0}
    kept: set[int] = set()
    parts = [(name, list(part.parameters(recurse=False))) for name, part in module.named_modules()]
    flagged = [f"{name}." for name, part in module.named_modules() if getattr(part, "gradient_checkpointing", False)]
    # A model says so, too, and means its layers: the innermost are what is repeated.
    repeats = {outer: "" for outer in flagged if not any(each != outer and each.startswith(outer) for each in flagged)}
    trained = (number for number, (_, own) in enumerate(parts) if any(id(each) in values for each in own))
    lowest = 0 if compat.inputs_require_grad(module) else next(trained)
    num_later = 0  # entries of the modules that run after this one
    for number, (name, own) in reversed(list(enumerate(parts))):
        sharded = [each for each in own if not compat.is_persistent(each)]
        times = 1
        if number >= lowest and 2 * num_later >= reuse_distance:
            times = 2
            for outer in repeats:
                if sharded and name.startswith(outer):
                    # The backward of the last module gathers first, and starts the repetition, which finds it there.
                    repeats[outer] = repeats[outer] or name
                    times += name != repeats[outer]
        for each in own:
            what = "values" if id(each) in values else "weights"
            size = compat.full_numel(each)
            if not compat.is_persistent(each):
                found[f"gathered_{what}"] += times * size
            elif id(each) not in kept:
                found[f"kept_{what}"] += size
                kept.add(id(each))
            num_later += size
    return found
