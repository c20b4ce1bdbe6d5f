#!/usr/bin/env python3
"""How many useful tokens a second does training see, next to PEFT's LoRA under transformers' Trainer, and why?

Useful tokens are those of the samples, without padding. Both sides start from one model, see the same samples in the
same batches, and train (nearly) as many parameters of the same modules. Ours is the real `sparse-zero train`; LoRA is
Trainer as it comes, with its collator that pads to the longest of a batch, and logits at all positions. Between them
stand runs of ours without some of its parts: each row of the table has one more than the row above.

Every method is a process of its own, and they take turns: one step each in random order, while all others wait. A turn is
all that a step needs, the data, the optimizer and the log too. Afterwards each model has seen the same samples, and its
loss on others is told beside the speed.

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
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import chosen_names, exit_code, machine, make_parser, read_settings
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json

# What each method of ours has: each one more than the one before it, whose name it bears.
PARTS: Mapping[str, frozenset[str]] = {
    "sparse": frozenset(),
    "logits": frozenset({"logits"}),
    "packing": frozenset({"logits", "packing"}),
    "depth": frozenset({"logits", "packing", "depth"}),
}
METHODS = ("lora", *PARTS)
TITLES = {
    "lora": "LoRA, Trainer",
    "sparse": "our loop, sparse layers",
    "logits": "+ logits at labels only",
    "packing": "+ packed samples",
    "depth": "+ upper layers only",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison."""

    model: str = ""  # folder of a model; none: SmolLM2-135M-Instruct, got once
    data: str = ""  # folder with train and validation records; none: they are made
    question: str = "instruction"  # field of the records
    answer: str = "output"  # field of the records
    modules: str = "q_proj,k_proj,v_proj"  # trained, joined by commas
    rank: int = 16  # of LoRA; ours trains at most as many parameters
    block_size: int = 64
    min_depth: float = 0.5  # of the last row
    batch: int = 8  # samples of a step
    micro_batch: int = 8  # samples of a forward pass
    max_length: int = 512
    steps: int = 12  # of every method
    warmup: int = 2  # of them, not timed
    validation: int = 32  # records
    learning_rate: float = 1e-3  # of ours, constant
    lora_learning_rate: float = 1e-3  # of LoRA, constant
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"--warmup {self.warmup} of --steps {self.steps} leaves nothing to time: raise --steps")
        if self.batch % self.micro_batch:
            raise InputError(f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}: make it one")


SMALL = Settings(rank=4, block_size=8, batch=4, micro_batch=2, steps=3, warmup=1, validation=4, threads=1)


# --- the two sides --------------------------------------------------------------------------------------------


class Turns:
    """This process's side of taking turns: it says that it is ready or has done a step, and waits to be told to go on."""

    def __init__(self, connection: Connection, num_steps: int) -> None:
        self.connection, self.num_steps, self.done = connection, num_steps, 0

    def begin(self, **facts: Any) -> None:
        """All is loaded; the next thing is the first step."""
        self.connection.send(facts)
        self.connection.recv()

    def step(self) -> None:
        """A step is over."""
        self.done += 1
        self.connection.send(self.done)
        if self.done < self.num_steps:
            self.connection.recv()


def run_config(settings: Settings, folder: str, method: str, num_values: int) -> dict[str, Any]:
    """The YAML of our run."""
    parts = PARTS[method]
    return {
        "model": {"name_or_path": settings.model, "dtype": "float32", "attention": "sdpa"},
        "data": data_section(settings, "pack" if "packing" in parts else "pad"),
        "selection": {
            "regions": [
                {
                    "kind": "block",
                    "block_size": settings.block_size,
                    "modules": [f"*.{name}" for name in settings.modules.split(",")],
                }
            ],
            "budget": {"parameters": num_values},
            "min_depth": settings.min_depth if "depth" in parts else 0.0,
            "calibration_batches": 8,
            "calibration_batch_size": 2,
        },
        "training": {
            "steps": settings.steps,
            "global_batch_size": settings.batch,
            "micro_batch_size": settings.micro_batch,
            "learning_rate": settings.learning_rate,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "seed": settings.seed,
        },
        "zero": {"stage": 2, "placement": "inplace"},
        "output": {"folder": f"{folder}/{method}", "adapter": False},
    }


def data_section(settings: Settings, batching: str = "pad") -> dict[str, Any]:
    """What both sides read."""
    return {
        "train": settings.data,
        "validation": settings.data,
        "fields": {"instruction": settings.question, "output": settings.answer},
        "template": "plain",
        "max_length": settings.max_length,
        "batching": batching,
    }


def train_ours(method: str, settings: Settings, folder: str, num_values: int, turns: Turns) -> float:
    """`sparse-zero train`, whose log of metrics is told of every step; its validation loss."""
    import yaml

    import launcher.train as worker
    import launcher.training_loop as loop
    from launcher.config import load_config
    from launcher.metrics import MetricsLog
    from models.loss import nll_at
    from sparse_zero import Selection

    run = run_config(settings, folder, method, num_values)
    path = Path(folder) / f"{method}.yaml"
    path.write_text(yaml.safe_dump(run))
    losses: list[float] = []

    class LogThatWaits(MetricsLog):
        def __init__(self, run_folder: Path, **options: Any) -> None:
            super().__init__(run_folder, **options)
            selection = Selection.load(run_folder / "selection.safetensors")
            turns.begin(trained=selection.num_parameters, lowest=selection.metadata["depth"]["lowest_layer"])

        def write(self, row: Mapping[str, object]) -> None:
            super().write(row)
            if row["kind"] == "train":
                turns.step()
            elif row["kind"] == "validation":
                losses.append(float(row["loss"]))  # type: ignore[arg-type]

    worker.MetricsLog = LogThatWaits  # type: ignore[misc]
    if "logits" not in PARTS[method]:
        import torch

        def nll_of_all(model: Any, batch: Mapping[str, Any]) -> Any:
            return nll_at(model, batch, torch.arange(batch["labels"].shape[1] - 1))

        loop.response_nll = nll_of_all
    if worker.run(load_config(path, [])) != 0:
        raise RuntimeError(f"{method} failed")
    return losses[-1]


def train_lora(settings: Settings, folder: str, samples: Any, turns: Turns) -> float:
    """PEFT's LoRA under Trainer on the same batches; its validation loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from models.collate import collate_pad, response_tokens
    from models.loss import response_nll

    tokenizer, train, validation, order = samples
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, attn_implementation="sdpa")
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=0.0,
            target_modules=settings.modules.split(","),
            task_type="CAUSAL_LM",
        ),
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    class TakesTurns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin(trained=trained, lowest=0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step()

    arguments = TrainingArguments(
        f"{folder}/lora",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        learning_rate=settings.lora_learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings.seed,
    )
    rows = [{"input_ids": train[at].input_ids, "labels": train[at].labels} for at in order]
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[TakesTurns()]).train()
    model.eval()
    total = 0.0
    with torch.no_grad():
        for sample in validation:
            batch = {name: tensor.to(model.device) for name, tensor in collate_pad([sample], 0).items()}
            total += float(response_nll(model, batch))
    return total / response_tokens(validation)


def read_samples(settings: Settings) -> tuple[Any, Any, Any, list[int]]:
    """Tokenizer, training and validation samples, and the order in which our sampler has the former."""
    from models.data import DataConfig, FieldConfig, load_samples
    from models.loading import ModelConfig, load_tokenizer
    from models.sampler import BatchSampler

    tokenizer = load_tokenizer(ModelConfig(name_or_path=settings.model))
    section = data_section(settings)
    config = DataConfig(**{**section, "fields": FieldConfig(**section["fields"])})
    train, validation = (load_samples(config, tokenizer, split).samples for split in ("train", "validation"))
    sampler = BatchSampler(len(train), settings.batch, settings.batch, 1, 0, settings.seed, True)
    order = [at for step in range(settings.steps) for at in sampler.step(step).global_indices]
    if len(order) < settings.steps * settings.batch:
        raise InputError(f"--data has {len(train)} records, an epoch of which ends in a smaller batch: lower --steps")
    return tokenizer, train, validation, order


def child(method: str, settings: Settings, folder: str, num_values: int, connection: Connection) -> None:
    """What the process of a method does."""
    import torch

    torch.set_num_threads(settings.threads)
    sys.stdout = sys.stderr = open(Path(folder) / f"{method}.log", "w")  # noqa: SIM115
    turns = Turns(connection, settings.steps)
    if method in PARTS:
        loss = train_ours(method, settings, folder, num_values, turns)
    else:
        loss = train_lora(settings, folder, read_samples(settings), turns)
    connection.send(loss)


# --- measuring ------------------------------------------------------------------------------------------------


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
    batches = [order[at : at + settings.micro_batch] for at in range(0, len(order), settings.micro_batch)]
    totals = []
    for method, layer in lowest.items():
        parts = PARTS.get(method, frozenset())
        places = [product for product in shape.products if product.layer is not None and product.layer >= layer]
        trained = {places[0].name: num_values}
        of_method = shape.with_values(trained, is_delta=method not in PARTS)
        total = 0
        for batch in batches:
            lengths = [len(train[at].input_ids) for at in batch]
            labels = [sum(label >= 0 for label in train[at].labels[1:]) for at in batch]
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
    """By method: what it said when it was ready, the seconds of its timed steps, and its loss at the end."""
    context = multiprocessing.get_context("spawn")
    # Read when torch is loaded.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    connections: dict[str, Connection] = {}
    processes = []
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
            processes.append(process)
            # One after the other, so that none computes while another takes its turn.
            found[method] = {**hear(method), "seconds": []}
        shuffler = random.Random(settings.seed)
        for number in range(settings.steps):
            for method in shuffler.sample(methods, len(methods)):
                started = time.perf_counter()
                connections[method].send("go")
                hear(method)
                if number >= settings.warmup:
                    found[method]["seconds"].append(time.perf_counter() - started)
                if number + 1 == settings.steps:
                    found[method]["loss"] = hear(method)
    finally:
        for process in processes:
            process.join(60 if len(found) == len(methods) else 0)
            process.kill()
    return found


def summarize(found: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By method: medians, useful tokens a second, and ratios of the same steps to the first method and the one before.

    Args:
        found: as from :func:`measure`.
        tokens: useful ones of the timed steps.
    """
    summary: dict[str, dict[str, Any]] = {}
    first = previous = None
    for method, row in found.items():
        seconds = row["seconds"]
        first, before = first or seconds, previous or seconds
        ratios = sorted(slow / own for slow, own in zip(first, seconds, strict=True))
        summary[method] = {
            "trained": row["trained"],
            "lowest_layer": row["lowest"],
            "median_seconds": statistics.median(seconds),
            "tokens_per_second": sum(tokens) / sum(seconds),
            "speedup": statistics.median(ratios),
            "speedup_range": (ratios[0], ratios[-1]),
            "speedup_over_row_above": statistics.median(
                slow / own for slow, own in zip(before, seconds, strict=True)
            ),
            "validation_loss": row["loss"],
        }
        previous = seconds
    return summary


def print_summary(summary: Mapping[str, Mapping[str, Any]], predicted: Sequence[float]) -> None:
    """The table that people read, in 100 columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Useful tokens a second; speed-ups are medians over the same steps (least to most)")
    for name in ("method", "trained", "layers\nfrom", "step", "tokens/s", "times LoRA", "times the\nrow above"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_column("modelled", justify="right")
    table.add_column("loss", justify="right")
    for (method, row), modelled in zip(summary.items(), predicted, strict=True):
        low, high = row["speedup_range"]
        table.add_row(
            TITLES[method],
            f"{row['trained'] / 1e6:.2f}M",
            str(row["lowest_layer"]),
            f"{row['median_seconds']:.2f} s",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})",
            f"{row['speedup_over_row_above']:.2f}",
            f"{1 / modelled:.2f}",
            f"{row['validation_loss']:.4f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


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
    print(
        f"{len(order)} samples of {statistics.mean(lengths):.0f} tokens; padded batches are full to "
        f"{sum(lengths) / (settings.micro_batch * sum(longest)):.2f}"
    )
    print_summary(summary, predicted)
    if options.json is not None:
        atomic_write_json(
            options.json,
            {
                "settings": asdict(settings),
                "machine": machine(),
                "methods": summary,
                "modelled_operations": dict(zip(found, predicted, strict=True)),
                "step_seconds": {method: row["seconds"] for method, row in found.items()},
            },
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to compare, joined by commas")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
