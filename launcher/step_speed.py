"""How many floating-point operations a second does a rank do, and what share is that of what its device can do?"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from launcher.device_peaks import Precision, peak_flops_per_second
from sparse_zero.flops import FlopShape, flop_shape, step_flops
from sparse_zero.layers.kernels import allows_tf32
from sparse_zero.module_map import ModuleMap


class UnknownDeviceWarning(UserWarning):
    """Nobody has told how fast the GPU can be at most, so that there is no MFU."""


def device_peak(device: torch.device, precision: Precision) -> float | None:
    """Operations a second that this rank's device can do at most; None if that is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = peak_flops_per_second(name, precision, tf32=allows_tf32())
    if found is None:
        warnings.warn(
            f"the peak speed of {name} in {precision} is not known: metrics have flops_per_second, and no mfu",
            UnknownDeviceWarning,
            stacklevel=2,
        )
    return found


class StepSpeed:
    """Counts the operations of whole steps (:mod:`sparse_zero.flops`), which all ranks share, by what they take.

    Padding and what gradient checkpointing computes again are not counted: they are no work of the model.

    Args:
        model: sparse, as it is trained.
        module_map: of its base.
        lengths: tokens of each training sample.
        response_tokens: those of them whose loss is counted, for which there are logits.
        world_size: ranks.
        peak: of a rank's device, in operations a second; None: not known.
    """

    def __init__(
        self, model: Any, module_map: ModuleMap, *, lengths: Sequence[int], response_tokens: Sequence[int],
        world_size: int, peak: float | None,
    ) -> None:  # fmt: skip
        self._map, self._lengths, self._response_tokens = module_map, lengths, response_tokens
        self._world_size, self._peak = world_size, peak
        self._shape: FlopShape
        self.look_at(model)

    def look_at(self, model: Any) -> None:
        """Another part of the model is trained from now on."""
        self._shape = flop_shape(model, self._map)

    def of_step(
        self, indices: Sequence[int], seconds: float, *, first_layer: int = 0, cached: float = 0.0
    ) -> dict[str, float]:
        """``flops_per_second`` of a rank, as a mean of all of them, and ``mfu`` if the device's peak is known.

        Args:
            indices: the samples of the global batch.
            seconds: that the step took.
            first_layer: the layers below were not run for some samples.
            cached: share of those; which ones is not asked.
        """
        done = (1 - cached) * self._operations(indices, 0)
        if cached:
            done += cached * self._operations(indices, first_layer)
        speed = done / self._world_size / seconds
        return {"flops_per_second": speed, **({} if self._peak is None else {"mfu": speed / self._peak})}

    def _operations(self, indices: Sequence[int], first_layer: int) -> int:
        return step_flops(
            self._shape,
            sample_lengths=[self._lengths[index] for index in indices],
            num_head_positions=sum(self._response_tokens[index] for index in indices),
            first_layer=first_layer,
        ).total
