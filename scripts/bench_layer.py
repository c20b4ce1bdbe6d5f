#!/usr/bin/env python3
"""What does one linear cost, forward and backward, by every method, and how near is that to the machine's best?

Sizes go from tiny, where the time of each call counts, to a layer of Llama-2-7B, where the products do. Every method
that trains a part trains a sixteenth of the entries. The floor is the frozen linear: the product, and the gradient of
the input. `products` are the floor's two products alone, outside of autograd: their GFLOP/s are the roofline, and a
method's share of it is its own products' GFLOP/s over that.

All methods take turns in random order, as in bench_step.py. Ours include what puts the values into the weight; what
that takes alone is the column `write-back`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import sparse_zero as sz
from scripts.benchmarking import (
    check_clock,
    chosen_names,
    exit_code,
    make_parser,
    parse_flags,
    read_settings,
    take_turns,
)
from scripts.benchmarks.methods import DELTA, OURS, PUBLISHED
from scripts.benchmarks.peers import ConcatenatedRows, CopiedBlocks, DiagonalBlocks, MaskedLinear, Peer
from scripts.benchmarks.ratios import Ratio, noise_line, paired
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError
from sparse_zero.optional import require
from sparse_zero.zero.config import Placement

METHODS = ("products", "floor", "floor2", "dense", "lora", "dora", *PUBLISHED, *OURS, *DELTA)
PARTS = 16  # a part of so many is trained
# Of small_blocks: a grid of twice as many strips, so that each block has a quarter of the entries.
FINE_PARTS = 2 * PARTS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which layers, and how often they are measured."""

    sizes: str = "64x64,256x256,1024x1024,4096x4096,4096x11008"  # in x out features, joined by commas
    tokens: int = 512  # rows of the input
    rounds: int = 15  # timed turns per method
    warmup: int = 2  # turns before, not counted
    turn_seconds: float = 0.02  # a turn repeats the layer until the slowest method takes about this long
    max_seconds: float = 0.0  # of a size: no further round is begun after so many; 0: no limit
    threads: int = 2
    clock: str = "wall"  # cpu: what the process worked; steadier beside other processes, for one thread
    kernels: str = "auto"  # of sz.set_kernels
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_clock(self.clock, self.threads, self.device)

    def shapes(self) -> list[tuple[int, int]]:
        """(in, out) of every layer.

        Raises:
            InputError: a size is no pair of multiples of 32.
        """
        found = []
        for size in self.sizes.split(","):
            numbers = [int(number) for number in size.split("x") if number.isdecimal()]
            if len(numbers) != 2 or min(numbers) < 2 * FINE_PARTS or any(number % FINE_PARTS for number in numbers):
                raise InputError(
                    f"--sizes has {size!r}: give INxOUT features, multiples of {FINE_PARTS} from {2 * FINE_PARTS} on, "
                    "such as 1024x1024"
                )
            found.append((numbers[0], numbers[1]))
        return found


SMALL = Settings(sizes="64x64,64x96", tokens=32, rounds=3, warmup=1, turn_seconds=0.001)


@dataclass(frozen=True)
class Layer:
    """One method at one size."""

    call: Callable[[Tensor, Tensor], None]  # forward and backward, from [T, in] and the gradient [T, out]
    module: nn.Module
    num_trained: int
    flops: int  # of its products
    write_back: Callable[[], None] | None = None  # puts the values into the weight; None: nothing does


def prepare(method: str, in_features: int, out_features: int, settings: Settings) -> Layer:
    """The layer of a method; equal for all but for what is trained."""
    torch.manual_seed(settings.seed)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear = linear.to(device=settings.device, dtype=getattr(torch, settings.dtype))
    entries = in_features * out_features
    part, product = entries // PARTS, 2 * settings.tokens * entries
    flops = 2 * product + 2 * settings.tokens * part
    # A container, for what replaces a linear by its name.
    model: Any = nn.ModuleDict({"proj": linear.requires_grad_(False)})
    num_rows, write_back = out_features // PARTS, None
    if method == "products":
        weight = linear.weight.detach()
        return Layer(lambda x, dy: _products(x.detach(), dy, weight), linear, 0, 2 * product)
    if method in ("floor", "floor2"):
        flops = 2 * product
    elif method == "dense":
        linear.requires_grad_(True)
        flops = 3 * product
    elif method in ("lora", "dora"):
        rank = max(1, part // (in_features + out_features))
        _with_peft(model, method, rank)
        flops = 2 * product + 3 * 2 * settings.tokens * rank * (in_features + out_features)
    elif method == "concat":
        model["proj"] = ConcatenatedRows(linear, num_rows)
        flops = 3 * product  # cat's gradient comes from the dense one
    elif method == "diagonal":
        model["proj"] = DiagonalBlocks(linear, PARTS)
        flops = 2 * product + 3 * 2 * settings.tokens * part
    elif method in ("copies", "masked"):
        _put_published(model, method, linear)
        flops = 3 * product if method == "masked" else flops
    else:
        placement: Placement = "delta" if method in DELTA else "inplace"
        regions = _regions(method.removesuffix("_delta"), in_features, out_features)
        selection = sz.select(model, None, sz.SelectionConfig(regions=regions, seed=settings.seed))
        sz.sparsify(model, selection, placement=placement)
        write_back = partial(sz.write_back, model)
        if placement == "delta":
            flops += 2 * 2 * settings.tokens * part
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def call(x: Tensor, dy: Tensor) -> None:
        if write_back is not None:
            write_back()
        model["proj"](x).backward(dy)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    peer = model["proj"]
    num_trained = peer.num_trained if isinstance(peer, Peer) else sum(parameter.numel() for parameter in trained)
    return Layer(call, model, num_trained, flops, write_back)


def _products(x: Tensor, dy: Tensor, weight: Tensor) -> None:
    torch.nn.functional.linear(x, weight)
    dy @ weight


def _with_peft(model: nn.Module, method: str, rank: int) -> None:
    peft = require("peft", extra="dev", purpose="compare with LoRA and DoRA")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"], use_dora=method == "dora")
    peft.inject_adapter_in_model(config, model)


def _put_published(model: Any, method: str, linear: nn.Linear) -> None:
    """Square blocks of the narrower side's sixteenth, as many as make up the part."""
    size = min(linear.in_features, linear.out_features) // PARTS
    across, down = linear.in_features // size, linear.out_features // size
    number = max(1, across * down // PARTS)
    chosen = torch.randperm(across * down)[:number].sort().values.tolist()
    blocks = [divmod(block, across) for block in chosen]
    if method == "copies":
        model["proj"] = CopiedBlocks(linear, blocks, size)
        return
    mask = torch.zeros_like(linear.weight)
    for row, column in blocks:
        mask[row * size : (row + 1) * size, column * size : (column + 1) * size] = 1.0
    model["proj"] = MaskedLinear(linear, mask)


def _regions(method: str, in_features: int, out_features: int) -> tuple[sz.RegionConfig, ...]:
    rows, columns = out_features // PARTS, in_features // PARTS
    shares: dict[str, dict[str, tuple[int, int | None]]] = {
        "blocks": {"block": (PARTS, PARTS)},
        "small_blocks": {"block": (4 * PARTS, FINE_PARTS)},
        "rows": {"row": (rows, None)},
        "columns": {"column": (columns, None)},
        "mixed": {
            "block": (PARTS // 2, PARTS),
            "row": (max(1, rows // 4), None),
            "column": (max(1, columns // 4), None),
        },
    }
    return tuple(
        sz.RegionConfig(
            kind=kind,  # type: ignore[arg-type]
            modules=("proj",),
            per_matrix=number,
            blocks_per_side=side,
            score="random",
        )
        for kind, (number, side) in shares[method].items()
    )


def measure(methods: Sequence[str], in_features: int, out_features: int, settings: Settings) -> dict[str, Any]:
    """Seconds of every timed turn per method, for one forward and backward, and what each method does."""
    generator = torch.Generator().manual_seed(settings.seed)
    options: dict[str, Any] = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
    x = torch.randn(settings.tokens, in_features, generator=generator).to(**options).requires_grad_()
    dy = torch.randn(settings.tokens, out_features, generator=generator).to(**options)
    layers = {method: prepare(method, in_features, out_features, settings) for method in methods}
    slowest = max(_seconds_of(layer.call, x, dy, settings.turn_seconds) for layer in layers.values())
    repeats = max(1, round(settings.turn_seconds / slowest))

    def turns(calls: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
        def turn(call: Callable[[], None]) -> Callable[[int], None]:
            def repeat(number: int) -> None:
                for _ in range(repeats):
                    call()

            return repeat

        seconds = take_turns(
            {method: turn(call) for method, call in calls.items()},
            lambda number: number,
            warmup=settings.warmup,
            rounds=settings.rounds,
            seed=settings.seed,
            device=settings.device,
            on_round=lambda number: None,
            max_seconds=settings.max_seconds,
            clock=settings.clock,
        )
        return {method: [each / repeats for each in own] for method, own in seconds.items()}

    own = turns({method: partial(layer.call, x, dy) for method, layer in layers.items()})
    writes = {method: layer.write_back for method, layer in layers.items() if layer.write_back is not None}
    written = turns(writes) if writes else {}
    found = summarize(own, layers)
    for method, seconds in written.items():
        found[method]["write_back_seconds"] = statistics.median(seconds)
    return {"repeats": repeats, "seconds": own, "write_back_seconds": written, "methods": found}


def _seconds_of(call: Callable[[Tensor, Tensor], None], x: Tensor, dy: Tensor, enough: float) -> float:
    """Of the second call; of the first, if that already took ``enough``."""
    for _ in range(2):
        start = time.perf_counter()
        call(x, dy)
        taken = time.perf_counter() - start
        if taken > enough:
            break
    return taken


def summarize(seconds: Mapping[str, Sequence[float]], layers: Mapping[str, Layer]) -> dict[str, dict[str, Any]]:
    """Per method: time, ratio to the floor, GFLOP/s of its products and their share of the roofline."""
    summary: dict[str, dict[str, Any]] = {}
    for method, own in seconds.items():
        row: dict[str, Any] = {
            "trained_parameters": layers[method].num_trained,
            "flops": layers[method].flops,
            "median_seconds": statistics.median(own),
            "gflops_per_second": layers[method].flops / statistics.median(own) / 1e9,
        }
        if "floor" in seconds:
            row["over_floor"] = asdict(paired(own, seconds["floor"]))
        if "products" in seconds:
            slower = paired(own, seconds["products"]).median
            row["roofline_share"] = layers[method].flops / layers["products"].flops / slower
        summary[method] = row
    return summary


def tables_of(sizes: Mapping[str, Any], tokens: int) -> list[Table]:
    """A table for every size."""
    tables = []
    for size, found in sizes.items():
        rows = []
        for method, row in found["methods"].items():
            over = str(Ratio(**row["over_floor"])) if "over_floor" in row else "-"
            share = f"{row['roofline_share']:.0%}" if "roofline_share" in row else "-"
            trained = f"{row['trained_parameters']:,}"
            time_ms = f"{row['median_seconds'] * 1e3:,.3f} ms"
            written = f"{row['write_back_seconds'] * 1e3:,.3f} ms" if "write_back_seconds" in row else "-"
            rows.append([method, trained, time_ms, over, f"{row['gflops_per_second']:,.1f}", share, written])
        heading = f"One linear {size}, forward and backward, {tokens} tokens"
        columns = ("method", "trained", "time", "time / floor", "GFLOP/s", "of roofline", "write-back")
        tables.append(Table(heading, columns, rows))
    return tables


def remarks(sizes: Mapping[str, Any]) -> list[str]:
    """How noisy the machine was, by size."""
    return [
        f"{size}: {noise_line(Ratio(**found['methods']['floor2']['over_floor']))}"
        for size, found in sizes.items()
        if "over_floor" in found["methods"].get("floor2", {})
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every setting is a flag."""
    parser = make_parser(__doc__, Settings)
    usual = ",".join(method for method in METHODS if method not in DELTA)
    parser.add_argument("--methods", default=usual, help="methods to compare, joined by commas")
    parser.add_argument("--delta", action="store_true", help="also ours added to the product, under the names *_delta")
    return parse_flags(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    shapes = settings.shapes()
    methods = chosen_names(options.methods, METHODS, "--methods")
    if options.delta:
        methods += tuple(f"{m}_delta" for m in methods if m in OURS and f"{m}_delta" not in methods)
    torch.set_num_threads(settings.threads)
    sz.set_kernels(settings.kernels)  # type: ignore[arg-type]
    from rich.progress import Progress

    sizes = {}
    with Progress(transient=True) as progress:
        for in_features, out_features in progress.track(shapes, description="sizes"):
            sizes[f"{in_features}x{out_features}"] = measure(methods, in_features, out_features, settings)
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=tables_of(sizes, settings.tokens),
        remarks=remarks(sizes),
        numbers={"sizes": sizes},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
