#!/usr/bin/env python3
"""What does it cost, in time and peak memory, to choose regions of a model of 7B once they have scores?

The matrices are those of Llama-2-7B (all seven linears of 32 layers), the scores are random numbers. The budget is a
number of blocks' worth of parameters, whatever competes for it:

    blocks   all blocks, in one ranking
    mixed    all blocks, rows and columns, in one ranking; overlaps are counted once
    matrix   the same regions, an equal part of the budget for every matrix
    layers   the same regions, with a floor and a cap for every layer, and attention and MLP as groups

One process per case. Memory: the peak of its resident size while it chooses, over that with the scores in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    make_parser,
    parse_flags,
    peak_of,
    read_settings,
)
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from sparse_zero.module_map import Matrix, ModuleMap, layer_index
from sparse_zero.selection.budget import Choice, choose
from sparse_zero.selection.candidates import Candidates, find_candidates
from sparse_zero.selection.config import MATRIX_KINDS, BudgetConfig, BudgetGroupConfig, Kind

CASES = ("blocks", "mixed", "matrix", "layers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model's shape, how much is chosen, and how often that is measured."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    block_size: int = 256
    num_blocks: int = 900  # the budget: the parameters of this many blocks
    repeats: int = 5  # timed choices
    threads: int = 1
    seed: int = 0


SMALL = Settings(hidden=32, intermediate=80, layers=3, block_size=8, num_blocks=30, repeats=2)


@dataclass(frozen=True)
class Problem:
    """What :func:`choose` is given."""

    candidates: list[Candidates]
    scores: dict[tuple[str, Kind], Tensor]
    budget: BudgetConfig
    module_map: ModuleMap

    @property
    def num_regions(self) -> int:
        """Regions that compete."""
        return sum(c.num_regions for c in self.candidates)

    @property
    def num_parameters(self) -> int:
        """Entries of all matrices."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in self.module_map.matrices)

    def choose(self) -> Choice:
        """The choice that is measured."""
        return choose(
            self.candidates,
            self.scores,
            self.budget,
            module_map=self.module_map,
            num_parameters_model=self.num_parameters,
            size_neutral=False,
        )


def build_map(settings: Settings) -> ModuleMap:
    """The linears of a Llama, without a model."""
    hidden, intermediate = settings.hidden, settings.intermediate
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    matrices = [
        Matrix(name=name, owners=((name, "weight"),), shape=shape)
        for layer in range(settings.layers)
        for suffix, shape in shapes.items()
        for name in (f"model.layers.{layer}.{suffix}",)
    ]
    layer_of = {m.name: at for m in matrices if (at := layer_index(m.name)) is not None}
    return ModuleMap(matrices=tuple(matrices), layer_of=layer_of, role_of={})


def build(case: str, settings: Settings) -> Problem:
    """The candidates of a case, with random scores."""
    module_map = build_map(settings)
    kinds: tuple[Kind, ...] = ("block",) if case == "blocks" else MATRIX_KINDS
    parameters = settings.num_blocks * settings.block_size**2
    budget = BudgetConfig(parameters=parameters)
    if case == "matrix":
        budget = replace(budget, over="matrix")
    elif case == "layers":
        groups = (
            BudgetGroupConfig(modules=("*.self_attn.*",), share=0.7),
            BudgetGroupConfig(modules=("*.mlp.*",), share=0.3),
        )
        low, high = 0.5 / settings.layers, min(1.0, 1.5 / settings.layers)
        budget = replace(budget, groups=groups, min_share_per_layer=low, max_share_per_layer=high)
    config = sz.SelectionConfig(
        regions=tuple(
            sz.RegionConfig(kind=kind, modules=("*",), block_size=settings.block_size if kind == "block" else None)
            for kind in kinds
        ),
        budget=budget,
    )
    candidates = find_candidates(config, module_map)
    generator = torch.Generator().manual_seed(settings.seed)
    scores = {(c.weight, c.kind): torch.rand(c.grid, dtype=torch.float64, generator=generator) for c in candidates}
    return Problem(candidates, scores, budget, module_map)


def measure_here(case: str, settings: Settings) -> dict[str, Any]:
    """Seconds of every choice, bytes by which this process grows at most during one, and what was chosen."""
    # What the interpreter and the libraries load at the first choice is no cost of it.
    build(case, replace(SMALL, seed=settings.seed)).choose()
    problem = build(case, settings)
    loaded, peak, choice = peak_of(problem.choose, "cpu", "")
    seconds = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        problem.choose()
        seconds.append(time.perf_counter() - start)
    return {
        "num_regions": problem.num_regions,
        "chosen": {kind: sum(w.num_regions(kind) for w in choice.weights.values()) for kind in MATRIX_KINDS},
        "num_parameters": sum(w.num_parameters for w in choice.weights.values()),
        "num_parameters_left": choice.num_parameters_left,
        "seconds": seconds,
        "min_seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "peak_growth_bytes": peak - loaded,
    }


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """:func:`measure_here` in a process of its own."""
    found: dict[str, Any] = in_own_process(__file__, ["--measure", case, *as_flags(settings)], settings.threads)
    return found


def table_of(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table that people read."""
    rows = [
        [
            case,
            f"{row['num_regions']:,}",
            *(f"{row['chosen'][kind]:,}" for kind in MATRIX_KINDS),
            f"{row['num_parameters']:,}",
            f"{row['median_seconds']:.3f} s",
            f"{row['min_seconds']:.3f} s",
            f"{row['peak_growth_bytes'] / 2**20:,.0f} MiB",
        ]
        for case, row in results.items()
    ]
    headings = ("case", "regions", "blocks", "rows", "columns", "parameters", "time", "minimum", "memory")
    return Table("One choice; memory is the peak over what was held with the scores in memory", headings, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every setting is a flag."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--cases", default=",".join(CASES), help="cases to measure, joined by commas")
    parser.add_argument("--measure", choices=CASES, default=None, help=argparse.SUPPRESS)
    return parse_flags(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    if options.measure is not None:
        torch.set_num_threads(settings.threads)
        print(json.dumps(measure_here(options.measure, settings)))
        return
    cases = chosen_names(options.cases, CASES, "--cases")
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        results = {case: measure(case, settings) for case in progress.track(cases, description="cases")}
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(results)],
        numbers={"cases": results},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
