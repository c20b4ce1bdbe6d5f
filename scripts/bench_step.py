#!/usr/bin/env python3
"""What does one training step cost, in time and peak memory, next to full fine-tuning, LoRA and other published ways?

All methods train the same random Llama on the same batches, and (but for full) the same number of parameters
of q, k and v; `scripts/benchmarks/methods.py` lists them. The floor is what every method needs: forward, and the
gradients of the activations. It is there twice: what it differs from itself is the noise of the machine.

Time: the models stand side by side in one process and take turns in random order, so that a slow second of the
machine hits all alike; they share what none of them trains. The table shows the median step, and ratios: the median
over the rounds of the ratio within a round, half its interquartile range, and the ratio of minima. Memory: one
process per method; the peak of its resident size (on CUDA: of its allocator) over that with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from scripts.benchmarking import (
    as_flags,
    chosen_names,
    exit_code,
    in_own_process,
    make_parser,
    parse_flags,
    peak_of,
    random_llama,
    read_settings,
    take_turns,
)
from scripts.benchmarks.methods import (
    DELTA,
    FLOORS,
    METHODS,
    OURS,
    PEFT,
    PUBLISHED,
    SMALL,
    Settings,
    build_models,
    own_parameters,
    prepare,
)
from scripts.benchmarks.ratios import Ratio, noise_line, paired
from scripts.benchmarks.results import Chart, finish
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError

REFERENCES = ("floor", "full", "lora")
GROUPS = {
    "floor": FLOORS,
    "full": ("full",),
    "PEFT": PEFT,
    "published ways, plain torch": PUBLISHED,
    "ours": OURS + DELTA,
}


def build_model(settings: Settings) -> Any:
    """The random Llama that every method starts from."""
    return random_llama(settings)


def batch_of(settings: Any, number: int) -> Tensor:
    """Random tokens [batch, length]; the number decides them."""
    generator = torch.Generator().manual_seed(settings.seed * 1000 + number)
    shape = (settings.batch, settings.length)
    return torch.randint(0, settings.vocab, shape, generator=generator).to(settings.device)


def measure_time(
    methods: Sequence[str], settings: Settings, on_round: Callable[[int], None] = lambda number: None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every timed step, and trained parameters, per method. All models stand side by side."""
    models = build_models({method: own_parameters(method) for method in methods}, settings)
    prepared = {method: prepare(method, models.pop(method), settings) for method in methods}
    seconds = take_turns(
        {method: ready.step for method, ready in prepared.items()},
        lambda number: batch_of(settings, number),
        warmup=settings.warmup,
        rounds=settings.steps,
        seed=settings.seed,
        device=settings.device,
        on_round=on_round,
        max_seconds=settings.max_seconds,
        clock=settings.clock,
    )
    return seconds, {method: ready.num_trained for method, ready in prepared.items()}


def measure_memory_here(method: str, settings: Settings) -> int:
    """Bytes by which this process grows at most during some steps, over its size with the model loaded."""
    # What the interpreter and the libraries load at the first step is no cost of a method.
    tiny = replace(SMALL, device=settings.device, dtype=settings.dtype)
    prepare(method, build_model(tiny), tiny).step(batch_of(tiny, 0))
    model = build_model(settings)

    def train() -> None:
        ready = prepare(method, model, settings)
        for number in range(settings.memory_steps):
            ready.step(batch_of(settings, number))

    loaded, peak, _ = peak_of(train, settings.device, ": use --no-memory")
    return peak - loaded


def measure_memory(method: str, settings: Settings) -> int:
    """:func:`measure_memory_here` in a process of its own."""
    arguments = ["--measure-memory", method, *as_flags(settings)]
    return int(in_own_process(__file__, arguments, settings.threads)["peak_growth_bytes"])


def summarize(
    seconds: Mapping[str, Sequence[float]], trained: Mapping[str, int], peaks: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Per method: trained parameters, median and minimum of a step, peak growth, and ratios to the references.

    ``over_floor`` and its like are a :class:`Ratio` of paired times, as a dictionary.
    """
    summary: dict[str, dict[str, Any]] = {}
    for method, own in seconds.items():
        row: dict[str, Any] = {
            "trained_parameters": trained[method],
            "median_seconds": statistics.median(own),
            "min_seconds": min(own),
        }
        for reference in REFERENCES:
            if reference in seconds:
                row[f"over_{reference}"] = asdict(paired(own, seconds[reference]))
            if method in peaks and peaks.get(reference, 0) > 0:
                row[f"memory_over_{reference}"] = peaks[method] / peaks[reference]
        if method in peaks:
            row["peak_growth_bytes"] = peaks[method]
        summary[method] = row
    return summary


def table_of(summary: Mapping[str, Mapping[str, Any]], num_parameters: int) -> Table:
    """The table that people read."""
    has_memory = any("peak_growth_bytes" in row for row in summary.values())
    headings = ["method", "trained", "step"]
    headings += [
        f"time / {reference}" for reference in REFERENCES if any(f"over_{reference}" in r for r in summary.values())
    ]
    rows = []
    for method, row in summary.items():
        share = row["trained_parameters"] / num_parameters
        cells = [
            method,
            f"{row['trained_parameters'] / 1e6:,.2f}M {share:.2%}",
            f"{row['median_seconds'] * 1e3:,.1f} ms",
        ]
        cells += [str(Ratio(**row[f"over_{name}"])) for name in REFERENCES if f"over_{name}" in row]
        if has_memory:
            cells.append(f"{row['peak_growth_bytes'] / 2**20:,.0f} MiB")
            cells += [f"{row[key]:.2f}" if (key := f"memory_over_{name}") in row else "-" for name in ("full", "lora")]
        rows.append(cells)
    if has_memory:
        headings += ["memory", "/ full", "/ lora"]
    return Table("One training step: paired median ± half the interquartile range (ratio of minima)", headings, rows)


def remarks(summary: Mapping[str, Mapping[str, Any]], depth: float) -> list[str]:
    """What a reader of the table must know: how noisy it is, and who does not train the same."""
    lines = []
    if "over_floor" in summary.get("floor2", {}):
        lines.append(noise_line(Ratio(**summary["floor2"]["over_floor"])))
    else:
        lines.append("noise: not known, since floor and floor2 were not both measured")
    if "tokens" in summary:
        lines.append("tokens trains rows of the embedding: it cannot train a part of q, k and v")
    if any(method.startswith("small_blocks") for method in summary):
        lines.append("small_blocks trains what its blocks add up to, not as many parameters as the others")
    if depth > 0:
        lines.append(
            f"ours train layers from {depth:.0%} of the depth on, as many parameters as the others in all layers"
        )
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every setting is a flag."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to compare, joined by commas")
    parser.add_argument("--delta", action="store_true", help="also ours added to the product, under the names *_delta")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--plot", type=Path, default=None, help="also draw the times over the floor's into this PNG")
    parser.add_argument("--measure-memory", choices=(*METHODS, *DELTA), default=None, help=argparse.SUPPRESS)
    return parse_flags(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    if options.measure_memory is not None:
        print(json.dumps({"peak_growth_bytes": measure_memory_here(options.measure_memory, settings)}))
        return
    methods = chosen_names(options.methods, (*METHODS, *DELTA), "--methods")
    if options.delta:
        methods += tuple(f"{m}_delta" for m in methods if m in OURS and f"{m}_delta" not in methods)
    if options.plot is not None and "floor" not in methods:
        raise InputError("--plot draws times over the floor's: add floor to --methods")
    from rich.progress import Progress

    peaks = {}
    with Progress(transient=True) as progress:
        if not options.no_memory:
            for method in progress.track(methods, description="memory"):
                peaks[method] = measure_memory(method, settings)
        task = progress.add_task("time", total=settings.warmup + settings.steps)
        seconds, trained = measure_time(methods, settings, lambda number: progress.update(task, completed=number))
    num_parameters = sum(parameter.numel() for parameter in build_model(settings).parameters())
    summary = summarize(seconds, trained, peaks)
    chart = None
    if "floor" in methods:
        ratios = {method: row["over_floor"] for method, row in summary.items()}
        chart = Chart("bars", "One training step", {"ratios": ratios, "groups": GROUPS, "floor": "floor"})
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(summary, num_parameters)],
        remarks=remarks(summary, settings.depth_from),
        chart=chart,
        numbers={"num_parameters": num_parameters, "methods": summary, "step_seconds": seconds},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
