"""Which of DeepSpeed's settings does a sparse model not go along with, and how are they refused?

Messages name a setting as DeepSpeed does, and the field of a run config that sets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_zero.errors import InputError
from sparse_zero.zero.config import Placement, bf16_section, low_precision, zero_stage

if TYPE_CHECKING:
    from torch import nn


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


def offload_device(settings: Mapping[str, Any], section: str) -> str | None:
    """The device that ``offload_optimizer`` or ``offload_param`` names; None where nothing is offloaded."""
    found = (settings.get("zero_optimization") or {}).get(section)
    device = found.get("device", "none") if isinstance(found, Mapping) else "none"
    return None if device in ("none", "auto") else str(device)


def _check_offload(settings: Mapping[str, Any], stage: int, placement: Placement) -> None:
    """Refuse offloading that does not go with the stage or the placement."""
    optimizer, base = offload_device(settings, "offload_optimizer"), offload_device(settings, "offload_param")
    optimizer_is = f"zero_optimization.offload_optimizer.device (zero.offload_optimizer) is {optimizer!r}"
    base_is = f"zero_optimization.offload_param.device (zero.offload_base) is {base!r}"
    if optimizer is not None and stage == 0:
        raise InputError(f"{optimizer_is} at zero stage 0, which offloads nothing: use stage 1, 2 or 3, or none")
    if optimizer == "nvme" and stage < 3:
        # DeepSpeed would take the host's memory instead, without a word.
        raise InputError(
            f"{optimizer_is} at zero stage {stage}, where DeepSpeed offloads to host memory only: use cpu, or stage 3"
        )
    if base is not None and stage < 3:
        raise InputError(
            f"{base_is} at zero stage {stage}, where every rank holds the whole base: use stage 3, or none"
        )
    if base == "nvme" and placement == "inplace":
        raise InputError(
            f"{base_is} with placement 'inplace', which writes into the base after each step: use cpu, or placement "
            "'delta'"
        )


# Of ZeRO++: weights that are stored quantized, and all that is quantized on its way between ranks, which only CUDA
# kernels do.
STORED_QUANTIZED = "zero_quantized_nontrainable_weights"
QUANTIZED = ("zero_quantized_weights", STORED_QUANTIZED, "zero_quantized_gradients")
HPZ = "zero_hpz_partition_size"


def _check_zero_plus_plus(section: Mapping[str, Any], stage: int, placement: Placement) -> None:
    """Refuse what of ZeRO++ cannot work with the stage or the placement."""
    quantized = [name for name in QUANTIZED if section.get(name)]
    for name in quantized if section.get(HPZ, 1) == 1 else [*quantized, HPZ]:
        if stage != 3:
            raise InputError(
                f"zero_optimization.{name} (zero.options.{name}) is set at zero stage {stage}, which gathers no "
                "weights: use stage 3"
            )
    if section.get(STORED_QUANTIZED) and placement == "inplace":
        raise InputError(
            f"zero_optimization.{STORED_QUANTIZED} (zero.options.{STORED_QUANTIZED}) is set with placement 'inplace', "
            "which writes into the weights: use placement 'delta', or remove it"
        )


def check_finds_overflow(settings: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed config that keeps ZeRO from finding gradients that are not finite: they reach the weights.

    Raises:
        InputError: names the setting.
    """
    section, stage, precision = settings.get("zero_optimization") or {}, zero_stage(settings), low_precision(settings)
    if stage in (1, 2) and precision is None and section.get("compute_grad_norm") is False:
        raise InputError(
            "zero_optimization.compute_grad_norm (zero.options.compute_grad_norm) is false in fp32, where DeepSpeed "
            "finds gradients that are not finite by their norm: leave it at true, so that such a step is skipped"
        )
    if stage in (1, 2) and precision == "bf16" and bf16_section(settings).get("check_grad_overflow") is False:
        raise InputError(
            f"bf16.check_grad_overflow is false at zero stage {stage}, where gradients that are not finite would reach "
            "the weights: leave it at true, so that such a step is skipped"
        )


def check_settings(settings: Mapping[str, Any], placement: Placement) -> None:
    """Refuse a DeepSpeed config that no sparse model of this placement could be trained with.

    Raises:
        InputError: names the setting and what to use instead.
    """
    section, stage = settings.get("zero_optimization") or {}, zero_stage(settings)
    check_settings_not_split(settings)
    if (settings.get("fp16") or {}).get("enabled") and stage == 0:
        raise InputError(
            "fp16.enabled (training.precision fp16) at zero stage 0, where DeepSpeed scales the loss in a way that no "
            "checkpoint holds: use stage 1, 2 or 3, or bf16"
        )
    check_finds_overflow(settings)
    _check_offload(settings, stage, placement)
    _check_zero_plus_plus(section, stage, placement)


def check_not_split(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse tensor and expert parallelism, before DeepSpeed has touched the model.

    Args:
        model: sparsified.
        settings: DeepSpeed's config.

    Raises:
        InputError: names the setting, or the parameter, and what to use instead.
    """
    from torch.distributed.tensor import DTensor  # heavy, and not for those who only look at settings

    from sparse_zero.zero import compat

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
