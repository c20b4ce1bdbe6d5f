"""How are the answers of a plan shown on a terminal, in 80 to 110 columns?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.summary import ABSENT, format_bytes, format_count, format_percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from launcher.plan.comparisons import Compared, ModelFit
    from launcher.plan.planned_run import Gpu, PlannedRun
    from launcher.plan.questions import Gpus, Largest
    from launcher.plan.search import Change
    from launcher.plan.settings import Setting
    from sparse_zero.memory.closed_form.job import MemoryJob

_MIN_WIDTH, _MAX_WIDTH = 80, 110
# Terms of a phase that are named on the terminal; all are in the JSON and the plot.
_NAMED_SHARE = 0.03
_MAX_ROWS = 10


def console() -> Console:
    """Where tables go: as wide as the terminal, within what they are made for."""
    from rich.console import Console

    if not sys.stdout.isatty():
        return Console(width=_MAX_WIDTH, highlight=False, soft_wrap=False)
    return Console(width=max(_MIN_WIDTH, min(Console().width, _MAX_WIDTH)), highlight=False)


def _table(title: str, caption: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        pad_edge=False,
    )


def _columns(table: Table, *names: str, right: Sequence[str] = ()) -> None:
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")


def describe(run: PlannedRun) -> str:
    """What is planned, in one line."""
    return describe_job(run.job, run.num_trained, run.shapes.shape.num_parameters)


def describe_job(job: MemoryJob, trained: int, total: int) -> str:
    """A job that trains so many of all parameters, in one line."""
    parts = [
        f"{job.world_size} rank{'s' * (job.world_size > 1)}",
        f"stage {job.stage}",
        *([job.placement] if job.method == "selection" else [job.method]),
        *([job.quantization] if job.quantization != "none" else []),
        job.precision,
        f"micro-batch {job.micro_batch} x {job.length}",
        "checkpointing" if job.gradient_checkpointing else "no checkpointing",
        f"{format_percent(trained / total)} trained",
    ]
    return ", ".join(parts)


def _made_of(terms: Mapping[str, int], total: int) -> str:
    """The terms of so many bytes in all that are worth a name, the largest first."""
    named = sorted(terms.items(), key=lambda each: -each[1])
    return ", ".join(f"{term} {format_bytes(value)}" for term, value in named if value >= _NAMED_SHARE * total)


def phases_table(run: PlannedRun, heading: str, simulated: Mapping[str, Any] | None) -> Table:
    """The most that a rank holds in each phase, its terms, and beside it the simulation's."""
    shows_host = run.host_bytes > 0 or any(row.get("host_bytes") for row in _phases(simulated).values())
    table = _table(f"{heading}: memory of one rank", f"{describe(run)}; tensors only")
    headings = ["phase", "forecast", *(["simulated", "off by"] if simulated else []), *(["host"] if shows_host else [])]
    _columns(table, *headings, right=headings[1:])
    table.add_column("made of", overflow="fold", ratio=1)
    largest = run.forecast.peak().phase
    for phase in run.forecast.phases():
        peak = run.forecast.peak(phase)
        terms: dict[str, int] = {}
        for name, num_bytes in peak.by_name("device").items():
            # "kept activations: attention" and its sisters together.
            family = name.partition(":")[0]
            terms[family] = terms.get(family, 0) + num_bytes
        row = [phase, format_bytes(peak.num_bytes())]
        if simulated:
            other = _phases(simulated).get(phase)
            row += [ABSENT, ABSENT] if other is None else _beside(peak.num_bytes(), other["peak_bytes"])
        if shows_host:
            row.append(format_bytes(run.forecast.peak(phase, "host").num_bytes("host")))
        table.add_row(*row, _made_of(terms, peak.num_bytes()), style="bold" if phase == largest else None)
    if simulated:
        table.add_section()
        row = ["most", format_bytes(run.peak_bytes), *_beside(run.peak_bytes, simulated["peak_bytes"])]
        table.add_row(*row, *([""] if shows_host else []), "")
    return table


def _phases(simulated: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {} if simulated is None else simulated["phases"]


def _beside(forecast: int, simulated: int) -> list[str]:
    # Adding zero takes the sign from a difference that rounds to none.
    return [
        format_bytes(simulated),
        f"{round(100 * (forecast / simulated - 1), 1) + 0:+.1f} %" if simulated else ABSENT,
    ]


def simulated_table(simulated: Mapping[str, Any], job: MemoryJob, heading: str) -> Table:
    """The most that a rank holds in each phase by the simulation alone, and what of."""
    phases = simulated["phases"]
    # Not for a step counter, or one copy of what is trained.
    shows_host = max(row["host_bytes"] for row in phases.values()) >= 0.01 * simulated["peak_bytes"]
    described = describe_job(job, simulated["trained"], simulated["parameters"])
    table = _table(f"{heading}: memory of one rank", f"{described}; tensors only")
    headings = ["phase", "simulated", *(["host"] if shows_host else [])]
    _columns(table, *headings, right=headings[1:])
    table.add_column("made of", overflow="fold", ratio=1)
    largest = max(phases, key=lambda phase: int(phases[phase]["peak_bytes"]))
    for phase, row in phases.items():
        cells = [phase, format_bytes(row["peak_bytes"]), *([format_bytes(row["host_bytes"])] if shows_host else [])]
        table.add_row(*cells, _made_of(row["by_kind"], row["peak_bytes"]), style="bold" if phase == largest else None)
    return table


def gpus_table(found: Sequence[Gpus], gpu: Gpu) -> Table:
    """GPUs by stage."""
    table = _table(f"GPUs of {gpu.gib:g} GiB that the run needs, by ZeRO stage")
    _columns(table, "stage", "GPUs", "each then needs", "of usable", right=("GPUs", "each then needs", "of usable"))
    table.add_column("")
    for each in found:
        at_most = f"{each.run.world_size}" if each.num_gpus is not None else f"more than {each.run.world_size}"
        split = {0: "nothing is split", 1: "masters and moments are split", 2: "gradients, too", 3: "the base, too"}
        table.add_row(
            str(each.stage),
            at_most,
            format_bytes(each.run.needed_bytes),
            f"{each.run.needed_bytes / max(gpu.usable_bytes, 1):.0%}",
            split[each.stage],
        )
    return table


def settings_table(settings: Sequence[Setting], gpu: Gpu, ranks: int) -> Table:
    """Layouts that fit, the fastest first."""
    more = len(settings) - _MAX_ROWS
    table = _table(
        f"What fits on {ranks} x {gpu.gib:g} GiB, the fastest first",
        "The order is a rough estimate: 150 TFLOP/s, 25 GB/s between GPUs, 12 GB/s to the host."
        + (f" {more} more are in --json." if more > 0 else ""),
    )
    # Whether activations are checkpointed says how many passes there are, which --json tells, too.
    right = ("needs", "host\nneeds", "wire\n/step", "s/step")
    _columns(table, "stage", "placement", "check-\npoint", "on the\nhost", *right, right=right)
    from launcher.plan.settings import offloaded

    for each in settings[:_MAX_ROWS]:
        job = each.run.job
        table.add_row(
            str(job.stage),
            job.placement if job.method == "selection" else ABSENT,
            "yes" if job.gradient_checkpointing else "no",
            offloaded(job),
            format_bytes(each.run.needed_bytes),
            format_bytes(each.run.host_bytes) if each.run.host_bytes else ABSENT,
            format_bytes(each.wire_bytes),
            f"{each.seconds:#.3g}",
        )
    return table


def compare_table(found: Sequence[Compared], gpu: Gpu | None) -> Table:
    """The same job by several methods."""
    full = next(each for each in found if each.name == "full")
    table = _table("The same job by other methods", describe_same(found[0].run))
    right = ["trained", "of all", "peak of a rank", "of full"]
    if gpu is not None:
        right.append(f"GPUs of {gpu.gib:g} GiB")
    _columns(table, "method", *right, right=right)
    for index, each in enumerate(found):
        trained, total = each.run.num_trained, each.run.shapes.shape.num_parameters
        row = [
            each.name,
            format_count(trained),
            format_percent(trained / total),
            format_bytes(each.run.peak_bytes),
            f"{each.run.peak_bytes / full.run.peak_bytes:.2f}",
        ]
        if gpu is not None:
            row.append("none does" if each.gpus is None else f"{each.gpus.num_gpus} (stage {each.gpus.stage})")
        table.add_row(*row, style="bold" if index == 0 else None)
    return table


def describe_same(run: PlannedRun) -> str:
    """What the methods of a comparison share."""
    job = run.job
    return (
        f"{run.world_size} rank{'s' * (run.world_size > 1)}, stage {job.stage}, {job.precision}, micro-batch "
        f"{job.micro_batch} x {job.length}, {'' if job.gradient_checkpointing else 'no '}checkpointing; GPUs: at the "
        "best stage for each"
    )


def models_table(found: Sequence[ModelFit], gpu: Gpu, ranks: int, method: str) -> Table:
    """Built-in models, the largest first."""
    table = _table(f"Built-in models by {method} on {ranks} x {gpu.gib:g} GiB")
    right = ("parameters", "needs of each")
    _columns(table, "model", "parameters", "fits", "needs of each", right=right)
    table.add_column("at")
    for each in found:
        if each.run is None:
            table.add_row(each.name, format_count(each.num_parameters), ABSENT, ABSENT, "has other modules")
            continue
        job = each.run.job
        table.add_row(
            each.name,
            format_count(each.num_parameters),
            "yes" if each.fits else "no",
            format_bytes(each.run.needed_bytes),
            f"stage {job.stage}, {'' if job.gradient_checkpointing else 'no '}checkpointing",
        )
    return table


def largest_lines(found: Largest, gpu: Gpu) -> list[str]:
    """The answer to "how large" in one or two sentences."""
    usable = format_bytes(gpu.usable_bytes)
    total = found.run.shapes.shape.num_parameters

    def shown(value: object) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"

    if found.value is None:
        return [
            f"Nothing fits: even with {found.field} {shown(found.above)} a rank needs "
            f"{format_bytes(found.run.needed_bytes)}, and {usable} are usable."
        ]
    trained = f" ({format_percent(found.run.num_trained / total)} of the parameters)"
    is_budget = found.field.startswith(("selection.", "--lora"))
    lines = [
        f"The largest {found.field} that fits is {shown(found.value)}{trained if is_budget else ''}: a rank needs "
        f"{format_bytes(found.run.needed_bytes)} of {usable} usable."
    ]
    if found.above_run is not None:
        beyond = format_bytes(found.above_run.needed_bytes)
        if beyond != format_bytes(found.run.needed_bytes):
            lines.append(f"With {shown(found.above)} it would need {beyond}.")
    else:
        lines.append("Larger ones were not tried.")
    return lines


def change_lines(changes: Sequence[Change]) -> list[str]:
    """What would make a run fit, as command lines take it."""
    if not changes:
        return ["No change of its settings was found with which it fits."]
    return [
        "It would fit with",
        *(f"  {' '.join(each.overrides)}  ({each.cost}: {format_bytes(each.forecast.peak_bytes)})" for each in changes),
    ]
