#!/usr/bin/env python3
"""How long does training wait for a checkpoint, and how large is it, beside what DeepSpeed's own saving writes?

Each variant is a DeepSpeed engine over the same random Llama on real ranks (gloo). It trains blocks of --steps
optimizer steps; a block begins with no save, with one that is written in the background, or with one that is waited
for. Modes take turns; the shares are those of the block with the median time. "waits" is the time in which no step
runs: the copy to the host, and what is not yet written when the block ends. "longer" compares the block with one
without a save, and so has what steps lose while a thread hashes and writes.

Sizes are those of the whole folder. The formula is 12 bytes for each value (fp32 master and two moments), and for each
retired entry its number and its position. DeepSpeed's files are pickles; they are written here to be measured only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.summary import format_bytes, format_percent
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
from sparse_zero.checkpoint.checkpoint import read_checkpoint, save_checkpoint, take_snapshot
from sparse_zero.checkpoint.writer import CheckpointWriter
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from sparse_zero.layers.sparsify import num_retired, selection_of


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """What is measured."""

    steps: int = 100  # optimizer steps between two saves
    rounds: int = 3  # blocks of each mode
    folder: str = ""  # a folder on the disk that is measured; default: that of temporary files

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rounds < 1:
            raise InputError(f"--steps is {self.steps} and --rounds {self.rounds}: both must be at least 1")
        if self.folder and not Path(self.folder).is_dir():
            raise InputError(f"--folder is {self.folder}, which is no folder: name one on the disk to be measured")


def _settings(settings: Settings, **changes: Any) -> CheckpointSettings:
    return CheckpointSettings(**{**asdict(settings), "steps": 100, **changes})


# A model of 44 million parameters, of which 1.5% are trained: 8 MB of state.
USUAL = _settings(
    replace(Settings(), hidden=512, layers=8, intermediate=1536, heads=8, vocab=16000, length=64, block_size=128)
)
TINY = _settings(SMALL, steps=2, rounds=1)
VARIANTS = {
    **{f"inplace-{stage}": Variant(method="ours", stage=stage) for stage in (0, 1, 2, 3)},
    "delta-2": Variant(method="ours", stage=2, placement="delta"),
    "delta-3": Variant(method="ours", stage=3, placement="delta"),
}
MODES = ("none", "background", "waiting")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _block(engine: Any, settings: CheckpointSettings, mode: str, folder: Path) -> tuple[float, float]:
    """(seconds of a block, of them without a step) of this rank. Collective."""
    started = time.perf_counter()
    with CheckpointWriter(background=mode == "background") as writer:
        if mode != "none":
            snapshot = take_snapshot(engine)
            with failing_together():
                if snapshot is not None:
                    writer.submit(snapshot, folder)
            del snapshot
        saved = time.perf_counter()
        train(engine, settings, settings.steps)
        trained = time.perf_counter()
        with failing_together():
            writer.wait()
    ended = time.perf_counter()
    return ended - started, (saved - started) + (ended - trained)


def _deepspeed_bytes(engine: Any, folder: Path, **options: Any) -> dict[str, float]:
    """Size of, and seconds for, what DeepSpeed's own saving writes. Collective."""
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    engine.save_checkpoint(str(folder), tag="measured", **options)
    dist.barrier()
    seconds = time.perf_counter() - started
    found = {"bytes": folder_bytes(folder), "seconds": seconds}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return found


def measure_here(name: str, settings: CheckpointSettings, base: Path) -> dict[str, Any]:
    """What rank 0 measures of one variant. Collective."""
    variant = VARIANTS[name]
    engine = make_engine(variant, settings, base)
    train(engine, settings, 2)
    with tempfile.TemporaryDirectory(prefix="sparse_zero_checkpoint_", dir=settings.folder or None) as own:
        # All ranks write DeepSpeed's files into the folder of rank 0.
        place = _of_rank_zero(own)
        save_checkpoint(engine, place / "ours")  # Not timed: what is loaded and compiled once is so now.
        seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        for number in range(settings.rounds):
            for mode in MODES[number % len(MODES) :] + MODES[: number % len(MODES)]:
                seconds[mode].append(_block(engine, settings, mode, place / "ours"))
        found = {
            "values": selection_of(engine.module).num_parameters,
            "retired": num_retired(engine.module),
            "bytes": folder_bytes(place / "ours"),
            "blocks": seconds,
            "deepspeed": _deepspeed_bytes(engine, place / "deepspeed"),
            "deepspeed_without_frozen": _deepspeed_bytes(engine, place / "values", exclude_frozen_parameters=True),
        }
        if not _is_rank_zero():
            return {}
        assert read_checkpoint(place / "ours").optimizer_step > settings.steps
        return found


def _is_rank_zero() -> bool:
    import torch.distributed as dist

    return dist.get_rank() == 0


def _of_rank_zero(path: str) -> Path:
    from models.gather import gather_json

    return Path(gather_json(path)[0])


def summarize(found: dict[str, Any], settings: CheckpointSettings) -> dict[str, Any]:
    """Shares of the run's time, and sizes beside the formula.

    Args:
        found: of one variant, as :func:`measure_here` gives it.
        settings: of the measurement.
    """
    without = median(total for total, _ in found["blocks"]["none"])
    modes = {}
    for mode in MODES[1:]:
        total, waits = sorted(found["blocks"][mode])[len(found["blocks"][mode]) // 2]
        modes[mode] = {"block_seconds": total, "waits": waits / total, "longer": total / without - 1}
    formula = 12 * found["values"] + 8 * found["retired"]
    return {
        "values": found["values"],
        "step_seconds": without / settings.steps,
        **modes,
        "bytes": found["bytes"],
        "formula_bytes": formula,
        "over_formula": found["bytes"] / formula - 1,
        "deepspeed_bytes": found["deepspeed"]["bytes"],
        "deepspeed_seconds": found["deepspeed"]["seconds"],
        "deepspeed_without_frozen_bytes": found["deepspeed_without_frozen"]["bytes"],
        "deepspeed_without_frozen_seconds": found["deepspeed_without_frozen"]["seconds"],
    }


def print_table(rows: dict[str, dict[str, Any]], settings: CheckpointSettings) -> None:
    """The table that people read."""
    from rich.console import Console
    from rich.table import Table

    title = f"One save in {settings.steps} steps on {settings.world_size} ranks, {settings.rounds} rounds"
    table = Table(title=title)
    table.add_column("variant")
    for heading in (
        "values",
        "step",
        "waits,\nbackground",
        "longer,\nbackground",
        "waits,\nforeground",
        "longer,\nforeground",
        "checkpoint",
        "over\n12 B a value",
        "DeepSpeed's",
        "DeepSpeed's,\nwithout frozen",
    ):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        shares = [f"{row[mode][what]:.2%}" for mode in MODES[1:] for what in ("waits", "longer")]
        table.add_row(
            name,
            f"{row['values']:,}",
            f"{1000 * row['step_seconds']:.0f} ms",
            *shares,
            format_bytes(row["bytes"]),
            format_percent(row["over_formula"]),
            format_bytes(row["deepspeed_bytes"]),
            format_bytes(row["deepspeed_without_frozen_bytes"]),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, USUAL, TINY)
    if options.measure is not None:
        work: Callable[[], Any] = partial(measure_here, options.measure, settings, options.base)
        as_rank(work, settings, options.out)
        return
    found = on_fresh_ranks(__file__, options, list(VARIANTS), settings)
    rows = {name: summarize(blocks, settings) for name, blocks in found.items()}
    print_table(rows, settings)
    if options.json is not None:
        atomic_write_json(options.json, {"settings": asdict(settings), "machine": machine(), "variants": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, CheckpointSettings)
    add_rank_flags(parser, list(VARIANTS))
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
