#!/usr/bin/env python3
"""What does a step cost when the layers below the lowest trained one are read from the cache, beside what it must cost?

A random Llama without a dominating head, of which rows in the upper layers are trained. In every round one batch takes
three turns, in random order: with all layers and no cache (plain), with all layers and its hidden states stored (the
first epoch), and from the stored hidden states (a later epoch). The samples of a round are those of no other. What
remains of a step by its operations (sparse_zero/flops.py: forward, gradients of inputs and values, head) is the
prediction, as a share of a plain step's; the table shows what was measured over it, as the median over the rounds of
the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import sparse_zero as sz
from models.loss import response_nll
from scripts.benchmarking import (
    LlamaSettings,
    exit_code,
    make_parser,
    parse_flags,
    random_llama,
    read_settings,
    take_turns,
)
from scripts.benchmarks.ratios import paired
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError
from sparse_zero.flops import flop_shape, step_flops
from sparse_zero.prefix.cache import PrefixCache
from sparse_zero.prefix.encoding import bytes_per_token
from sparse_zero.prefix.layers import PrefixLayers, lowest_trained
from sparse_zero.prefix.store import SampleStore

WAYS = ("plain", "first", "later")


@dataclass(frozen=True, kw_only=True)
class Settings(LlamaSettings):
    """The model, the batch, what is trained, and how often it is measured."""

    hidden: int = 512
    layers: int = 12
    heads: int = 8
    intermediate: int = 1408
    vocab: int = 2048
    batch: int = 4
    length: int = 128
    min_layer: int = 9  # the lowest trained layer
    rows: int = 16  # rows trained of every q, k and v from there on
    stored: str = "compute"  # compute, bfloat16 or float8
    steps: int = 20  # timed rounds
    warmup: int = 3  # rounds before, not counted

    def __post_init__(self) -> None:
        if not 0 < self.min_layer < self.layers:
            raise InputError(f"--min-layer is {self.min_layer}: it must lie between 0 and --layers {self.layers}")
        if self.stored not in ("compute", "bfloat16", "float8"):
            raise InputError(f"--stored is {self.stored!r}: choose compute, bfloat16 or float8")


SMALL = Settings(
    hidden=32, layers=4, heads=4, intermediate=64, vocab=64, length=16, min_layer=3, rows=2, steps=3, warmup=1
)


def batch_of(settings: Settings, number: int) -> dict[str, Tensor]:
    """The samples of a round, each token a label."""
    generator = torch.Generator().manual_seed(settings.seed * 1000 + number)
    shape = (settings.batch, settings.length)
    tokens = torch.randint(0, settings.vocab, shape, generator=generator).to(settings.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def indices_of(settings: Settings, number: int) -> list[int]:
    """Numbers of these samples in the data."""
    return list(range(number * settings.batch, (number + 1) * settings.batch))


def sparse_model(settings: Settings) -> Any:
    """The random Llama with values in its upper layers."""
    model = random_llama(settings)
    region = sz.RegionConfig(
        kind="row",
        modules=("*.{q_proj,k_proj,v_proj}",),
        min_layer=settings.min_layer,
        per_matrix=settings.rows,
        score="random",
    )
    sz.sparsify(model, sz.select(model, None, sz.SelectionConfig(regions=(region,), seed=settings.seed)))
    return model


def make_cache(model: Any, settings: Settings, folder: Path) -> PrefixCache:
    """An empty one in ``folder``, for the samples of all rounds."""
    lengths = [settings.length] * (settings.batch * (settings.warmup + settings.steps))
    compute, stored = getattr(torch, settings.dtype), settings.stored
    folder.mkdir()
    return PrefixCache(
        PrefixLayers(model, lowest_trained(model)[0]),
        SampleStore(folder, 0, lengths, bytes_per_token(settings.hidden, stored, compute)),  # type: ignore[arg-type]
        lengths,
        stored=stored,  # type: ignore[arg-type]
        compute=compute,
        is_packed=False,
        together=False,
    )


def prepare(way: str, settings: Settings, folder: Path) -> Callable[[int], float]:
    """A training step on the samples of a round, its number given; the step returns the loss."""
    model = sparse_model(settings)
    cache = None if way == "plain" else make_cache(model, settings, folder / way)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    if way == "later":
        assert cache is not None
        for number in range(settings.warmup + settings.steps):
            batch = batch_of(settings, number)
            with torch.no_grad(), cache.forward(indices_of(settings, number), batch["input_ids"]):
                response_nll(model, batch)
        cache.store.sync()
        cache.store.refresh()
        cache.take_counts()

    def step(number: int) -> float:
        batch = batch_of(settings, number)
        if cache is None:
            loss = response_nll(model, batch)
        else:
            with cache.forward(indices_of(settings, number), batch["input_ids"]):
                loss = response_nll(model, batch)
            expected = [settings.batch, 0, 0] if way == "later" else [0, settings.batch, settings.batch]
            assert cache.take_counts() == expected
        (loss / batch["labels"].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sz.write_back(model)
        return float(loss.detach())

    return step


def predicted_share(settings: Settings) -> float:
    """Operations of a step from the cache over those of one without."""
    shape = flop_shape(sparse_model(settings))
    lengths, positions = [settings.length] * settings.batch, settings.batch * (settings.length - 1)
    whole = step_flops(shape, sample_lengths=lengths, num_head_positions=positions)
    rest = step_flops(
        shape, sample_lengths=lengths, num_head_positions=positions, first_layer=settings.min_layer
    )  # fmt: skip
    return rest.total / whole.total


def summarize(seconds: Mapping[str, Sequence[float]], predicted: float) -> dict[str, float]:
    """Medians, ratios of medians, of minima and within rounds, and what is measured over what is predicted.

    Args:
        seconds: of every timed step, by way; one entry per round.
        predicted: share of the operations of a plain step that remain.
    """
    found: dict[str, float] = {f"{way}_seconds": statistics.median(own) for way, own in seconds.items()}
    found["predicted"] = predicted
    for way in ("plain", "first"):
        for name, of in (("median", statistics.median), ("min", min)):
            found[f"{name}_later_over_{way}"] = of(seconds["later"]) / of(seconds[way])
    found["first_over_plain"] = found["first_seconds"] / found["plain_seconds"]
    found["paired_later_over_plain"] = paired(seconds["later"], seconds["plain"]).median
    found["measured_over_predicted"] = found["paired_later_over_plain"] / predicted
    return found


def table_of(found: Mapping[str, float]) -> Table:
    """The table that people read."""

    def ratio(way: str) -> str:
        return f"{found[f'median_later_over_{way}']:.3f} ({found[f'min_later_over_{way}']:.3f})"

    first = f"{found['first_seconds'] * 1e3:.1f} ms"
    rows = [
        ["without the cache", f"{found['plain_seconds'] * 1e3:.1f} ms", "1", "", "", ""],
        ["first epoch", first, f"{found['first_over_plain']:.3f}", "1", "", ""],
        [
            "later epoch",
            f"{found['later_seconds'] * 1e3:.1f} ms",
            ratio("plain"),
            ratio("first"),
            f"{found['predicted']:.3f}",
            f"{found['measured_over_predicted']:.2f}",
        ],
    ]
    headings = ("step", "time", "/ plain", "/ first epoch", "predicted", "measured / predicted")
    return Table("One training step; ratios are of medians (of minima)", headings, rows)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    from rich.progress import Progress

    with Progress(transient=True) as progress, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        task = progress.add_task("rounds", total=settings.warmup + settings.steps)
        losses: dict[str, list[float]] = {way: [] for way in WAYS}
        steps = {way: prepare(way, settings, Path(folder)) for way in WAYS}

        def turn(way: str, number: int) -> None:
            losses[way].append(steps[way](number))

        seconds = take_turns(
            {way: partial(turn, way) for way in WAYS},
            lambda number: number,
            warmup=settings.warmup,
            rounds=settings.steps,
            seed=settings.seed,
            device=settings.device,
            on_round=lambda number: progress.update(task, completed=number),
        )
    found = summarize(seconds, predicted_share(settings))
    pairs = zip(losses["plain"], losses["later"], strict=True)
    found["loss_difference"] = max(abs(one - other) / one for one, other in pairs)
    off = f"{found['loss_difference']:.1e}"
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(found)],
        remarks=[f"losses from the cache ({settings.stored}) are off by at most {off} of themselves"],
        numbers={"found": found, "step_seconds": seconds},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--folder", type=Path, default=None, help="where the cache lies; default: of temporary files")
    return exit_code(lambda: run(parse_flags(parser, arguments)))


if __name__ == "__main__":
    sys.exit(main())
