#!/usr/bin/env python3
"""What does calibration with frozen weights cost, next to what any gradient needs?

The floor is a forward and the gradients of the activations: backward from the loss to the output of the embeddings,
with all weights frozen. Over it come the hooks that read strip sums (abs_of_mean), or form each weight's gradient
(mean_of_abs). One random Llama does everything; rounds of some micro-batches take turns in random order, so that a slow
second of the machine hits all alike. The table shows the median time of a micro-batch and the ratios of minima and of
medians to the floor; setting the hooks up and computing the scores at the end is in it.
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

import sparse_zero as sz
from scripts.benchmarking import (
    LlamaSettings,
    chosen_names,
    exit_code,
    make_parser,
    parse_flags,
    random_llama,
    read_settings,
    take_turns,
)
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError
from sparse_zero.selection.calibration import calibrate
from sparse_zero.selection.candidates import find_candidates
from sparse_zero.selection.scores import resolve_score

ATTENTION = ("*.{q,k,v}_proj",)
LINEARS = ("*.{q,k,v,o}_proj", "*.{gate,up,down}_proj")
# Kinds and matrices that are scored, by which rule; what of the gradient the rule reads.
METHODS: Mapping[str, dict[str, Any]] = {
    "floor": {},
    "blocks_qkv": {"kinds": ("block",), "modules": ATTENTION, "score": "abs_of_mean"},
    "blocks": {"kinds": ("block",), "modules": LINEARS, "score": "abs_of_mean"},
    "rows": {"kinds": ("row",), "modules": LINEARS, "score": "abs_of_mean"},
    "columns": {"kinds": ("column",), "modules": LINEARS, "score": "abs_of_mean"},
    "all_kinds": {"kinds": ("block", "row", "column"), "modules": LINEARS, "score": "abs_of_mean"},
    "norms": {"kinds": ("column",), "modules": LINEARS, "score": "input_norm"},
    "gradient_qkv": {"kinds": ("block",), "modules": ATTENTION, "score": "mean_of_abs"},
    "gradient": {"kinds": ("block",), "modules": LINEARS, "score": "mean_of_abs"},
}


@dataclass(frozen=True, kw_only=True)
class Settings(LlamaSettings):
    """One comparison: the model, the micro-batches (of ``batch`` samples), and how often it is measured."""

    layers: int = 4
    micro_batches: int = 4  # of a round; what is timed is a round
    block_size: int = 64
    accumulate: str = "per_step"  # of the rules that read the whole gradient: sum or per_step
    rounds: int = 10  # timed rounds per method
    warmup: int = 2  # rounds before, not counted

    def __post_init__(self) -> None:
        if self.block_size > self.hidden:
            raise InputError(f"--block-size {self.block_size} is larger than --hidden {self.hidden}: lower it")


SMALL = Settings(
    hidden=64,
    layers=2,
    heads=4,
    intermediate=160,
    vocab=128,
    length=16,
    micro_batches=2,
    block_size=16,
    rounds=3,
    warmup=1,
)


def build_model(settings: Settings) -> Any:
    """The random Llama that everything runs on."""
    return random_llama(settings).requires_grad_(False)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Next-token loss of a micro-batch."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


Round = Callable[[Sequence[Tensor]], Any]


def floor(model: Any) -> Round:
    """Forward, and backward to the output of the embeddings."""

    def run(batches: Sequence[Tensor]) -> None:
        hook = model.get_input_embeddings().register_forward_hook(lambda *arguments: arguments[2].requires_grad_())
        for tokens in batches:
            loss = loss_of(model, tokens)
            loss.backward()
            float(loss.detach())  # waits for the device
        hook.remove()

    return run


def calibration(method: str, model: Any, settings: Settings) -> Round:
    """Scores of all regions that ``method`` names."""
    what = METHODS[method]
    config = sz.SelectionConfig(
        regions=tuple(
            sz.RegionConfig(
                kind=kind,
                modules=what["modules"],
                per_matrix=1,
                block_size=settings.block_size if kind == "block" else None,
            )
            for kind in what["kinds"]
        ),
        score=what["score"],
        accumulate=settings.accumulate if what["score"] == "mean_of_abs" else "sum",  # type: ignore[arg-type]
    )
    module_map = sz.default_module_map(model)
    candidates = find_candidates(config, module_map)
    rules = {config.score: resolve_score(config.score)}

    def run(batches: Sequence[Tensor]) -> Any:
        return calibrate(model, batches, candidates, rules, loss_of, config=config, module_map=module_map)

    return run


def prepare(method: str, model: Any, settings: Settings) -> Round:
    """What one round of a method does with its micro-batches."""
    return calibration(method, model, settings) if METHODS[method] else floor(model)


def batches_of(settings: Settings, number: int) -> list[Tensor]:
    """The random tokens [batch, length] of one round; its number decides them."""
    generator = torch.Generator().manual_seed(settings.seed * 1000 + number)
    shape = (settings.batch, settings.length)
    made = (torch.randint(0, settings.vocab, shape, generator=generator) for _ in range(settings.micro_batches))
    return [tokens.to(settings.device) for tokens in made]


def measure(
    methods: Sequence[str], settings: Settings, on_round: Callable[[int], None] = lambda number: None
) -> dict[str, list[float]]:
    """Seconds per micro-batch of every timed round, per method."""
    model = build_model(settings)
    seconds = take_turns(
        {method: prepare(method, model, settings) for method in methods},
        lambda number: batches_of(settings, number),
        warmup=settings.warmup,
        rounds=settings.rounds,
        seed=settings.seed,
        device=settings.device,
        on_round=on_round,
    )
    return {method: [each / settings.micro_batches for each in own] for method, own in seconds.items()}


def summarize(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Per method: median and minimum of a micro-batch, and their ratios to the floor's."""
    summary: dict[str, dict[str, float]] = {}
    for method, own in seconds.items():
        row = {"median_seconds": statistics.median(own), "min_seconds": min(own)}
        if "floor" in seconds:
            row["median_over_floor"] = row["median_seconds"] / statistics.median(seconds["floor"])
            row["min_over_floor"] = row["min_seconds"] / min(seconds["floor"])
        summary[method] = row
    return summary


def table_of(summary: Mapping[str, Mapping[str, float]]) -> Table:
    """The table that people read."""
    rows = []
    for method, row in summary.items():
        what = METHODS[method]
        ratio = f"{row['min_over_floor']:.3f} ({row['median_over_floor']:.3f})" if "min_over_floor" in row else "-"
        scored = f"{', '.join(what['kinds'])} of {', '.join(what['modules'])}" if what else "-"
        rows.append([method, what.get("score", "-"), scored, f"{row['median_seconds'] * 1e3:,.1f} ms", ratio])
    headings = ("method", "rule", "scored", "micro-batch", "time / floor")
    return Table("One calibration micro-batch; ratios are of minima (of medians)", headings, rows, num_words=3)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every setting is a flag."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to compare, joined by commas")
    return parse_flags(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    methods = chosen_names(options.methods, list(METHODS), "--methods")
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("time", total=settings.warmup + settings.rounds)
        seconds = measure(methods, settings, lambda number: progress.update(task, completed=number))
    summary = summarize(seconds)
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(summary)],
        numbers={"methods": summary, "micro_batch_seconds": seconds},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
