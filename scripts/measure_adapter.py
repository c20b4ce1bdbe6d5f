#!/usr/bin/env python3
"""How long does an adapter take to be saved, loaded and exchanged, with this library and with PEFT?

Blocks at random places in attention and MLP of --model, --fraction of all parameters, fp32, on the CPU. Each time is
the smallest of --repeats; the base is loaded anew for each load, and not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sparse_zero as sz
from scripts.benchmarking import exit_code, machine
from sparse_zero.files import atomic_write_json
from sparse_zero.integrations.peft import register_peft


def seconds(action: Callable[[], object]) -> float:
    """What ``action`` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(folder: str, fraction: float, block_size: int, repeats: int) -> dict[str, Any]:
    """Sizes in bytes, times in seconds."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    register_peft()

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    model = base()
    parameters = model.num_parameters()
    modules = ("*.self_attn.*", "*.mlp.*")
    region = sz.RegionConfig(kind="block", block_size=block_size, modules=modules)
    budget = sz.BudgetConfig(fraction=fraction)
    selection = sz.select(model, None, sz.SelectionConfig(regions=(region,), score="random", budget=budget))
    sz.sparsify(model, selection)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place) / "adapter"
        for _ in range(repeats):
            times.setdefault("save", []).append(seconds(partial(sz.save_adapter, model, adapter)))
            loaded = base()
            times.setdefault("load", []).append(seconds(partial(sz.load_adapter, loaded, adapter)))
            off = seconds(partial(sz.set_adapter, loaded, None))
            on = seconds(partial(sz.set_adapter, loaded, "default"))
            times.setdefault("exchange", []).append(off + on)
            times.setdefault("load with PEFT", []).append(seconds(partial(PeftModel.from_pretrained, base(), adapter)))
        size = sum(path.stat().st_size for path in adapter.iterdir())
    return {
        "parameters": parameters,
        "values": selection.num_parameters,
        "bytes": size,
        "seconds": {name: min(found) for name, found in times.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--fraction", type=float, default=0.01, help="of all parameters")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    args = parser.parse_args(argv)

    def run() -> None:
        found = measure(args.model, args.fraction, args.block_size, args.repeats)
        found |= {**machine(), "load": os.getloadavg()[0]}
        print(f"torch {found['torch']}, {os.cpu_count()} cores, load {found['load']:.1f}")
        print(f"{found['values']:,} values of {found['parameters']:,} parameters, {found['bytes']:,} bytes")
        for name, taken in found["seconds"].items():
            print(f"{name}: {taken:.3f} s")
        if args.json:
            atomic_write_json(args.json, found)

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
