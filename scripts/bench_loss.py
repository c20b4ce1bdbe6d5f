#!/usr/bin/env python3
"""What do head and loss cost, all logits at once or in chunks, in time and peak memory?

Forward and backward of a frozen head and its cross-entropy, from hidden states that have a gradient. "at once" is all
logits; "chunk C" forms them for C positions at a time, with their gradient (models/chunked_loss.py); "again C" is the
same by recomputing each chunk in backward, one product of the head more. They take turns in one process on one input;
memory is that of tensors, counted in a step of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.chunked_loss import chunked_nll
from scripts.benchmarking import exit_code, make_parser, parse_flags, read_settings, take_turns
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError
from sparse_zero.memory.simulation.recorder import MemoryRecorder


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison."""

    hidden: int = 512
    vocabularies: str = "32000,128256"
    positions: int = 512  # over all rows of a micro-batch
    chunks: str = "64,128,256"
    steps: int = 3  # timed, of each
    warmup: int = 1
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        _numbers(self.vocabularies, "--vocabularies")
        _numbers(self.chunks, "--chunks")


def _numbers(text: str, flag: str) -> list[int]:
    """The numbers in ``text``, joined by commas.

    Raises:
        InputError: one of them is no positive integer.
    """
    for number in text.split(","):
        if not number.isdecimal() or int(number) == 0:
            raise InputError(f"{flag} has {number!r}: give positive integers, joined by commas")
    return [int(number) for number in text.split(",")]


SMALL = Settings(hidden=16, vocabularies="64,96", positions=24, chunks="5,8", steps=2)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def at_once(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    """The loss of all logits."""
    logits = torch.nn.functional.linear(hidden_NH, weight_VH).float()
    return torch.nn.functional.cross_entropy(logits, targets_N, reduction="sum")


def in_chunks(chunk: int) -> Loss:
    """Gradients formed in forward."""

    def loss(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        return chunked_nll(lambda x: torch.nn.functional.linear(x, weight_VH), hidden_NH, targets_N, chunk, [])

    return loss


def recomputed(chunk: int) -> Loss:
    """Each chunk's forward repeated in backward."""

    def loss(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        pieces = [
            checkpoint(at_once, hidden, weight_VH, targets, use_reentrant=False)
            for hidden, targets in zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True)
        ]
        return torch.stack(pieces).sum()

    return loss


def losses(settings: Settings) -> dict[str, Loss]:
    """What is compared, by name."""
    chunks = _numbers(settings.chunks, "--chunks")
    found: dict[str, Loss] = {"at once": at_once}
    found |= {f"chunk {chunk}": in_chunks(chunk) for chunk in chunks}
    return found | {f"again {chunk}": recomputed(chunk) for chunk in chunks[-1:]}


def measure(settings: Settings, vocabulary: int) -> list[dict[str, Any]]:
    """A row of each loss: its seconds, the ratio of minima to all at once, and the peak of tensors beside inputs."""
    torch.manual_seed(settings.seed)
    place: dict[str, Any] = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
    hidden = torch.randn(settings.positions, settings.hidden, **place).requires_grad_()
    weight = torch.randn(vocabulary, settings.hidden, **place) / settings.hidden**0.5
    targets = torch.randint(vocabulary, (settings.positions,), device=settings.device)

    def step_of(loss: Loss) -> Callable[[object], None]:
        def step(_: object) -> None:
            hidden.grad = None
            loss(hidden, weight, targets).backward()

        return step

    steps = {name: step_of(loss) for name, loss in losses(settings).items()}
    peaks = {}
    for name, step in steps.items():
        with MemoryRecorder() as recorder:
            step(None)
            peaks[name] = recorder.peak_bytes - hidden.nbytes - weight.nbytes - targets.nbytes
    seconds = take_turns(
        steps,
        lambda number: number,
        warmup=settings.warmup,
        rounds=settings.steps,
        seed=settings.seed,
        device=settings.device,
        on_round=lambda number: None,
    )
    least = min(seconds["at once"])
    return [
        {
            "vocabulary": vocabulary,
            "loss": name,
            "median_seconds": statistics.median(seconds[name]),
            "ratio_of_minima": min(seconds[name]) / least,
            "peak_bytes": peaks[name],
            "step_seconds": seconds[name],
        }
        for name in steps
    ]


def table_of(found: Sequence[Mapping[str, Any]]) -> Table:
    """The table that people read."""
    rows = []
    for row in found:
        peak = f"{row['peak_bytes'] / 2**20:,.1f} MiB"
        median, ratio = f"{row['median_seconds'] * 1e3:,.1f} ms", f"{row['ratio_of_minima']:.3f}"
        rows.append([row["loss"], f"{row['vocabulary']:,}", median, ratio, peak])
    headings = ("loss", "vocabulary", "median", "/ at once", "peak of tensors")
    return Table("Head and loss, forward and backward; ratios are of minima", headings, rows)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    rows: list[dict[str, Any]] = []
    for vocabulary in _numbers(settings.vocabularies, "--vocabularies"):
        rows += measure(settings, vocabulary)
    finish(options, script=__file__, doc=__doc__, settings=settings, tables=[table_of(rows)], numbers={"losses": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse_flags(make_parser(__doc__, Settings), arguments)))


if __name__ == "__main__":
    sys.exit(main())
