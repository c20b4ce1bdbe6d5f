"""Which ZeRO stage, placement, checkpointing and offloading let a run fit, and which of them is the fastest?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.plan.planned_run import Gpu, PlannedRun
from sparse_zero.errors import InputError
from sparse_zero.zero.unsupported import check_settings

# Rough, and for the order only: what a GPU computes a second in bf16 (half of an A100's peak), what leaves a rank for
# another in a second (PCIe 4), and what goes between it and its host.
FLOPS = 150e12
WIRE_BYTES_PER_SECOND = 25e9
HOST_BYTES_PER_SECOND = 12e9
# The share of its speed that a GPU reaches on small products.
_SMALL_PRODUCTS = 0.25


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to lay a run out."""

    run: PlannedRun
    # Of one optimizer step; rough.
    seconds: float
    # Reduced and gathered in an optimizer step, by the formula of sparse_zero.zero.communication.
    wire_bytes: int
    # Forward, backward towards the inputs, the forward that checkpointing repeats.
    passes: int

    @property
    def label(self) -> str:
        """In words, for sentences: "stage 3, delta, with checkpointing, base on the host"."""
        job = self.run.job
        parts = [f"stage {job.stage}"]
        if job.method == "selection":
            parts.append(job.placement)
        parts.append("checkpointing" if job.gradient_checkpointing else "no checkpointing")
        if offloaded(job) != "none":
            parts.append(f"{offloaded(job)} on the host")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """For files."""
        job = self.run.job
        return {
            "stage": job.stage,
            "placement": job.placement if job.method == "selection" else None,
            "gradient_checkpointing": job.gradient_checkpointing,
            "offload_optimizer": job.offload_optimizer,
            "offload_base": job.offload_base,
            "peak_bytes": self.run.peak_bytes,
            "needed_bytes": self.run.needed_bytes,
            "host_bytes": self.run.host_bytes,
            "wire_bytes_per_step": self.wire_bytes,
            "communication_bytes_per_step": self.run.communication,
            "passes": self.passes,
            "rough_seconds_per_step": self.seconds,
        }


def offloaded(job: Any) -> str:
    """What lies in host memory: "optimizer", "base", "base and optimizer", "none"."""
    parts = [
        name
        for name, place in (("base", job.offload_base), ("optimizer", job.offload_optimizer))
        if place != "none"
    ]  # fmt: skip
    return " and ".join(parts) or "none"


def sent_bytes(run: PlannedRun) -> float:
    """What one rank sends in an optimizer step where every collective is a ring."""
    found, ranks, stage = run.communication, run.world_size, run.job.stage
    share = (ranks - 1) / ranks
    # Stage 3 reduce-scatters gradients, the others all-reduce them.
    return share * (found["gradients"] * (1 if stage == 3 else 2) + found["values"] + found["weights"])


def judge(run: PlannedRun) -> Setting:
    """What a step of the run costs, roughly."""
    job, shape = run.job, run.shapes.shape
    passes = 2 + job.gradient_checkpointing
    tokens = job.tokens * job.accumulation
    trained = run.num_trained
    active = shape.num_parameters
    if shape.num_experts:
        # A token goes through a few of the experts, which are nearly all of the other parameters.
        idle = 1 - shape.experts_per_token / shape.num_experts
        active -= int(shape.num_layers * shape.other_parameters * idle)
    compute = 2 * tokens * (passes * active + min(trained, active)) / FLOPS
    if job.placement == "delta" or job.method in ("lora", "dora"):
        # A product of the values in every pass, too small to keep a GPU busy.
        compute += 2 * tokens * passes * trained / (_SMALL_PRODUCTS * FLOPS)
    held = job.share(shape.num_parameters) * job.element_bytes
    # Shards come from the host for every pass; gradients go there and values come back.
    moved = passes * job.accumulation * held if job.offload_base != "none" else 0
    moved += 2 * job.element_bytes * job.share(trained) if job.offload_optimizer != "none" else 0
    return Setting(
        run=run,
        seconds=compute + sent_bytes(run) / WIRE_BYTES_PER_SECOND + moved / HOST_BYTES_PER_SECOND,
        wire_bytes=sum(run.communication.values()),
        passes=passes,
    )


def possible(run: PlannedRun) -> Iterator[PlannedRun]:
    """The run by every stage, placement, checkpointing and offloading to the host that goes together."""
    placements = ("inplace", "delta") if run.job.method == "selection" else ("inplace",)
    for stage, placement, checkpointing, optimizer, base in itertools.product(
        (0, 1, 2, 3), placements, (False, True), ("none", "cpu"), ("none", "cpu")
    ):
        settings = {
            "zero_optimization": {
                "stage": stage,
                "offload_optimizer": {"device": optimizer},
                "offload_param": {"device": base},
            },
            "fp16": {"enabled": run.job.precision == "fp16"},
        }
        try:
            check_settings(settings, placement)  # type: ignore[arg-type]
            changed = run.but(
                stage=stage,
                placement=placement,
                gradient_checkpointing=checkpointing,
                offload_optimizer=optimizer,
                offload_base=base,
            )
            changed.job  # noqa: B018 - refuses what does not go with a quantized base
        except InputError:
            continue
        yield changed


def settings_that_fit(run: PlannedRun, gpu: Gpu) -> tuple[list[Setting], Setting]:
    """Every layout of the run that fits, the fastest first, and the one that needs the least, fitting or not."""
    found = [judge(each) for each in possible(run)]
    least = min(found, key=lambda each: (each.run.needed_bytes, each.seconds))
    fitting = [each for each in found if each.run.fits(gpu)]
    # Of two that are as fast, the run as it is, then the one that needs less.
    fitting.sort(
        key=lambda each: (float(f"{each.seconds:.4g}"), each.run.job.stage != run.job.stage, each.run.needed_bytes)
    )
    return fitting, least


def why(best: Setting, others: list[Setting]) -> str:
    """In words, what speaks for the fastest."""
    from launcher.summary import format_bytes

    job = best.run.job
    parts = []
    if job.gradient_checkpointing:
        parts.append("forward is computed twice, for its activations do not fit otherwise")
    else:
        parts.append("nothing is computed twice")
    if best.run.world_size > 1:
        parts.append(f"{format_bytes(best.wire_bytes)} are reduced and gathered a step")
    more = [each for each in others if each.run.job.stage != job.stage]
    largest = max(more, key=lambda each: each.wire_bytes, default=None)
    if largest is not None and largest.wire_bytes > 1.5 * best.wire_bytes:
        text = f"at stage {largest.run.job.stage} it would be {format_bytes(largest.wire_bytes)}"
        if largest.run.job.stage == 3:
            text += ", for the base is gathered in every pass"
        parts.append(text)
    elif job.stage == 3:
        parts.append("no lower stage fits, for each rank would hold the whole base")
    if offloaded(job) != "none":
        parts.append(f"{offloaded(job)} in {format_bytes(best.run.host_bytes)} of host memory a rank")
    return "; ".join(parts)
