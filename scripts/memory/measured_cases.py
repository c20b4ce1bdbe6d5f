"""On which real runs is the simulation held against what ranks hold, and is it close enough?"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.known_shapes import known_shape
from scripts.memory.covering import covering
from scripts.memory.memory_cases import Case

# Shares of the simulation: of the tensors' peak, and of the growth of the resident size.
TENSOR_BOUND, RESIDENT_BOUND = 0.03, 0.10
# What a rank's process may take, and all of them together.
_MOST_BYTES, _MOST_BYTES_OF_ALL = 6 * 2**30, 10 * 2**30
# Parameters times tokens of a micro-batch: seconds, on a core.
_MOST_WORK = 1.2e11


def _known(name: str) -> Mapping[str, Any]:
    found = known_shape(name)
    assert found is not None
    return found.config


def _llama(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
    }


# With random weights, but for SmolLM2, whose own are taken where they are at hand.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-21m": _llama(8192, 512, 1408, 4, 8, 8, False),
    "llama-61m": _llama(12000, 640, 1760, 10, 10, 5, False),
    "llama-98m": _llama(16000, 768, 2048, 12, 12, 12, True),
    "smollm2-135m": _known("smollm2-135m"),
    "llama-284m": _llama(32000, 1024, 3072, 16, 16, 16, False),
}
_PARAMETERS = {"llama-21m": 21e6, "llama-61m": 61e6, "llama-98m": 98e6, "smollm2-135m": 135e6, "llama-284m": 284e6}

FACTORS: Mapping[str, tuple[Any, ...]] = {
    "model": tuple(CONFIGS),
    "method": ("smt", "rocoft-rows", "mixed", "full", "lora"),
    "stage": (0, 1, 2, 3),
    "world_size": (1, 2, 3, 4),
    "placement": ("inplace", "delta"),
    "checkpointing": (False, True),
    "precision": ("fp32", "bf16"),
    "shape": ((1, 256), (2, 256), (1, 1024)),
    "accumulation": (1, 2),
}


def is_possible(found: Mapping[str, Any]) -> bool:
    """Whether the machine has the memory and the patience."""
    size, (samples, length) = _PARAMETERS[found["model"]], found["shape"]
    if found["method"] in ("full", "lora") and found["placement"] != "inplace":
        return False
    if found["precision"] == "bf16" and found["model"] != "llama-21m":  # Slow on CPUs.
        return False
    if size * samples * length * found["accumulation"] > _MOST_WORK:
        return False
    each = size * (16 if found["method"] == "full" else 6) + size * samples * length / 50
    return each < _MOST_BYTES and each * found["world_size"] < _MOST_BYTES_OF_ALL


def measured_cases() -> list[Case]:
    """Those of the measurement, in a fixed order."""
    cases = []
    for found in covering(FACTORS, is_possible, at_least=32):
        samples, length = found.pop("shape")
        cases.append(Case(**found, micro_batch=samples, length=length))
    return cases


# A few that take a minute together.
QUICK: tuple[Case, ...] = (
    Case(model="llama-21m", method="smt", stage=2, world_size=2, length=256, precision="fp32"),
    Case(model="llama-21m", method="full", stage=3, world_size=2, length=256, precision="fp32", checkpointing=True),
    Case(model="llama-21m", method="lora", stage=1, world_size=1, length=256, precision="fp32"),
)


def write_models(folder: Path, models: Sequence[str]) -> dict[str, str]:
    """Folders with weights, of each model, made where they are not there; SmolLM2's own if at hand."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from models.smollm2 import NAME, default_cache

    found = {}
    for name in models:
        own = default_cache() / NAME
        if name == "smollm2-135m" and (own / "model.safetensors").is_file():
            found[name] = str(own)
            continue
        path = folder / name
        if not (path / "model.safetensors").is_file():
            values = dict(CONFIGS[name])
            torch.manual_seed(0)
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        found[name] = str(path)
    return found


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One real run beside its simulation. Of what differs from rank to rank, the largest."""

    name: str
    failed: str | None = None
    simulated: int = 0
    tensors: int = 0
    growth: int = 0
    # Peaks of the phases of training: measured over simulated, less one.
    phases: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tensor_error(self) -> float:
        """Relative to what is measured."""
        return self.simulated / self.tensors - 1 if self.tensors else 0.0

    @property
    def growth_error(self) -> float:
        """Relative to what is measured."""
        return self.simulated / self.growth - 1 if self.growth else 0.0


PHASES = ("engine", "forward", "backward", "step")


def judge(name: str, row: Mapping[str, Any]) -> Measured:
    """One line of the results."""
    if "failed" in row:
        return Measured(name=name, failed=row["failed"])
    simulated, ranks = row["simulated"]["phases"], row["ranks"]
    peaks = {phase: max(rank["phases"][phase]["peak_bytes"] for rank in ranks) for phase in PHASES}
    return Measured(
        name=name,
        # Of training: how a model is loaded on a CPU is not simulated.
        simulated=max(simulated[phase]["peak_bytes"] for phase in PHASES),
        tensors=max(peaks.values()),
        growth=max(rank["growth_bytes"] for rank in ranks),
        phases={phase: simulated[phase]["peak_bytes"] / peaks[phase] - 1 for phase in PHASES},
        seconds=row["seconds"],
    )


def print_measured(rows: Sequence[Measured]) -> bool:
    """All runs, and the bounds. Returns whether they are met."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(title="Real runs: the rank that holds most, and the simulation's difference to it")
    for heading in ("run", "simulated", "tensors", "differs", "worst phase", "resident", "differs", "s"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=heading != "run")
    runs = [row for row in rows if row.failed is None]
    for row in runs:
        tensors_right, resident_right = is_right(row)
        phase, error = max(row.phases.items(), key=lambda each: abs(each[1]))
        table.add_row(
            row.name,
            f"{row.simulated / 2**20:.0f} MiB",
            f"{row.tensors / 2**20:.0f} MiB",
            f"{row.tensor_error:+.2%}",
            f"{phase} {error:+.1%}",
            f"{row.growth / 2**20:.0f} MiB",
            f"{row.growth_error:+.1%}",
            f"{row.seconds:.0f}",
            style=None if tensors_right and resident_right else "yellow" if tensors_right else "red",
        )
    console.print(table)
    failed = [row for row in rows if row.failed is not None]
    for row in failed:
        told = str(row.failed).strip().splitlines()
        console.print(f"[red]failed[/red] {row.name}: {told[-1] if told else ''}")
    if not runs:
        return False
    tensors = sum(is_right(row)[0] for row in runs)
    resident = sum(is_right(row)[1] for row in runs)
    passed = tensors == resident == len(rows)
    console.print(
        f"{len(runs)} of {len(rows)} runs: tensors within {TENSOR_BOUND:.0%} in {tensors} (median "
        f"{statistics.median(abs(row.tensor_error) for row in runs):.2%}), growth of the resident size within "
        f"{RESIDENT_BOUND:.0%} in {resident} (median {statistics.median(abs(row.growth_error) for row in runs):.1%}): "
        f"{'passed' if passed else 'not passed'}"
    )
    return passed


def is_right(row: Measured) -> tuple[bool, bool]:
    """Whether tensors and resident size are within their bounds."""
    return abs(row.tensor_error) <= TENSOR_BOUND, abs(row.growth_error) <= RESIDENT_BOUND
