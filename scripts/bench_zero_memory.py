#!/usr/bin/env python3
"""How much memory does a rank need while it trains, next to full fine-tuning and LoRA?

All variants train the same random Llama (284 million parameters) on the same number of tokens with AdamW under
DeepSpeed, each in fresh processes, one per rank; LoRA and ours train equal numbers of parameters of all linears. Shown
is the largest peak over the ranks: on CPUs of the resident size, interpreter and libraries included, on GPUs of the
allocator. "training" starts when the engine is ready: the kernel's high-water mark is set back there; "whole life" is
the peak since the process started, with loading the model.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import exit_code, make_parser, parse_flags, peak_of, read_settings
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from scripts.zero_variants import (
    SMALL,
    Settings,
    Variant,
    add_rank_flags,
    as_rank,
    make_engine,
    on_fresh_ranks,
    train,
)
from sparse_zero.memory.measure import PeakMemory

VARIANTS = {
    "full-2": Variant(method="full", stage=2),
    "lora-2": Variant(method="lora", stage=2),
    "inplace-2": Variant(method="ours", stage=2),
    "delta-2": Variant(method="ours", stage=2, placement="delta"),
    "inplace-3": Variant(method="ours", stage=3),
    "delta-3": Variant(method="ours", stage=3, placement="delta"),
    "nf4-2": Variant(method="ours", stage=2, placement="delta", quantization="nf4"),
}


def measure_here(name: str, settings: Settings, base: Path) -> dict[str, Any]:
    """Peaks of every rank. Collective."""
    import torch.distributed as dist

    with PeakMemory(settings.device) as memory:
        engine = make_engine(VARIANTS[name], settings, base)
        gc.collect()
        building = memory.peak_bytes()
    ready, training, _ = peak_of(lambda: train(engine, settings, settings.steps), settings.device, "")
    mine = {"ready_bytes": ready, "training_bytes": training, "life_bytes": max(building, training)}
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    everyone: list[dict[str, int] | None] = [None] * settings.world_size
    dist.all_gather_object(everyone, mine)
    return {"trained": trained, "ranks": everyone}


def summarize(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Largest numbers over the ranks, and ratios to full fine-tuning, where that was measured."""
    summary: dict[str, dict[str, float]] = {}
    for name, own in found.items():
        row: dict[str, float] = {"trained": own["trained"]}
        for key in ("ready_bytes", "training_bytes", "life_bytes"):
            row[key] = max(rank[key] for rank in own["ranks"])
        if "full-2" in summary or name == "full-2":
            row["of_full"] = row["training_bytes"] / (summary.get("full-2") or row)["training_bytes"]
        summary[name] = row
    return summary


def table_of(summary: dict[str, dict[str, float]], settings: Settings) -> Table:
    """The table that people read."""
    what = f"{settings.world_size} ranks, batch {settings.batch} x {settings.length}, {settings.dtype}"
    rows = []
    for name, row in summary.items():
        cells = [f"{row[key] / 2**30:.2f} GiB" for key in ("ready_bytes", "training_bytes", "life_bytes")]
        ratio = f"{row['of_full']:.3f}" if "of_full" in row else "-"
        rows.append([name, f"{row['trained']:,.0f}", *cells[:2], ratio, cells[2]])
    headings = ("variant", "trained", "engine ready", "training", "/ full", "whole life")
    return Table(f"Memory of the rank that needs most: {what}", headings, rows)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    if options.measure is not None:
        as_rank(lambda: measure_here(options.measure, settings, options.base), settings, options.out)
        return
    found = on_fresh_ranks(__file__, options, list(VARIANTS), settings)
    summary = summarize(found)
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(summary, settings)],
        numbers={"variants": summary, "ranks": found},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, Settings)
    add_rank_flags(parser, list(VARIANTS))
    options = parse_flags(parser, arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
