#!/usr/bin/env python3
"""Does choosing need more memory than the sparse training that follows?

Measured: one process per variant; the peak of its resident size (on CUDA: of its allocator) while it calibrates, or
trains, on random tokens, next to that of the training steps, which are forward, backward, AdamW over the values, and
write-back. Simulated (--simulate): the same steps of a Llama 2 7B in bf16, real code on tensors without data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import sparse_zero as sz
from models.loading import checkpoint_activations
from scripts.benchmarking import exit_code, in_own_process, peak_of
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from sparse_zero.memory.simulation.simulate import simulated
from sparse_zero.selection.calibration import Observation
from sparse_zero.selection.observers import observe
from sparse_zero.selection.scores import resolve_score
from sparse_zero.selection.select import check_selection

# What is measured: training first, then calibrations by name with what they change in the selection's config.
VARIANTS: dict[str, dict[str, Any]] = {
    "training": {},
    "abs_of_mean": {"score": "abs_of_mean"},
    "mean_of_abs per_step": {"score": "mean_of_abs", "accumulate": "per_step"},
    "mean_of_abs sum": {"score": "mean_of_abs"},
    "mean_of_abs sum, on disk": {"score": "mean_of_abs", "accumulator_folder": "."},
    "full, stage 2": {"score": "abs_of_mean", "calibration_weights": "full"},
    "full, stage 3": {"score": "abs_of_mean", "calibration_weights": "full", "stage": 3},
}
MODULES = ("*.self_attn.{q,k,v,o}_proj", "*.mlp.{gate,up,down}_proj")


def selection_config(options: argparse.Namespace, changes: dict[str, Any]) -> sz.SelectionConfig:
    """Blocks of all linears under one budget, with the changes of a variant."""
    changes = dict(changes)
    stage = changes.pop("stage", 2)
    return sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", block_size=options.block_size, modules=MODULES),),
        budget=sz.BudgetConfig(fraction=options.fraction),
        calibration_batches=options.steps,
        full_calibration=sz.FullCalibrationConfig(batches_per_step=1, stage=stage),
        **{"score": "random", **changes},
    )


def batches(options: argparse.Namespace, vocabulary: int) -> Iterator[Tensor]:
    """Random tokens [batch, length], the same for every variant."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.steps):
        yield torch.randint(0, vocabulary, (options.batch, options.length), generator=generator)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Next-token loss of a micro-batch."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def work(model: Any, variant: str, options: argparse.Namespace) -> None:
    """Calibrate, or train some steps, as the variant says."""
    vocabulary = model.config.vocab_size
    if variant != "training":
        sz.select(model, batches(options, vocabulary), selection_config(options, VARIANTS[variant]), loss_of)
        return
    sz.sparsify(model, sz.select(model, None, selection_config(options, {})))
    optimizer = torch.optim.AdamW(sz.trainable_parameters(model).values(), lr=1e-4)
    for tokens in batches(options, vocabulary):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sz.write_back(model)


def load(options: argparse.Namespace) -> Any:
    """The model of --model, or SmolLM2-135M-Instruct, in fp32."""
    from transformers import AutoModelForCausalLM

    from models.smollm2 import default_cache, smollm2_folder

    folder = options.model or smollm2_folder(default_cache())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if options.checkpointing:
        checkpoint_activations(model)
    return model


def measure_here(variant: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes held by this process with the model loaded, and at most during the variant."""
    model = load(options)
    # What libraries load at the first step is no cost of a variant.
    loss_of(model, torch.zeros(1, 8, dtype=torch.int64)).backward()
    model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # accumulators on disk go here
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded, peak, _ = peak_of(lambda: work(model, variant, options), device, ": use --simulate")
        return {"loaded_bytes": loaded, "peak_bytes": peak}


def measure(variant: str, options: argparse.Namespace) -> dict[str, int]:
    """:func:`measure_here` in a process of its own."""
    arguments = ["--measure", variant]
    for name in ("batch", "length", "steps", "block_size", "fraction"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    arguments += ["--model", str(options.model.resolve())] if options.model else []
    arguments += ["--checkpointing"] if options.checkpointing else []
    found: dict[str, int] = in_own_process(__file__, arguments, options.threads)
    return found


def llama_7b(checkpointing: bool) -> Any:
    """Llama 2 7B in bf16 on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if checkpointing:
        checkpoint_activations(model)
    return model


def simulate(variant: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes of the loaded model, and at most during one step, on one GPU without ZeRO's partitioning.

    Optimizer state that the step itself does not make is added by formula: 12 bytes per trained parameter (fp32
    master, two moments).
    """
    options.block_size = 256
    model = llama_7b(options.checkpointing)
    tokens = torch.zeros(options.batch, options.length, dtype=torch.int64)
    config = selection_config(options, VARIANTS[variant])
    state = 0
    if variant == "training":
        selection = sz.select(model, None, config)
        sz.sparsify(model, selection)
        state = 12 * selection.num_parameters
    elif config.calibration_weights == "full":
        state = 12 * sum(parameter.numel() for parameter in model.parameters())
    module_map = sz.default_module_map(model)
    with simulated(model) as memory, contextlib.ExitStack() as stack:
        loaded = memory.live_bytes
        if variant != "training":
            candidates = check_selection(model, config, module_map)
            rules = {each.score: resolve_score(each.score) for each in candidates}
            trained = config.calibration_weights == "full"
            model.requires_grad_(trained)
            observation = stack.enter_context(
                Observation(model, candidates, rules, config=config, module_map=module_map, scale=1.0, trained=trained)
            )
            observe(model, observation.tallies, observation.running, stack)
            for tally in observation.tallies:  # There from the first micro-batch on, whose scores are checked, too.
                tally.totals.update({name: torch.zeros(shape) for name, shape in tally.shapes().items()})
            observation.running.begin(None, recording=True)
        loss = loss_of(model, tokens)
        if variant != "training":
            observation.running.in_backward = True
        loss.backward()
        return {"loaded_bytes": loaded, "peak_bytes": memory.peak_bytes + state}


def print_table(found: dict[str, dict[str, int]], title: str) -> None:
    """Peaks, and ratios to training: of the peaks, and of what they exceed the loaded model by."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in ("variant", "loaded", "peak", "peak / training", "growth / training's"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    training = found["training"]
    for variant, own in found.items():
        growth = own["peak_bytes"] - own["loaded_bytes"]
        table.add_row(
            variant,
            f"{own['loaded_bytes'] / 2**30:.2f} GiB",
            f"{own['peak_bytes'] / 2**30:.2f} GiB",
            f"{own['peak_bytes'] / training['peak_bytes']:.3f}",
            f"{growth / (training['peak_bytes'] - training['loaded_bytes']):.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="folder of a Llama; default: SmolLM2-135M-Instruct")
    parser.add_argument("--simulate", action="store_true", help="Llama 2 7B on tensors without data, not a real model")
    parser.add_argument("--batch", type=int, default=4, help="samples in a step (default: 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sample (default: 256)")
    parser.add_argument("--steps", type=int, default=3, help="steps of training, micro-batches of calibration")
    parser.add_argument("--block-size", type=int, default=64, help="default: 64; --simulate takes 256")
    parser.add_argument("--fraction", type=float, default=0.01, help="budget of the training (default: 0.01)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all variants")
    parser.add_argument("--variants", default=",".join(map(str, range(len(VARIANTS)))), help="numbers of the variants")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="also write all numbers to this file")
    parser.add_argument("--measure", choices=list(VARIANTS), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure or simulate, print and write what the command line asks for."""
    if options.measure is not None:
        print(json.dumps(measure_here(options.measure, options)))
        return
    variants = [list(VARIANTS)[int(number)] for number in options.variants.split(",")]
    if variants[0] != "training":
        raise InputError(f"--variants is {options.variants}: start with 0, training, which all are compared with")
    one = simulate if options.simulate else measure
    found = {variant: one(variant, options) for variant in variants}
    what = "Llama 2 7B, simulated" if options.simulate else str(options.model or "SmolLM2-135M-Instruct")
    print_table(found, f"{what}: batch {options.batch} x {options.length}, checkpointing {options.checkpointing}")
    if options.json is not None:
        atomic_write_json(options.json, {"variants": found, "settings": {k: str(v) for k, v in vars(options).items()}})


if __name__ == "__main__":
    sys.exit(main())
