"""Which settings of a run make it take less memory, to which values, and what does each cost?"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from launcher.config import RunConfig

# Expected seconds of a step, as multiples; rules of thumb, for the order only. Recomputing adds a forward pass to the
# forward pass and the pass for the inputs' gradients.
_CHECKPOINTING, _HALF_BATCH, _STAGE_3, _OFFLOADED_STATES, _OFFLOADED_BASE, _DEQUANTIZING = 1.5, 1.05, 1.3, 1.1, 2.5, 1.3
# What a change of the result counts for, beside ln(slowdown): rounding the base, and training less or on less.
_ROUNDED, _LESS = 0.5, 0.8
# The shortest samples, and the smallest share of the budget, that are proposed.
_LEAST_LENGTH, _LEAST_SHARE = 128, 0.25


@dataclass(frozen=True, kw_only=True)
class Option:
    """A value of a setting, with which a run takes less memory."""

    overrides: tuple[str, ...]
    cost: str
    slowdown: float = 1.0
    # 0: the same result up to rounding of sums.
    penalty: float = 0.0


def _stages(config: RunConfig, world_size: int, on_host: bool) -> list[Option]:
    stage, found = config.zero.stage, []
    if world_size > 1:
        found += [
            Option(overrides=(f"--zero.stage={each}",), cost="as fast")
            for each in (1, 2)
            if each > stage and (each == 2 or stage == 0)
        ]
        if stage < 3:
            found.append(Option(overrides=("--zero.stage=3",), cost="slower: gathers weights", slowdown=_STAGE_3))
    if not on_host and config.zero.offload_base == "none" and config.model.quantization == "none":
        found.append(
            Option(
                overrides=("--zero.stage=3", "--zero.offload_base=cpu"),
                cost="much slower: weights come from the host",
                slowdown=_OFFLOADED_BASE,
            )
        )
    return found


def _halvings(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def dimensions(config: RunConfig, world_size: int, on_host: bool, *, can_pack: bool) -> list[list[Option]]:
    """The settings that can be changed; of each, its options, every one smaller than the one before."""
    training, budget = config.training, config.selection.budget
    found = [_stages(config, world_size, on_host)]
    found.append(
        [
            Option(
                overrides=(f"--training.micro_batch_size={size}",),
                cost="a little slower: more micro-batches, the same global batch",
                slowdown=_HALF_BATCH**number,
            )
            for number, size in enumerate(_halvings(training.micro_batch_size, 1), start=1)
        ]
    )
    if not training.gradient_checkpointing:
        option = "--training.gradient_checkpointing=true"
        found.append([Option(overrides=(option,), cost="slower: forward runs twice", slowdown=_CHECKPOINTING)])
    if not on_host and config.zero.offload_optimizer == "none" and config.zero.stage:
        option = "--zero.offload_optimizer=cpu"
        found.append([Option(overrides=(option,), cost="a little slower: states come from the host",
                              slowdown=_OFFLOADED_STATES)])  # fmt: skip
    if config.data.batching == "pad" and can_pack:
        found.append([Option(overrides=("--data.batching=pack",), cost="as fast: no padding")])
    found.append(
        [
            Option(
                overrides=(f"--data.max_length={length}",), cost="samples are cut", penalty=_LESS * number, slowdown=1.0
            )
            for number, length in enumerate(_halvings(config.data.max_length, _LEAST_LENGTH), start=1)
        ]
    )
    if config.selection.file is None and budget is not None:
        for name in ("fraction", "parameters", "bytes", "regions"):
            amount = getattr(budget, name)
            if amount is not None:
                smaller = [amount * share for share in (0.5, _LEAST_SHARE)]
                values = [each if name == "fraction" else max(1, int(each)) for each in smaller]
                found.append(
                    [
                        Option(overrides=(f"--selection.budget.{name}={value}",), cost="less is trained",
                                penalty=_LESS * number)
                        for number, value in enumerate(values, start=1)
                    ]
                )  # fmt: skip
    quantizable = config.model.gguf_file is None and config.selection.calibration_weights == "frozen"
    if config.model.quantization == "none" and quantizable and importlib.util.find_spec("bitsandbytes"):
        found.append(
            [
                Option(
                    overrides=("--model.quantization=nf4", "--zero.placement=delta"),
                    cost="slower, and the base is rounded to 4 bits",
                    slowdown=_DEQUANTIZING,
                    penalty=_ROUNDED,
                )
            ]
        )
    return [options for options in found if options]
