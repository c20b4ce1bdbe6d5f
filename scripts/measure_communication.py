#!/usr/bin/env python3
"""How many bytes travel between ranks in a training step, and is it what the formula says?

Each variant is a DeepSpeed engine over the same random Llama on real ranks (gloo). The collectives of one optimizer
step are counted, after three steps in which DeepSpeed learns the order of the modules. The size of a collective is that
of the whole tensor that is reduced or gathered, on one rank; "sent" is what a ring sends of it per rank. LoRA and ours
train equal numbers of parameters. Stage 3 gives weights back after every use and does not fetch ahead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.summary import format_bytes
from scripts.benchmarking import exit_code, machine, make_parser, read_settings
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
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from sparse_zero.zero.communication import counted, engine_communication, ring_bytes, step_communication
from sparse_zero.zero.compat import full_numel

# A quarter of the model of the memory benchmark.
USUAL = replace(Settings(), hidden=512, layers=8, intermediate=1536, heads=8, vocab=16000, length=64, block_size=128)
VARIANTS = {
    **{f"full-{stage}": Variant(method="full", stage=stage) for stage in (0, 2)},
    **{f"lora-{stage}": Variant(method="lora", stage=stage) for stage in (0, 2)},
    **{f"inplace-{stage}": Variant(method="ours", stage=stage) for stage in (0, 1, 2)},
    "delta-2": Variant(method="ours", stage=2, placement="delta"),
    "inplace-3": Variant(method="ours", stage=3),
    "delta-3": Variant(method="ours", stage=3, placement="delta"),
}
_STAGE_3 = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def measure_here(name: str, settings: Settings, base: Path) -> dict[str, Any]:
    """Counted and computed bytes of one step, on rank 0. Collective."""
    variant = VARIANTS[name]
    engine = make_engine(variant, settings, base, _STAGE_3 if variant.stage == 3 else None)
    train(engine, settings, 3)
    with counted() as traffic:
        train(engine, settings, 1)
    trained = sum(full_numel(each) for each in engine.module.parameters() if each.requires_grad)
    if variant.method == "ours":
        formula = engine_communication(engine)
    else:
        formula = step_communication(
            stage=variant.stage,
            world_size=settings.world_size,
            num_values=trained,
            values_itemsize=next(engine.module.parameters()).element_size(),
            accumulation=settings.accumulation,
        )
    return {
        "trained": trained,
        "measured": {operation: asdict(each) for operation, each in traffic.items()},
        "measured_bytes": sum(each.bytes for each in traffic.values()),
        "sent_bytes": ring_bytes(traffic, settings.world_size),
        "formula": formula,
        "formula_bytes": sum(formula.values()),
    }


def print_table(found: dict[str, dict[str, Any]], settings: Settings) -> None:
    """The table that people read."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Bytes of one step on {settings.world_size} ranks, accumulation {settings.accumulation}")
    for heading in (
        "variant",
        "trained",
        "gradients",
        "values",
        "weights",
        "formula",
        "measured",
        "difference",
        "sent",
    ):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, row in found.items():
        terms = [format_bytes(row["formula"][term]) for term in ("gradients", "values", "weights")]
        difference = row["measured_bytes"] / row["formula_bytes"] - 1
        sums = [format_bytes(row["formula_bytes"]), format_bytes(row["measured_bytes"]), f"{difference:+.2%}"]
        table.add_row(name, f"{row['trained']:,}", *terms, *sums, format_bytes(row["sent_bytes"]))
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, USUAL, SMALL)
    if options.measure is not None:
        as_rank(lambda: measure_here(options.measure, settings, options.base), settings, options.out)
        return
    if settings.world_size < 2:
        raise InputError(f"--world-size is {settings.world_size}: between so few ranks nothing travels; use 2 or more")
    found = on_fresh_ranks(__file__, options, list(VARIANTS), settings)
    print_table(found, settings)
    if options.json is not None:
        atomic_write_json(options.json, {"settings": asdict(settings), "machine": machine(), "variants": found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, Settings)
    add_rank_flags(parser, list(VARIANTS))
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
