"""Which ways to split a model over ranks does a sparse one not go along with, and how are they refused?"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from sparse_zero.errors import InputError
from sparse_zero.zero import compat


def _refuse_autotp(size: int) -> None:
    if size > 1:
        raise InputError(
            f"tensor_parallel.autotp_size (or tp_model_init's tp_size) is {size}: AutoTP puts sliced linears of its "
            "own in the place of sparse ones, whose values are lost; leave it out: ZeRO stage 3 shards the base as well"
        )


def check_settings_not_split(settings: Mapping[str, Any]) -> None:
    """Refuse what of DeepSpeed's config asks for tensor or expert parallelism.

    Raises:
        InputError: names the setting and what to use instead.
    """
    _refuse_autotp(int((settings.get("tensor_parallel") or {}).get("autotp_size") or 1))
    if (settings.get("expert_parallel") or {}).get("enabled"):
        raise InputError(
            "expert_parallel.enabled is true: AutoEP swaps the experts for its own, which hold no values. Leave it "
            "out: ZeRO stage 3 shards the experts as well"
        )


def check_not_split(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse tensor and expert parallelism, before DeepSpeed has touched the model.

    Args:
        model: sparsified.
        settings: DeepSpeed's config.

    Raises:
        InputError: names the setting, or the parameter, and what to use instead.
    """
    check_settings_not_split(settings)
    _refuse_autotp(compat.recorded_tensor_parallel_size())
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor):
            raise InputError(
                f"{name} is a DTensor, split over ranks by tensor parallelism or FSDP: load the model whole, or under "
                "DeepSpeed ZeRO stage 3"
            )


def check_sequence_parallel(engine: Any) -> None:
    """Refuse sequence parallelism where nobody could say by what factor gradients come out.

    Stages 0 to 2 sum the gradients of a sequence's ranks, stage 3 averages them; with ``reduce_scatter`` off it sums
    those that fit a bucket, and averages the others.

    Raises:
        InputError: names the setting.
    """
    if engine.sequence_parallel_size > 1 and engine.zero_optimization_stage() == 3 and not engine.zero_reduce_scatter():
        raise InputError(
            "zero_optimization.reduce_scatter is false at stage 3 with sequence parallelism: DeepSpeed would sum some "
            "gradients and average others; leave it at its default"
        )
