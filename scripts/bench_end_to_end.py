#!/usr/bin/env python3
"""How many useful tokens a second does training see, next to PEFT's LoRA under transformers' Trainer, and why?

Useful tokens are those of the samples, without padding. Both sides start from one model, see the same samples in the
same batches, and train (nearly) as many parameters of the same modules. Ours is the real `sparse-zero train`; LoRA is
Trainer as it comes, with its collator that pads to the longest of a batch, and logits at all positions. Between them
stand runs of ours without some of its parts. Less padding comes in one of two ways: samples packed into one row (best
with kernels that know of samples; others compute the pairs of tokens that the mask hides, too), or a step cut into
small micro-batches, over which gradients are accumulated (ours: of like length). Trainer has a flag for small
micro-batches, too: LoRA runs with them as well, and ours with them is compared with that.

Every method is a process of its own, and they take turns: one step each in random order, while all others wait. A turn
is all that a step needs, the data, the optimizer and the log too. Afterwards each model has seen the same samples, and
its loss on others is told beside the speed.

Records: as long as GSM8K's (see scripts/records_of_lengths.py), or, with --data, train and validation in a folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import chosen_names, exit_code, make_parser, parse_flags, read_settings
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table
from scripts.training_in_turns import LORA, METHODS, PARTS, PREVIOUS, SMALL, Settings, child, read_samples
from sparse_zero.errors import InputError

TITLES = {
    "lora": "LoRA, Trainer",
    "lora_small": "LoRA, {small}",
    "sparse": "sparse layers",
    "logits": "+ label logits",
    "packing": "+ packing",
    "lengths": "or: {small}",
    "depth": "+ upper half",
}


def title_of(method: str, small_batch: int) -> str:
    """The method in two lines, for the table; small micro-batches of more than one are sorted by length."""
    return TITLES[method].format(small=f"micro-\nbatches of {'one' if small_batch == 1 else small_batch}")


def lora_parameters(settings: Settings, model: Any) -> int:
    """Entries of LoRA's two factors of every module."""
    names = settings.modules.split(",")
    shapes = [m.weight.shape for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    return settings.rank * sum(rows + columns for rows, columns in shapes)


def operations(settings: Settings, model: Any, samples: Any, lowest: Mapping[str, int], num_values: int) -> list[float]:
    """By method, the operations of all steps as modelled, in those of LoRA; padding is computed like anything else.

    LoRA's own products count as a delta's of as many values, at the padded length.
    """
    from sparse_zero.flops import flop_shape, step_flops

    shape, (_, train, _, order) = flop_shape(model), samples
    totals = []
    for method, layer in lowest.items():
        parts = PARTS.get(method, frozenset())
        places = [product for product in shape.products if product.layer is not None and product.layer >= layer]
        of_method = shape.with_values({places[0].name: num_values}, is_delta=method in LORA)
        size = settings.micro_batch_of(method)
        total = 0
        for start in range(0, len(order), settings.batch):
            step = [train[at] for at in order[start : start + settings.batch]]
            if "lengths" in parts:
                step.sort(key=lambda sample: -len(sample.input_ids))
            for batch in (step[at : at + size] for at in range(0, len(step), size)):
                lengths = [len(sample.input_ids) for sample in batch]
                labels = [sum(label >= 0 for label in sample.labels[1:]) for sample in batch]
                # A packed row is one sample for attention, which computes its masked pairs too.
                padded = [sum(lengths)] if "packing" in parts else [max(lengths)] * len(lengths)
                positions = sum(padded)
                if "packing" in parts:
                    positions = sum(labels)
                elif "logits" in parts:
                    first = min(length - number for length, number in zip(lengths, labels, strict=True))
                    positions = len(lengths) * (max(lengths) - first)
                total += step_flops(of_method, sample_lengths=padded, num_head_positions=positions).total
        totals.append(total)
    return [total / totals[0] for total in totals]


def measure(methods: Sequence[str], settings: Settings, folder: str, num_values: int) -> dict[str, Any]:
    """By method: what it said when it was ready, the seconds of its timed steps, and its loss at the end.

    Raises:
        RuntimeError: a method ended early; with the end of its log. The others are ended.
    """
    context = multiprocessing.get_context("spawn")
    # Read when torch is loaded.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    connections: dict[str, Connection] = {}
    processes: dict[str, SpawnProcess] = {}
    found: dict[str, Any] = {}

    def hear(method: str) -> Any:
        try:
            return connections[method].recv()
        except EOFError as error:
            log = (Path(folder) / f"{method}.log").read_text(errors="replace")
            raise RuntimeError(f"{method} ended early:\n{log[-4000:]}") from error

    try:
        for method in methods:
            connections[method], other = context.Pipe()
            process = context.Process(target=child, args=(method, settings, folder, num_values, other), daemon=True)
            process.start()
            other.close()
            processes[method] = process
            # One after the other, so that none computes while another takes its turn.
            found[method] = {**hear(method), "seconds": []}
        shuffler = random.Random(settings.seed)
        for number in range(settings.steps):
            for method in shuffler.sample(methods, len(methods)):
                started = time.perf_counter()
                connections[method].send("go")
                computed = hear(method)
                seconds = computed if settings.clock == "cpu" else time.perf_counter() - started
                if number >= settings.warmup:
                    found[method]["seconds"].append(seconds)
                if number + 1 == settings.steps:
                    found[method]["loss"] = hear(method)
                    # What it does at its end is no part of the others' turns.
                    processes[method].join(60)
    finally:
        # Only those that are late, or whose comparison has failed, are still there.
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()
    return found


def summarize(found: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By method: medians, useful tokens a second, and ratios of the same steps to the first and the previous method.

    Args:
        found: as from :func:`measure`.
        tokens: useful ones of the timed steps.

    ``speedup_over_previous`` is None where the method before was not run.
    """
    summary: dict[str, dict[str, Any]] = {}
    first = next(iter(found.values()))["seconds"]
    for method, row in found.items():
        seconds = row["seconds"]
        before = found.get(PREVIOUS.get(method, ""))
        ratios = sorted(slow / own for slow, own in zip(first, seconds, strict=True))
        summary[method] = {
            "trained": row["trained"],
            "lowest_layer": row["lowest"],
            "median_seconds": statistics.median(seconds),
            "tokens_per_second": sum(tokens) / sum(seconds),
            "speedup": statistics.median(ratios),
            "speedup_range": (ratios[0], ratios[-1]),
            "speedup_over_previous": None
            if before is None
            else statistics.median(slow / own for slow, own in zip(before["seconds"], seconds, strict=True)),
            "validation_loss": row["loss"],
        }
    return summary


def table_of(summary: Mapping[str, Mapping[str, Any]], predicted: Sequence[float], small_batch: int) -> Table:
    """The table that people read, in 110 columns."""
    title = "Useful tokens a second; speed-ups are medians over the same steps (least to most)"
    headings = ["method", "trained", "layers\nfrom", "step", "tokens/s", "times\nLoRA", "least-most", "times\nbefore"]
    rows = []
    for (method, row), modelled in zip(summary.items(), predicted, strict=True):
        low, high = row["speedup_range"]
        over_previous = row["speedup_over_previous"]
        rows.append(
            [
                title_of(method, small_batch),
                f"{row['trained'] / 1e6:.2f}M",
                str(row["lowest_layer"]),
                f"{row['median_seconds']:.2f} s",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['speedup']:.2f}",
                f"{low:.2f}-{high:.2f}",
                "-" if over_previous is None else f"{over_previous:.2f}",
                f"{1 / modelled:.2f}",
                f"{row['validation_loss']:.4f}",
            ]
        )
    return Table(title, [*headings, "modelled", "loss"], rows)


def make_inputs(settings: Settings, folder: str, small: bool) -> Settings:
    """Get the model and make the records where none are named."""
    from models.loading import ModelConfig, load_tokenizer
    from models.smollm2 import default_cache, smollm2_folder
    from scripts.records_of_lengths import write_records

    if not settings.model and small:
        from tests.models.tiny import write_tiny_llama

        settings = replace(settings, model=str(write_tiny_llama(Path(folder) / "model")))
    elif not settings.model:
        settings = replace(settings, model=str(smollm2_folder(default_cache())))
    if not settings.data:
        tokenizer = load_tokenizer(ModelConfig(name_or_path=settings.model))
        write_records(
            Path(folder) / "data",
            settings.steps * settings.batch,
            settings.validation,
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
            seed=settings.seed,
        )
        settings = replace(settings, data=f"{folder}/data")
    return settings


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    settings = read_settings(options, Settings(), SMALL)
    methods = chosen_names(options.methods, METHODS, "--methods")
    if methods[0] != "lora":
        raise InputError(f"--methods begins with {methods[0]!r}: begin with lora, over which the ratios are")
    with tempfile.TemporaryDirectory(prefix="sparse_zero_end_to_end_") as folder:
        settings = make_inputs(settings, folder, options.small)
        from models.loading import ModelConfig
        from models.skeleton import load_skeleton

        model = load_skeleton(ModelConfig(name_or_path=settings.model))
        samples = read_samples(settings)
        num_values = lora_parameters(settings, model)
        found = measure(methods, settings, folder, num_values)
    lowest = {method: int(row["lowest"]) for method, row in found.items()}
    predicted = operations(settings, model, samples, lowest, num_values)
    _, train, _, order = samples
    lengths = [len(train[at].input_ids) for at in order]
    per_step = [sum(lengths[at : at + settings.batch]) for at in range(0, len(lengths), settings.batch)]
    longest = [max(lengths[at : at + settings.micro_batch]) for at in range(0, len(lengths), settings.micro_batch)]
    summary = summarize(found, per_step[settings.warmup :])
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(summary, predicted, settings.small_batch)],
        remarks=[
            f"{len(order)} samples of {statistics.mean(lengths):.0f} tokens; padded batches are full to "
            f"{sum(lengths) / (settings.micro_batch * sum(longest)):.2f}"
        ],
        numbers={
            "methods": summary,
            "modelled_operations": dict(zip(found, predicted, strict=True)),
            "step_seconds": {method: row["seconds"] for method, row in found.items()},
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to compare, joined by commas")
    options = parse_flags(parser, arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
