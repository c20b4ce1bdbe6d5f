#!/usr/bin/env python3
"""What does training parts of one linear cost, next to the same linear frozen?

Forward, backward, and, inplace, the write-back of one layer, on one input that requires grad, as below another layer.
The layers stand side by side in one process and take turns in random order; a ratio is of the medians. How little the
gradients could cost is told by their share of the arithmetic: forward and the gradient of the input are two products,
a whole gradient of the weight would be a third.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import sparse_zero as sz
from scripts.benchmarking import chosen_names, exit_code, machine, make_parser, read_settings, take_turns
from sparse_zero.files import atomic_write_json

METHODS = ("frozen", "blocks", "more_blocks", "rows", "columns", "mixed")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One layer and what is trained of it."""

    hidden: int = 1024  # in and out features
    tokens: int = 512
    block_size: int = 64
    blocks: int = 16  # for "blocks"; "more_blocks" has twice as many, and "mixed" half
    rows: int = 64  # or columns; "mixed" has a quarter of each
    placement: str = "inplace"
    kernels: str = "auto"  # of sz.set_kernels
    steps: int = 50  # timed, per method
    warmup: int = 5
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


SMALL = Settings(hidden=32, tokens=8, block_size=4, blocks=4, rows=4, steps=3, warmup=1)


def selection_of(method: str, settings: Settings) -> Any:
    """Random regions."""
    generator = torch.Generator().manual_seed(settings.seed)
    side = settings.hidden // settings.block_size

    def some(limit: int, number: int) -> Tensor:
        return torch.randperm(limit, generator=generator)[:number]

    num_blocks, num_rows, num_columns = {
        "blocks": (settings.blocks, 0, 0),
        "more_blocks": (2 * settings.blocks, 0, 0),
        "rows": (0, settings.rows, 0),
        "columns": (0, 0, settings.rows),
        "mixed": (settings.blocks // 2, settings.rows // 4, settings.rows // 4),
    }[method]
    cells = some(side * side, num_blocks)
    return sz.WeightSelection(
        shape=(settings.hidden, settings.hidden),
        block_size=settings.block_size,
        blocks=torch.stack([cells // side, cells % side], dim=1),
        rows=some(settings.hidden, num_rows),
        columns=some(settings.hidden, num_columns),
    )


def prepare(method: str, settings: Settings) -> tuple[Callable[[Tensor], None], float]:
    """One step of a layer, and the share of the weight that it trains."""
    torch.manual_seed(settings.seed)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    layer: Any = nn.Linear(settings.hidden, settings.hidden, bias=False, dtype=dtype, device=settings.device)
    layer.requires_grad_(False)
    if method != "frozen":
        # The whole input is kept, as beside other linears that read it.
        layer = sz.SparseLinear(layer, selection_of(method, settings), settings.placement, keep_input=True)  # type: ignore[arg-type]
    upstream = torch.randn(settings.tokens, settings.hidden, dtype=dtype, device=settings.device)

    def step(x: Tensor) -> None:
        layer(x.requires_grad_(True)).backward(upstream)
        x.grad = None
        if method != "frozen":
            layer.write_back()
            layer.zero_grad()

    trained = 0 if method == "frozen" else layer.selection.num_parameters
    return step, trained / settings.hidden**2


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    sz.set_kernels(settings.kernels)  # type: ignore[arg-type]
    methods = chosen_names(options.methods, METHODS, "--methods")
    methods = ("frozen", *(method for method in methods if method != "frozen"))
    prepared = {method: prepare(method, settings) for method in methods}

    def input_of(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(settings.tokens, settings.hidden, generator=generator)
        return x.to(settings.device, getattr(torch, settings.dtype))

    seconds = take_turns(
        {method: step for method, (step, _) in prepared.items()},
        input_of,
        warmup=settings.warmup,
        rounds=settings.steps,
        seed=settings.seed,
        device=settings.device,
        on_round=lambda number: None,
    )
    medians = {method: statistics.median(own) for method, own in seconds.items()}
    print(f"{'method':12} {'trained':>8} {'median':>10} {'/ frozen':>9} {'arithmetic':>11}")
    for method, median in medians.items():
        share = prepared[method][1]
        # Under delta the values are multiplied in forward, for the gradient of the input, and for their own.
        products = 2 + share * (3 if settings.placement == "delta" else 1)
        ratio = median / medians["frozen"]
        print(f"{method:12} {share:8.2%} {median * 1e3:7.3f} ms {ratio:9.3f} {products / 2:11.3f}")
    if options.json is not None:
        found = {"settings": asdict(settings), "machine": machine(), "median_seconds": medians}
        atomic_write_json(options.json, found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to compare, joined by commas")
    return exit_code(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
