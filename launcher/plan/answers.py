"""What does `sparse-zero plan` answer: does the run fit, what would, and beside what?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType

from launcher.plan import tables
from launcher.plan.comparisons import compared, models_that_fit
from launcher.plan.defaults import LORA_RANK
from launcher.plan.planned_run import SAFE_SHARE, Gpu, PlannedRun
from launcher.plan.questions import (
    MAX_RANKS,
    check_lora_rank,
    fewest,
    gpus_needed,
    largest_batch,
    largest_budget,
    largest_length,
)
from launcher.plan.search import changes_that_fit
from launcher.plan.settings import settings_that_fit, why
from launcher.summary import format_bytes
from launcher.training_config import DTYPE_OF_PRECISION
from sparse_zero.files import atomic_write_bytes
from sparse_zero.memory.device import device_overhead
from sparse_zero.prefix.encoding import bytes_per_token


@dataclass(kw_only=True)
class Answer:
    """All that one call tells."""

    # For --json.
    found: dict[str, Any] = field(default_factory=dict)
    # Tables and sentences, in their order.
    shown: list[RenderableType] = field(default_factory=list)
    # What was asked for fits, or nothing was asked.
    fits: bool = True
    # For the picture; None where only the simulation tells.
    run: PlannedRun | None = None
    name: str = ""
    simulated: dict[str, Any] | None = None
    gpu: Gpu | None = None

    def show(self) -> None:
        """Print it."""
        out = tables.console()
        for each in self.shown:
            out.print(each)

    def draw(self, file: Path, timeline: Path | None = None) -> None:
        """Write the picture of the phases, a PNG; and of a step and what it keeps, beside it, where it was simulated.

        Args:
            file: of the first; the others' names end with ``-step`` and ``-step-kept``.
            timeline: what :func:`launcher.plan.simulation.simulate_run` wrote.
        """
        from launcher.memory.plots import phases_figure, terms_by_phase
        from launcher.memory.timeline_plots import plot_timeline, read_timeline
        from launcher.plots import to_png

        phases = {} if self.simulated is None else self.simulated["phases"]
        if self.run is not None:
            terms, beside = terms_by_phase(self.run.forecast), self.run.overhead.num_bytes
            marks = {phase: int(row["peak_bytes"]) for phase, row in phases.items()}
        else:
            # The bars are the simulation's own.
            terms, marks = {phase: row["by_kind"] for phase, row in phases.items()}, {}
            beside = self.found["needed_bytes"] - self.found["peak_bytes"]
        ranks, stage = self.found["world_size"], self.found["stage"]
        picture = to_png(
            phases_figure(
                terms,
                heading=f"{self.name}: memory of one of {ranks} rank{'s' * (ranks > 1)} at stage {stage}",
                simulated=marks,
                usable_bytes=None if self.gpu is None else self.gpu.usable_bytes - beside,
            )
        )
        atomic_write_bytes(file, picture)
        if timeline is not None and timeline.is_file():
            step = file.with_name(f"{file.stem}-step{file.suffix}")
            plot_timeline(read_timeline(timeline), step, heading=self.name)


def about(
    run: PlannedRun,
    method: str,
    *,
    gpu: Gpu | None,
    name: str,
    find: str | None = None,
    compare: bool = False,
    simulate: bool = False,
    timeline: Path | None = None,
    lora_rank: int = LORA_RANK,
) -> Answer:
    """The answer about one run.

    Args:
        run: that is asked about.
        method: what its method is called.
        gpu: on which it shall fit; needed for ``find``.
        name: of the run or its model, for headings.
        find: one of ``launcher.plan.questions.QUESTIONS``; None: only whether it fits.
        compare: show other methods beside it.
        simulate: run the real code on tensors without data, too.
        timeline: a JSON file for what it held when.
        lora_rank: of the other methods.

    Raises:
        InputError: the question does not go with the run.
    """
    check_lora_rank(run)
    answer = Answer(run=run, name=name, gpu=gpu)
    job = run.job
    answer.found = {
        "world_size": run.world_size,
        "method": method,
        "stage": job.stage,
        "placement": job.placement,
        "precision": job.precision,
        "micro_batch": [job.rows, job.row_length],
        "parameters": run.shapes.shape.num_parameters,
        "trained": run.num_trained,
        "peak_bytes": run.peak_bytes,
        # Of a GPU, with what is no tensor.
        "needed_bytes": run.needed_bytes,
        "host_bytes": run.host_bytes,
        "communication_bytes_per_step": run.communication,
        "phases": run.forecast.to_json(),
    }
    if find is None:
        _add_forecast(answer, run, gpu, simulate=simulate, timeline=timeline)
    if find is not None and gpu is not None:
        _find(answer, run, gpu, find)
    if compare:
        others = compared(run, method, gpu, lora_rank)
        answer.found["compare"] = [each.to_json() for each in others]
        answer.shown.append(tables.compare_table(others, gpu))
    return answer


def _add_forecast(answer: Answer, run: PlannedRun, gpu: Gpu | None, *, simulate: bool, timeline: Path | None) -> None:
    if simulate:
        from launcher.plan.simulation import simulate_run  # heavy, and a process of its own

        answer.simulated = answer.found["simulation"] = simulate_run(
            run.config, run.world_size, timeline=timeline, **run.changes
        )
    answer.shown.append(tables.phases_table(run, answer.name, answer.simulated))
    _add_prefix_cache(answer, run)
    if gpu is None:
        return
    tensors, fragments = run.peak_bytes, run.overhead.fragment_bytes
    if answer.simulated is not None:
        # Its allocations were replayed, which tells more of fragments than an estimate does.
        other = int(answer.simulated["needed_bytes"])
        if other > tensors + fragments:
            tensors = int(answer.simulated["peak_bytes"])
            fragments = other - tensors
    cuda = run.overhead.context_bytes + run.overhead.workspace_bytes
    answer.fits = answer.found["fits"] = tensors + fragments + cuda <= gpu.usable_bytes
    answer.shown.append(verdict(tensors, fragments, cuda, gpu))
    if not answer.fits:
        _add_changes(answer, run, gpu)


def _add_prefix_cache(answer: Answer, run: PlannedRun) -> None:
    """What the hidden states of the training data take of a disk. Of a GPU's memory, its steps take no more for it."""
    cache = run.config.training.prefix_cache
    if cache is None:
        return
    compute = getattr(torch, DTYPE_OF_PRECISION[run.config.training.precision])
    per_token = bytes_per_token(run.shapes.shape.hidden_size, cache.dtype, compute)
    answer.found["prefix_cache"] = {"bytes_per_token": per_token, "max_bytes": cache.max_bytes}
    bound = (
        "" if cache.max_bytes is None else f", at most {format_bytes(cache.max_bytes)} (training.prefix_cache.max_gib)"
    )
    answer.shown.append(
        f"Frozen-prefix cache: {per_token:,} bytes for each token of the training data, "
        f"{format_bytes(per_token * 10**6)} for a million{bound}; on disk, not on the GPU."
    )


def verdict(tensor_bytes: int, fragment_bytes: int, cuda_bytes: int, gpu: Gpu) -> str:
    """Whether a rank fits on its GPU, in one sentence."""
    fits = "fits" if tensor_bytes + fragment_bytes + cuda_bytes <= gpu.usable_bytes else "does not fit"
    return (
        f"{format_bytes(tensor_bytes)} of tensors, about {format_bytes(fragment_bytes)} lost to fragments and "
        f"{format_bytes(cuda_bytes)} of CUDA: it {fits} into {SAFE_SHARE:.0%} of {gpu.gib:g} GiB"
    )


def _add_changes(answer: Answer, run: PlannedRun, gpu: Gpu) -> None:
    changes = changes_that_fit(
        run.config,
        run.world_size,
        gpu.usable_bytes,
        run.shapes,
        run.selection,
        overhead=lambda job: device_overhead(run.shapes.shape, job).num_bytes,
        most=2,
        **run.changes,
    )
    answer.found["changes"] = [
        {"overrides": list(each.overrides), "cost": each.cost, "peak_bytes": each.forecast.peak_bytes}
        for each in changes
    ]
    answer.shown += tables.change_lines(changes)


def _find(answer: Answer, run: PlannedRun, gpu: Gpu, find: str) -> None:
    if find == "gpus":
        found = gpus_needed(run, gpu)
        best = fewest(found)
        answer.fits = best is not None
        answer.found["gpus"] = [each.to_json() for each in found]
        answer.shown.append(tables.gpus_table(found, gpu))
        if best is None:
            answer.shown.append(f"No stage fits on up to {MAX_RANKS} GPUs of {gpu.gib:g} GiB.")
            _add_changes(answer, run.but(world_size=8), gpu)
        else:
            answer.shown.append(tables.phases_table(best.run, answer.name, None))
            where = "every stage" if all(each.num_gpus == best.num_gpus for each in found) else f"stage {best.stage}"
            answer.shown.append(
                f"{best.num_gpus} GPU{'s' * ((best.num_gpus or 0) > 1)} of {gpu.gib:g} GiB, at {where}."
            )
    elif find == "stage":
        settings, least = settings_that_fit(run, gpu)
        answer.fits = bool(settings)
        answer.found["settings"] = [each.to_json() for each in settings]
        answer.found["least"] = least.to_json()
        if settings:
            answer.found["why"] = f"{settings[0].label}: {why(settings[0], settings)}"
            answer.shown.append(tables.settings_table(settings, gpu, run.world_size))
            answer.shown.append(f"{answer.found['why'][0].upper()}{answer.found['why'][1:]}.")
        else:
            needed = f"{format_bytes(least.run.needed_bytes)} of {format_bytes(gpu.usable_bytes)} usable"
            answer.shown.append(
                f"Nothing fits on {run.world_size} x {gpu.gib:g} GiB. The least is {needed}: {least.label}."
            )
            _add_changes(answer, run, gpu)
    else:
        search = {"batch": largest_batch, "length": largest_length, "budget": largest_budget}[find]
        largest = search(run, gpu)
        answer.fits = largest.value is not None
        answer.found["largest"] = largest.to_json()
        answer.shown += tables.largest_lines(largest, gpu)
        batch = run.config.training.global_batch_size
        if find == "batch" and largest.value == batch:
            answer.shown.append(f"A micro-batch is no larger than training.global_batch_size, which is {batch}.")
        positions = getattr(run.shapes.model.config, "max_position_embeddings", None)
        if find == "length" and isinstance(positions, int) and (largest.value or 0) > positions:
            answer.shown.append(f"The model was trained on {positions:,} positions.")
        if largest.value is None:
            # What is short or little already is no help where even one sample of the run does not fit.
            _add_changes(answer, largest.run if find == "batch" else run, gpu)


def fitting_models(
    method: str, world_size: int, gpu: Gpu, overrides: Sequence[str] = (), lora_rank: int = LORA_RANK
) -> Answer:
    """The answer to which built-in models fit.

    Raises:
        InputError: an override does not hold.
    """
    found = models_that_fit(method, world_size, gpu, overrides, lora_rank=lora_rank)
    largest = next((each for each in found if each.fits), None)
    answer = Answer(fits=largest is not None, gpu=gpu)
    answer.found = {
        "world_size": world_size,
        "method": method,
        "gpu_gib": gpu.gib,
        "largest": None if largest is None else largest.name,
        "models": [each.to_json() for each in found],
    }
    answer.shown.append(tables.models_table(found, gpu, world_size, method))
    answer.shown.append(
        "None of them fits." if largest is None else f"The largest that fits is {largest.name}."
    )  # fmt: skip
    return answer
