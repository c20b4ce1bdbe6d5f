#!/usr/bin/env python3
"""How does the cost of a step grow with what is trained, and is that what the products of the values predict?

Budgets from 0.1% to 20% of all parameters, in equal parts in every q, k and v; what is more than half of those goes
into all seven linears of a layer. The prediction counts products only, from the shapes:

    1 + (2 x tokens x trained entries - products that need not be formed) / floor's FLOPs

Not formed are the gradients of the inputs of the lowest q, k and v: the floor has them, since it goes down to the
embeddings. The floor's FLOPs are those that torch counts in one step. What the optimizer and the write-back take is
timed beside it: their time is memory traffic, which the prediction leaves out.

All models take turns in random order, as in bench_step.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import sparse_zero as sz
from scripts.bench_step import batch_of
from scripts.benchmarking import (
    CLOCKS,
    LlamaSettings,
    check_clock,
    chosen_names,
    exit_code,
    make_parser,
    parse_flags,
    read_settings,
    take_turns,
)
from scripts.benchmarks.methods import FLOORS, MODULES, Prepared, build_models, prepare_floor, ready
from scripts.benchmarks.ratios import Ratio, noise_line, paired
from scripts.benchmarks.results import Chart, finish
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError

KINDS = {"blocks": "block", "rows": "row", "columns": "column"}
ALL_MODULES = (*MODULES, "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET = 0.05  # how far measured and predicted may be apart


@dataclass(frozen=True, kw_only=True)
class Settings(LlamaSettings):
    """The model, the batch, the budgets, and how often they are measured."""

    layers: int = 4
    budgets: str = "0.001,0.01,0.05,0.2"  # shares of all parameters, joined by commas
    block_size: int = 64
    steps: int = 15  # timed steps per point
    warmup: int = 2  # steps before, not counted
    max_seconds: float = 0.0  # no further round is begun after so many; 0: no limit
    clock: str = "wall"  # cpu: what the process worked; steadier beside other processes, for one thread

    def __post_init__(self) -> None:
        check_clock(self.clock, self.threads, self.device)

    def shares(self) -> list[float]:
        """The budgets as numbers.

        Raises:
            InputError: one is no share.
        """
        try:
            found = [float(text) for text in self.budgets.split(",")]
        except ValueError:
            found = []
        if not found or not all(0.0 < share < 1.0 for share in found):
            raise InputError(f"--budgets {self.budgets!r} must be shares between 0 and 1, such as 0.001,0.01")
        return found

    @property
    def input_products_not_formed(self) -> int:
        """FLOPs of the gradients of the inputs of the lowest q, k and v."""
        return 2 * self.batch * self.length * len(MODULES) * self.hidden**2


SMALL = Settings(
    hidden=64,
    layers=2,
    heads=4,
    intermediate=160,
    vocab=128,
    length=16,
    budgets="0.02,0.2",
    block_size=8,
    steps=3,
    warmup=1,
)


@dataclass(frozen=True)
class Point:
    """A kind at a budget."""

    kind: str  # of KINDS
    share: float  # of all parameters, asked for
    modules: tuple[str, ...]  # ends of the names of the modules that are trained

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.kind} {self.share:.2%}"

    def prepare(self, model: Any, settings: Settings) -> Prepared:
        """Make ``model`` train it."""
        region = sz.RegionConfig(
            kind=KINDS[self.kind],  # type: ignore[arg-type]
            modules=tuple(f"*.{module}" for module in self.modules),
            score="random",
            block_size=settings.block_size if self.kind == "blocks" else None,
        )
        budget = sz.BudgetConfig(fraction=self.share, over="matrix")
        config = sz.SelectionConfig(regions=(region,), budget=budget, seed=settings.seed)
        sz.sparsify(model, sz.select(model, None, config))
        return ready(model, write_back=True)


def points_of(kinds: Sequence[str], settings: Settings) -> list[Point]:
    """Every kind at every budget, in q, k and v, or in all linears where those hold too little."""
    layer = settings.hidden * (4 * settings.hidden + 3 * settings.intermediate)
    total = 2 * settings.vocab * settings.hidden + settings.layers * layer
    half = settings.layers * len(MODULES) * settings.hidden**2 / 2
    return [
        Point(kind, share, MODULES if share * total <= half else ALL_MODULES)
        for kind in kinds
        for share in settings.shares()
    ]


def flops_of(learn: Callable[[Tensor], Tensor], tokens: Tensor) -> int:
    """What torch counts in one forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        learn(tokens)
    return counter.get_total_flops()


def predict(num_trained: int, floor_flops: int, settings: Settings) -> float:
    """A step over the floor's, if only products took time."""
    products = 2 * settings.batch * settings.length * num_trained - settings.input_products_not_formed
    return 1.0 + products / floor_flops


def measure(
    points: Sequence[Point], settings: Settings, on_round: Callable[[int], None] = lambda number: None
) -> dict[str, Any]:
    """Seconds of every timed step and of its update, by floor and point, and what is made of them."""
    own: dict[str, tuple[str, ...]] = dict.fromkeys(FLOORS, ())
    own |= {p.name: tuple(f"*.{m}.*" for m in p.modules) for p in points}
    models = build_models(own, settings)
    prepared = {name: prepare_floor(models.pop(name)) for name in FLOORS}
    prepared |= {point.name: point.prepare(models.pop(point.name), settings) for point in points}
    updates: dict[str, list[float]] = {name: [] for name in prepared}

    def step_of(name: str) -> Callable[[Tensor], None]:
        def step(tokens: Tensor) -> None:
            float(prepared[name].learn(tokens))  # reading it waits for the device
            start = CLOCKS[settings.clock]()
            prepared[name].update()
            if settings.device != "cpu":
                torch.cuda.synchronize()
            updates[name].append(CLOCKS[settings.clock]() - start)

        return step

    floor_flops = flops_of(prepared["floor"].learn, batch_of(settings, 0))
    seconds = take_turns(
        {name: step_of(name) for name in prepared},
        lambda number: batch_of(settings, number),
        warmup=settings.warmup,
        rounds=settings.steps,
        seed=settings.seed,
        device=settings.device,
        on_round=on_round,
        max_seconds=settings.max_seconds,
        clock=settings.clock,
    )
    num_parameters = sum(parameter.numel() for parameter in prepared["floor"].model.parameters())
    found = []
    for point in points:
        own_seconds = seconds[point.name]
        ratio = paired(own_seconds, seconds["floor"])
        num_trained = prepared[point.name].num_trained
        predicted = predict(num_trained, floor_flops, settings)
        update = statistics.median(updates[point.name][settings.warmup :])
        found.append(
            {
                "kind": point.kind,
                "nominal": point.share,
                "modules": point.modules,
                "trained_parameters": num_trained,
                "share": num_trained / num_parameters,
                "over_floor": asdict(ratio),
                "predicted": predicted,
                "difference": ratio.median - predicted,
                "update_over_floor": update / statistics.median(seconds["floor"]),
            }
        )
    return {
        "num_parameters": num_parameters,
        "floor_flops": floor_flops,
        "floor_seconds": statistics.median(seconds["floor"]),
        "control": asdict(paired(seconds["floor2"], seconds["floor"])),
        "points": found,
        "step_seconds": seconds,
        "update_seconds": {name: each[settings.warmup :] for name, each in updates.items()},
    }


def table_of(result: Mapping[str, Any]) -> Table:
    """The table that people read."""
    rows = []
    for point in result["points"]:
        rows.append(
            [
                f"{point['kind']} {point['nominal']:.1%}",
                f"{point['trained_parameters'] / 1e6:,.2f}M",
                "qkv" if tuple(point["modules"]) == MODULES else "all",
                str(Ratio(**point["over_floor"])),
                f"{point['predicted']:.3f}",
                f"{point['difference']:+.3f}",
                f"{point['update_over_floor']:.3f}",
                "yes" if abs(point["difference"]) <= TARGET else "NO",
            ]
        )
    headings = ("budget", "trained", "in", "time / floor", "predicted", "difference", "update", f"within {TARGET:.0%}")
    return Table("A step by budget; update: optimizer and write-back, over the floor", headings, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every setting is a flag."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds to measure, joined by commas")
    parser.add_argument("--plot", type=Path, default=None, help="also draw measured and predicted into this PNG")
    return parse_flags(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    points = points_of(chosen_names(options.kinds, tuple(KINDS), "--kinds"), settings)
    torch.set_num_threads(settings.threads)
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("time", total=settings.warmup + settings.steps)
        result = measure(points, settings, lambda number: progress.update(task, completed=number))
    drawn = [{**point, **point["over_floor"], "measured": point["over_floor"]["median"]} for point in result["points"]]
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(result)],
        remarks=[noise_line(Ratio(**result["control"]))],
        chart=Chart("budget", "What is trained, and what a step costs", {"points": drawn}),
        numbers=result,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
