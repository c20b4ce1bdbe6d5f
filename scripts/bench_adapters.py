#!/usr/bin/env python3
"""What do write-back, an optimizer step, loading an adapter and exchanging two of them cost, next to PEFT's LoRA?

Equal numbers of parameters in the same modules of one model. In every round each action is done once, in random order,
in one process; the table has medians, and ratios of the same rounds. LoRA's exchange turns a switch and leaves its
products to every forward pass from then on; merged, as ours inplace, it costs nothing there, so both are told.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sparse_zero as sz
from scripts.benchmarking import exit_code, make_parser, parse_flags, read_settings
from scripts.benchmarks.results import finish
from scripts.benchmarks.tables import Table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison."""

    model: str = ""  # folder of a model; none: SmolLM2-135M-Instruct, got once
    modules: str = "q_proj,k_proj,v_proj"  # joined by commas
    rank: int = 16  # of LoRA; ours has at most as many parameters
    block_size: int = 64
    rounds: int = 10  # timed ones
    warmup: int = 2  # rounds before
    threads: int = 2
    seed: int = 0


SMALL = Settings(rank=4, block_size=8, rounds=2, warmup=1, threads=1)


@dataclass(frozen=True, kw_only=True)
class Action:
    """Something that takes time, and what puts everything back afterwards, which is not timed."""

    work: Callable[[], object]
    after: Callable[[], object] = field(default=lambda: None)


# Rows of the table: the action of ours, and what stands against it.
ROWS: Mapping[str, tuple[str, str | None]] = {
    "optimizer step": ("step", "LoRA: step"),
    "write-back": ("write-back", None),
    "step and write-back": ("step, write-back", "LoRA: step"),
    "load an adapter": ("load", "LoRA: load"),
    "exchange, inplace against merged": ("exchange", "LoRA: exchange merged"),
    "exchange, delta against unmerged": ("exchange delta", "LoRA: exchange"),
    "load the whole model, for comparison": ("load the model", None),
}


def base(settings: Settings) -> Any:
    """The model, loaded anew."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)


def with_gradients(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the parameters, all of which have a gradient."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4)


def lora_on(model: Any, settings: Settings, seed: int) -> Any:
    """``model`` with a random adapter of LoRA, named default."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = settings.modules.split(",")
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules=targets, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def write_adapters(settings: Settings, folder: Path) -> tuple[Any, Any]:
    """Two adapters of either side below ``folder``; a model of each that is ready to be trained."""
    peer: Any = None
    for name in "ab":
        peer = lora_on(base(settings), settings, seed=ord(name))
        peer.save_pretrained(folder / f"lora-{name}")
    parameters = sum(parameter.numel() for parameter in peer.parameters() if parameter.requires_grad)
    model: Any = None
    for name in "ab":
        model = base(settings)
        region = sz.RegionConfig(
            kind="block",
            block_size=settings.block_size,
            modules=tuple(f"*.{module}" for module in settings.modules.split(",")),
        )
        config = sz.SelectionConfig(
            regions=(region,), score="random", seed=ord(name), budget=sz.BudgetConfig(parameters=parameters)
        )
        sz.sparsify(model, sz.select(model, None, config))
        with torch.no_grad():
            for values in sz.trainable_parameters(model).values():
                values.mul_(1.01)
        sz.write_back(model)
        sz.save_adapter(model, folder / f"ours-{name}")
    return model, peer


def make_actions(settings: Settings, folder: Path) -> tuple[dict[str, Action], dict[str, int], dict[str, Any]]:
    """All that is timed; the trained parameters of either side; and the models in which adapters are exchanged."""
    from peft import PeftModel

    ours, peer = write_adapters(settings, folder)
    values = list(sz.trainable_parameters(ours).values())
    adapters = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer, peer_optimizer = with_gradients(values), with_gradients(adapters)

    def step_and_write() -> None:
        optimizer.step()
        sz.write_back(ours)

    served: dict[str, Any] = {}
    for placement in ("inplace", "delta"):
        served[placement] = base(settings)
        for name in "ab":
            sz.load_adapter(served[placement], folder / f"ours-{name}", name=name, placement=placement)
    bare = base(settings)
    peer_served = PeftModel.from_pretrained(base(settings), folder / "lora-a", adapter_name="a")
    peer_served.load_adapter(folder / "lora-b", "b")
    merged = PeftModel.from_pretrained(base(settings), folder / "lora-a", adapter_name="a")
    merged.load_adapter(folder / "lora-b", "b")
    merged.merge_adapter(["a"])
    loads = iter(range(10**9))
    turn = dict.fromkeys(("inplace", "delta", "unmerged", "merged"), "b")

    def other(of: str) -> str:
        name = turn[of]
        turn[of] = "a" if name == "b" else "b"
        return name

    def exchange_merged() -> None:
        name = other("merged")
        merged.unmerge_adapter()
        merged.set_adapter(name)
        merged.merge_adapter([name])

    def load_peer() -> None:
        peer_served.load_adapter(folder / "lora-a", "c")
        peer_served.set_adapter("c")

    def drop_peer() -> None:
        peer_served.set_adapter("a")
        turn["unmerged"] = "b"
        peer_served.delete_adapter("c")

    actions = {
        "step": Action(work=optimizer.step),
        "write-back": Action(work=lambda: sz.write_back(ours)),
        "step, write-back": Action(work=step_and_write),
        "load": Action(
            work=lambda: sz.load_adapter(bare, folder / "ours-a", name=f"load {next(loads)}"),
            after=lambda: sz.set_adapter(bare, None),
        ),
        "exchange": Action(work=lambda: sz.set_adapter(served["inplace"], other("inplace"))),
        "exchange delta": Action(work=lambda: sz.set_adapter(served["delta"], other("delta"))),
        "load the model": Action(work=lambda: base(settings)),
        "LoRA: step": Action(work=peer_optimizer.step),
        "LoRA: load": Action(work=load_peer, after=drop_peer),
        "LoRA: exchange": Action(work=lambda: peer_served.set_adapter(other("unmerged"))),
        "LoRA: exchange merged": Action(work=exchange_merged),
    }
    # After loading, the second adapter acts; the first exchange must go to the first one.
    turn["inplace"] = turn["delta"] = "a"
    trained = {"ours": sum(v.numel() for v in values), "LoRA": sum(a.numel() for a in adapters)}
    models = {
        "exchange": served["inplace"],
        "exchange delta": served["delta"],
        "LoRA: exchange": peer_served,
        "LoRA: exchange merged": merged,
    }
    return actions, trained, models


def measure(
    actions: Mapping[str, Action], settings: Settings, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every timed round, by action."""
    shuffler = random.Random(settings.seed)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(settings.warmup + settings.rounds):
        gc.collect()
        for name in shuffler.sample(list(actions), len(actions)):
            started = clock()
            actions[name].work()
            taken = clock() - started
            actions[name].after()
            if number >= settings.warmup:
                seconds[name].append(taken)
    return seconds


def summarize(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """For each row of the table: medians of ours and the peer's, and the median of the ratios of the same rounds."""
    summary: dict[str, dict[str, float | None]] = {}
    for title, (own, peer) in ROWS.items():
        row: dict[str, float | None] = {"seconds": statistics.median(seconds[own]), "peer_seconds": None, "ratio": None}
        if peer is not None:
            row["peer_seconds"] = statistics.median(seconds[peer])
            row["ratio"] = statistics.median(a / b for a, b in zip(seconds[own], seconds[peer], strict=True))
        summary[title] = row
    return summary


def table_of(summary: Mapping[str, Mapping[str, float | None]], trained: Mapping[str, int]) -> Table:
    """The table that people read."""

    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:,.2f} ms"

    rows = [
        [
            title,
            shown(row["seconds"]),
            shown(row["peer_seconds"]),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for title, row in summary.items()
    ]
    title = f"Medians; {trained['ours']:,} values against {trained['LoRA']:,} parameters of LoRA"
    return Table(title, ("action", "ours", "LoRA", "ours / LoRA"), rows)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write what the command line asks for."""
    from dataclasses import replace

    settings = read_settings(options, Settings(), SMALL)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(prefix="sparse_zero_adapters_") as place:
        folder = Path(place)
        if not settings.model and options.small:
            from tests.models.tiny import write_tiny_llama

            settings = replace(settings, model=str(write_tiny_llama(folder / "model")))
        elif not settings.model:
            from models.smollm2 import default_cache, smollm2_folder

            settings = replace(settings, model=str(smollm2_folder(default_cache())))
        actions, trained, _ = make_actions(settings, folder)
        seconds = measure(actions, settings)
    summary = summarize(seconds)
    finish(
        options,
        script=__file__,
        doc=__doc__,
        settings=settings,
        tables=[table_of(summary, trained)],
        numbers={"trained": trained, "rows": summary, "seconds": seconds},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    options = parse_flags(make_parser(__doc__, Settings), arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
