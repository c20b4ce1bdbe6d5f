#!/usr/bin/env python3
"""What does one training step cost, in time and peak memory, next to full fine-tuning and LoRA?

All methods train the same random Llama on the same batches, and (but for full) the same number of parameters
of q, k and v. The floor is what every method needs: forward, and the gradients of the activations.

Time: the models stand side by side in one process and take turns in random order, so that a slow second of
the machine hits all alike; the table shows the median step and the ratios of minima and of medians. Memory:
one process per method; the peak of its resident size (on CUDA: of its allocator) over that with the model
loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import sparse_zero as sz
from scripts.benchmarking import (
    as_flags,
    chosen_names,
    exit_code,
    in_own_process,
    machine,
    make_parser,
    peak_of,
    random_llama,
    read_settings,
    take_turns,
)
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from sparse_zero.optional import require

METHODS = ("floor", "full", "lora", "blocks", "rows", "columns", "mixed")
MODULES = ("q_proj", "k_proj", "v_proj")
Step = Callable[[Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison: the model, the batch, how much is trained, and how often it is measured."""

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    intermediate: int = 2816
    vocab: int = 8192
    batch: int = 2  # samples in a step
    length: int = 256  # tokens in a sample
    rows: int = 64  # rows trained per matrix; the other methods train as many parameters
    block_size: int = 64
    placement: str = "inplace"
    steps: int = 20  # timed steps per method
    warmup: int = 3  # steps before, not counted
    memory_steps: int = 3  # steps in the process that measures memory
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        block = self.block_size**2
        if self.rows * self.hidden % (2 * block) or self.rows % 4:
            raise InputError(
                f"--rows {self.rows} of {self.hidden} entries must be a multiple of 4 and make an even "
                f"number of blocks of {self.block_size}: choose another --rows or --block-size"
            )

    @property
    def lora_rank(self) -> int:
        """Two factors of this rank have as many entries as the rows: the matrices are square."""
        return self.rows // 2


SMALL = Settings(
    hidden=64,
    layers=2,
    heads=4,
    intermediate=160,
    vocab=128,
    length=16,
    rows=4,
    block_size=8,
    steps=3,
    warmup=1,
    memory_steps=2,
)


def build_model(settings: Settings) -> Any:
    """The random Llama that every method starts from."""
    return random_llama(settings)


def regions(method: str, settings: Settings) -> tuple[sz.RegionConfig, ...]:
    """What is trained of every q, k and v; mixed is half blocks, a quarter rows, a quarter columns."""
    patterns = (f"*.{{{','.join(MODULES)}}}",)
    blocks = settings.rows * settings.hidden // settings.block_size**2
    shares = {
        "blocks": {"block": blocks},
        "rows": {"row": settings.rows},
        "columns": {"column": settings.rows},
        "mixed": {"block": blocks // 2, "row": settings.rows // 4, "column": settings.rows // 4},
    }[method]
    return tuple(
        sz.RegionConfig(
            kind=kind,  # type: ignore[arg-type]
            modules=patterns,
            per_matrix=number,
            score="random",
            block_size=settings.block_size if kind == "block" else None,
        )
        for kind, number in shares.items()
    )


def prepare(method: str, model: Any, settings: Settings) -> tuple[Step, int]:
    """Make ``model`` ready for a method; returns its training step and the number of trained parameters."""
    if method == "floor":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    elif method == "lora":
        peft = require("peft", extra="dev", purpose="compare with LoRA")
        config = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            lora_dropout=0.0,
            target_modules=list(MODULES),
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
    elif method != "full":
        selection_config = sz.SelectionConfig(regions=regions(method, settings), seed=settings.seed)
        selection = sz.select(model, None, selection_config)
        sz.sparsify(model, selection, placement=settings.placement)  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    must_write_back = method not in ("floor", "full", "lora")

    def step(tokens: Tensor) -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if must_write_back:
            sz.write_back(model)
        return float(loss.detach())  # also waits for the device

    return step, sum(parameter.numel() for parameter in trained)


def batch_of(settings: Settings, number: int) -> Tensor:
    """Random tokens [batch, length]; the number decides them."""
    generator = torch.Generator().manual_seed(settings.seed * 1000 + number)
    shape = (settings.batch, settings.length)
    return torch.randint(0, settings.vocab, shape, generator=generator).to(settings.device)


def measure_time(
    methods: Sequence[str], settings: Settings, on_round: Callable[[int], None] = lambda number: None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every timed step, and trained parameters, per method. All models stand side by side."""
    prepared = {method: prepare(method, build_model(settings), settings) for method in methods}
    seconds = take_turns(
        {method: step for method, (step, _) in prepared.items()},
        lambda number: batch_of(settings, number),
        warmup=settings.warmup,
        rounds=settings.steps,
        seed=settings.seed,
        device=settings.device,
        on_round=on_round,
    )
    return seconds, {method: trained for method, (_, trained) in prepared.items()}


def measure_memory_here(method: str, settings: Settings) -> int:
    """Bytes by which this process grows at most during some steps, over its size with the model loaded."""
    # What the interpreter and the libraries load at the first step is no cost of a method.
    tiny = replace(SMALL, device=settings.device, dtype=settings.dtype)
    step, _ = prepare(method, build_model(tiny), tiny)
    step(batch_of(tiny, 0))
    del step
    model = build_model(settings)

    def train() -> None:
        step, _ = prepare(method, model, settings)
        for number in range(settings.memory_steps):
            step(batch_of(settings, number))

    loaded, peak, _ = peak_of(train, settings.device, ": use --no-memory")
    return peak - loaded


def measure_memory(method: str, settings: Settings) -> int:
    """:func:`measure_memory_here` in a process of its own."""
    arguments = ["--measure-memory", method, *as_flags(settings)]
    return int(in_own_process(__file__, arguments, settings.threads)["peak_growth_bytes"])


def summarize(
    seconds: Mapping[str, Sequence[float]], trained: Mapping[str, int], peaks: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Per method: trained parameters, median and minimum of a step, peak growth, ratios to the references."""
    summary: dict[str, dict[str, float]] = {}
    for method, own in seconds.items():
        row: dict[str, float] = {
            "trained_parameters": trained[method],
            "median_seconds": statistics.median(own),
            "min_seconds": min(own),
        }
        for reference in ("floor", "full", "lora"):
            if reference in seconds:
                row[f"median_over_{reference}"] = row["median_seconds"] / statistics.median(seconds[reference])
                row[f"min_over_{reference}"] = row["min_seconds"] / min(seconds[reference])
            if method in peaks and peaks.get(reference, 0) > 0:
                row[f"memory_over_{reference}"] = peaks[method] / peaks[reference]
        if method in peaks:
            row["peak_growth_bytes"] = peaks[method]
        summary[method] = row
    return summary


def print_summary(summary: Mapping[str, Mapping[str, float]], num_parameters: int) -> None:
    """The table that people read."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One training step; ratios are of minima (of medians), memory is growth over the loaded model")
    for heading in ("method", "trained", "step", "time / floor", "time / full", "time / LoRA", "memory"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    table.add_column("/ full", justify="right")
    table.add_column("/ LoRA", justify="right")
    for method, row in summary.items():
        times = [
            f"{row[f'min_over_{reference}']:.3f} ({row[f'median_over_{reference}']:.3f})"
            if f"min_over_{reference}" in row
            else "-"
            for reference in ("floor", "full", "lora")
        ]
        memory = f"{row['peak_growth_bytes'] / 2**20:,.0f} MiB" if "peak_growth_bytes" in row else "-"
        ratios = [
            f"{row[f'memory_over_{reference}']:.2f}" if f"memory_over_{reference}" in row else "-"
            for reference in ("full", "lora")
        ]
        share = f"{int(row['trained_parameters']):,} ({row['trained_parameters'] / num_parameters:.2%})"
        table.add_row(method, share, f"{row['median_seconds'] * 1e3:,.1f} ms", *times, memory, *ratios)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every setting is a flag."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to compare, joined by commas")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--measure-memory", choices=METHODS, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    if options.measure_memory is not None:
        print(json.dumps({"peak_growth_bytes": measure_memory_here(options.measure_memory, settings)}))
        return
    methods = chosen_names(options.methods, METHODS, "--methods")
    from rich.progress import Progress

    peaks = {}
    rounds = settings.warmup + settings.steps
    with Progress(transient=True) as progress:
        if not options.no_memory:
            for method in progress.track(methods, description="memory"):
                peaks[method] = measure_memory(method, settings)
        task = progress.add_task("time", total=rounds)
        seconds, trained = measure_time(methods, settings, lambda number: progress.update(task, completed=number))
    num_parameters = sum(parameter.numel() for parameter in build_model(settings).parameters())
    summary = summarize(seconds, trained, peaks)
    print_summary(summary, num_parameters)
    if options.json is not None:
        atomic_write_json(
            options.json,
            {
                "settings": asdict(settings),
                "machine": machine(),
                "num_parameters": num_parameters,
                "methods": summary,
                "step_seconds": seconds,
            },
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
