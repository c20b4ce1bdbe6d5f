#!/usr/bin/env python3
"""What is left of small updates when weights or values are kept in bf16?

A small Llama learns one random language in fp32 and is rounded to bf16; then its selected blocks are trained on another
language, for --steps steps of AdamW: once all in fp32, and in every variant from the same start on the same batches.
Compared is the change of the weights that act, entry by entry, with the change in fp32.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import sparse_zero as sz
from scripts.benchmarking import chosen_names, exit_code, machine, make_parser, random_llama, read_settings
from sparse_zero.collectives import lone_process_group
from sparse_zero.files import atomic_write_json
from sparse_zero.layers.carriers import carriers, values_name
from sparse_zero.zero.config import Placement, Rounding
from sparse_zero.zero.optimizers import OptimizerConfig, build_optimizer
from sparse_zero.zero.state import read_masters


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the task, and how long it is trained."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 128
    vocab: int = 128
    length: int = 32
    batch: int = 8
    # Steps of full training in fp32, before the base is rounded.
    pretraining: int = 400
    steps: int = 1_000
    block_size: int = 16
    # Of all parameters.
    fraction: float = 0.1
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


SMALL = Settings(hidden=16, layers=1, heads=2, intermediate=32, vocab=32, length=12, batch=4, pretraining=3, steps=5)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """In which precision what is kept."""

    placement: Placement
    base: torch.dtype = torch.bfloat16
    values: torch.dtype = torch.bfloat16
    # Whether an engine keeps fp32 masters of the values.
    masters: bool = True
    rounding: Rounding = "nearest"


VARIANTS = {
    "inplace-nearest": Variant(placement="inplace"),
    "inplace-stochastic": Variant(placement="inplace", rounding="stochastic"),
    "delta-bf16": Variant(placement="delta"),
    "delta-fp32": Variant(placement="delta", values=torch.float32, masters=False),
    "inplace-no-masters": Variant(placement="inplace", masters=False),
}
REFERENCE = Variant(placement="inplace", base=torch.float32, values=torch.float32, masters=False)


class Language:
    """Random next-token probabilities, sharp enough to be learnt: [vocab, vocab]."""

    def __init__(self, settings: Settings, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.probabilities = (3.0 * torch.randn(settings.vocab, settings.vocab, generator=generator)).softmax(1)
        self.settings = settings

    def batches(self, number: int, seed: int) -> Iterator[Tensor]:
        """``number`` batches [batch, length] of token ids."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(number):
            tokens = [torch.randint(0, self.settings.vocab, (self.settings.batch,), generator=generator)]
            for _ in range(self.settings.length - 1):
                tokens.append(torch.multinomial(self.probabilities[tokens[-1]], 1, generator=generator).squeeze(1))
            yield torch.stack(tokens, 1).to(self.settings.device)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Mean next-token loss, from logits in fp32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def pretrained(settings: Settings, language: Language) -> nn.Module:
    """The base: learnt in fp32, every weight a number that bf16 has."""
    model: nn.Module = random_llama(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for tokens in language.batches(settings.pretraining, settings.seed + 1):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def acting(model: nn.Module) -> Tensor:
    """Every entry that is trained, as it acts, in fp64: what stands in the weight, and what is added to it."""
    found = []
    for _, carrier in carriers(model):
        for kind, values in carrier.values().items():
            entries = carrier.entries(kind).double()
            found.append(entries + values.detach().double() if carrier.placement == "delta" else entries)
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a variant ends with."""

    # The trained entries as they act, in fp64.
    acting: Tensor
    # As an adapter would save them: the masters, where there are some; under delta, differences to the base.
    saved: Tensor
    # Mean over the last tenth of the steps.
    loss: float


def train(base: nn.Module, selection: sz.Selection, variant: Variant, rate: float, data: Sequence[Tensor]) -> Trained:
    """Train a copy of the base."""
    model = copy.deepcopy(base).to(variant.base)
    sz.sparsify(model, selection, variant.placement, values_dtype=variant.values)
    config = OptimizerConfig(learning_rate=rate)
    engine: Any = None
    if variant.masters:
        engine, *_ = sz.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": len(data[0]),
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
            optimizer=lambda groups: build_optimizer(groups, config),
            rounding=variant.rounding,
        )
    optimizer = build_optimizer(sz.parameter_groups(model), config) if engine is None else None
    losses = []
    for tokens in data:
        loss = loss_of(model if engine is None else engine, tokens)
        if engine is None:
            assert optimizer is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sz.write_back(model)
        else:
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    values = sz.trainable_parameters(model) if engine is None else read_masters(engine)
    saved = torch.cat([each.detach().double() for each in values.values()])
    found = Trained(acting=acting(model), saved=saved, loss=sum(last) / len(last))
    if engine is not None:
        engine.destroy()
    return found


def compare(start: Tensor, wanted: Tensor, found: Tensor) -> dict[str, float]:
    """How the change found differs from the one that is wanted."""
    change, reference = found - start, wanted - start
    moved = reference != 0
    return {
        "relative_distance": float((change - reference).norm() / reference.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(change, reference, dim=0)),
        "lost_fraction": float((change[moved] == 0).double().mean()),
    }


def measure(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """All rows, by learning rate and variant."""
    names = (
        list(VARIANTS) if options.variants == "all" else chosen_names(options.variants, list(VARIANTS), "--variants")
    )
    base = pretrained(settings, Language(settings, settings.seed + 2))
    task = Language(settings, settings.seed + 3)
    data = list(task.batches(settings.steps, settings.seed + 4))
    selection = sz.select(
        copy.deepcopy(base),
        data[:4],
        sz.SelectionConfig(
            regions=(sz.RegionConfig(kind="block", block_size=settings.block_size, modules=("*_proj",)),),
            budget=sz.BudgetConfig(fraction=settings.fraction),
            calibration_batches=4,
        ),
        loss_of,
    )
    dense = dict(base.named_parameters())
    start = torch.cat(
        [
            dense[f"{name.rpartition('.')[0]}.weight"].detach().reshape(-1)[positions].double()
            for name, positions in value_positions(base, selection).items()
        ]
    )
    rows = []
    for rate in options.rates:
        began = time.perf_counter()
        wanted = train(base, selection, REFERENCE, rate, data)
        say(f"rate {rate:g}, fp32: loss {wanted.loss:.4f}, {time.perf_counter() - began:.0f} s")
        for name in names:
            began = time.perf_counter()
            found = train(base, selection, VARIANTS[name], rate, data)
            from_base = VARIANTS[name].placement == "delta"
            saved = compare(start, wanted.acting, found.saved + start if from_base else found.saved)
            rows.append(
                {
                    "learning_rate": rate,
                    "variant": name,
                    **compare(start, wanted.acting, found.acting),
                    "saved_relative_distance": saved["relative_distance"],
                    "loss": found.loss,
                    "fp32_loss": wanted.loss,
                    # Median size of an entry's change in fp32, next to that of an entry.
                    "relative_change": float((wanted.acting - start).abs().median() / start.abs().median()),
                }
            )
            say(f"rate {rate:g}, {name}: {time.perf_counter() - began:.0f} s")
    return {"rows": rows, "trained": selection.num_parameters, "settings": vars(settings), "machine": machine()}


def value_positions(base: nn.Module, selection: sz.Selection) -> dict[str, Tensor]:
    """By name of the values, in their order: where their entries lie in the weights."""
    model = copy.deepcopy(base)
    sz.sparsify(model, selection)
    return {values_name(name, kind): c.positions(kind) for name, c in carriers(model) for kind in c.values()}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| learning rate | variant | relative distance | cosine | changes lost | distance as saved | loss − fp32's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = (
            f"{row['learning_rate']:g}",
            row["variant"],
            f"{row['relative_distance']:.3f}",
            f"{row['cosine']:.4f}",
            f"{row['lost_fraction']:.1%}",
            f"{row['saved_relative_distance']:.3f}",
            f"{row['loss'] - row['fp32_loss']:+.4f}",
        )
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the JSON."""
    parser = make_parser(__doc__, Settings)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-3], help="learning rates (1e-5 1e-3)")
    parser.add_argument("--variants", default="all", help=f"joined by commas, of {', '.join(VARIANTS)}; default: all")
    options = parser.parse_args(arguments)

    def work() -> None:
        settings = read_settings(options, Settings(), SMALL)
        with lone_process_group():
            result = measure(options, settings)
        print(table(result))
        if options.json is not None:
            atomic_write_json(options.json, result)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
