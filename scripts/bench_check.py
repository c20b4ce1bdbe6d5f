#!/usr/bin/env python3
"""Has a step become slower than it was? Compares ratios of times, never times, with those that are committed.

A short form of bench_step.py and bench_layer.py gives the ratios of ours to the floor of the same run. One is beyond
when even the low end of its 95% interval, less the noise of the machine (the floor against itself, in the same run),
is above the high end of the committed interval plus the committed tolerance. A machine too noisy to see a loss
does not fail; it is told.

`--update` writes the ratios of this run as the new reference. Ratios depend on the machine: a reference from another
one is compared with all the same, and that is told, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts import bench_layer, bench_step
from scripts.benchmarking import exit_code, machine
from scripts.benchmarks.methods import DELTA, OURS, Settings
from scripts.benchmarks.ratios import NOISY, Ratio, noise, paired
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json

REFERENCE = Path(__file__).parent / "benchmarks" / "reference.json"
# One thread: what else runs on the machine, in CI or beside it, disturbs it less.
STEP = Settings(
    hidden=512,
    layers=4,
    heads=8,
    intermediate=1408,
    vocab=2048,
    small_blocks=16,
    steps=20,
    threads=1,
)
LAYER = bench_layer.Settings(sizes="256x256,1024x1024", rounds=40, threads=1)
# By how much a ratio may grow before it is looked at; committed with the reference, where it can be changed.
# A step: half of what the targets leave. A layer alone has no other work that hides its own.
TOLERANCES = {"step": 0.02, "layer": 0.05}


@dataclass(frozen=True)
class Measured:
    """The ratios of one run, by name ("step/blocks"), and the floors' of each part of it ("step", "layer 256x256")."""

    ratios: Mapping[str, Ratio]
    controls: Mapping[str, Ratio]


@dataclass(frozen=True)
class Verdict:
    """How one ratio compares with its reference."""

    name: str
    measured: Ratio
    reference: Ratio
    noise: float
    limit: float  # of the measured ratio's low end, with the noise in it

    @property
    def is_beyond(self) -> bool:
        """Whether it is slower than noise and tolerance can explain."""
        return self.measured.low > self.limit

    @property
    def is_faster(self) -> bool:
        """Whether the reference has become easy: faster by more than noise and both intervals."""
        return self.measured.high * (1 + self.noise) < self.reference.low

    @property
    def is_blind(self) -> bool:
        """Whether a loss of 10% would not have been seen."""
        return self.limit + (self.measured.median - self.measured.low) > 1.1 * self.reference.median


def judge(
    measured: Measured, reference: Mapping[str, Ratio], tolerances: Mapping[str, float] = TOLERANCES
) -> list[Verdict]:
    """A verdict on every ratio.

    Args:
        measured: of this run.
        reference: committed ratios, by the same names.
        tolerances: shares, by what a name begins with.

    Raises:
        InputError: the names are not the same.
    """
    if different := sorted(set(measured.ratios) ^ set(reference)):
        raise InputError(
            f"the reference and this run do not have the same ratios ({different[0]}): write it anew with --update"
        )
    verdicts = []
    for name, ratio in measured.ratios.items():
        part = name.rpartition("/")[0]
        off = noise(measured.controls[part])
        limit = reference[name].high * (1 + tolerances[part.split()[0]]) * (1 + off)
        verdicts.append(Verdict(name, ratio, reference[name], off, limit))
    return verdicts


def measure(step: Settings, layer: bench_layer.Settings) -> Measured:
    """Ours, under both placements, over the floor."""
    ours = OURS + DELTA
    seconds, _ = bench_step.measure_time(("floor", "floor2", *ours), step)
    parts = {"step": seconds}
    for in_features, out_features in layer.shapes():
        found = bench_layer.measure(("floor", "floor2", *ours), in_features, out_features, layer)
        parts[f"layer {in_features}x{out_features}"] = found["seconds"]
    return Measured(
        ratios={f"{part}/{m}": paired(times[m], times["floor"]) for part, times in parts.items() for m in ours},
        controls={part: paired(times["floor2"], times["floor"]) for part, times in parts.items()},
    )


def table_of(verdicts: Sequence[Verdict], title: str) -> Table:
    """Measured, committed and allowed ratios."""
    rows = [
        [
            v.name,
            f"{v.measured.median:.3f} [{v.measured.low:.3f}, {v.measured.high:.3f}]",
            f"{v.reference.median:.3f}",
            f"{v.limit:.3f}",
            f"{v.noise:.1%}",
            "SLOWER" if v.is_beyond else "faster" if v.is_faster else "blind" if v.is_blind else "ok",
        ]
        for v in verdicts
    ]
    return Table(title, ("time / floor", "measured [95%]", "reference", "low end's limit", "noise", ""), rows)


def read_reference(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Ratio], dict[str, float], Any]:
    """Ratios, tolerances and machine of a committed reference.

    Raises:
        InputError: there is none, or it was measured with other settings.
    """
    if not path.is_file():
        raise InputError(f"there is no reference {path}: write one with --update")
    found = read_json(path)
    if found["settings"] != settings:
        raise InputError(f"{path} was measured with other settings than this script has: write it anew with --update")
    return {name: Ratio(**ratio) for name, ratio in found["ratios"].items()}, found["tolerances"], found["machine"]


def check(path: Path, step: Settings, layer: bench_layer.Settings, *, update: bool) -> int:
    """Measure, and judge or write the reference; 1 if something is beyond."""
    settings = {"step": asdict(step), "layer": asdict(layer)}
    torch.set_num_threads(step.threads)
    if not update:
        reference, tolerances, origin = read_reference(path, settings)
    measured = measure(step, layer)
    for part, control in measured.controls.items():
        if noise(control) > NOISY:
            print(f"NOISY machine in {part}: the floor differs from itself by up to {noise(control):.1%}")
    if update:
        tolerances = read_json(path)["tolerances"] if path.is_file() else dict(TOLERANCES)
        ratios = {name: asdict(ratio) for name, ratio in measured.ratios.items()}
        content = {"settings": settings, "machine": machine(), "tolerances": tolerances, "ratios": ratios}
        atomic_write_json(path, content)
        print(f"wrote {path}")
        return 0
    if origin != machine():
        print(f"the reference was measured on another machine or torch: {origin}, here {machine()}")
    verdicts = judge(measured, reference, tolerances)
    table_of(verdicts, "Ratios of this run and of the reference").show()
    beyond = [verdict for verdict in verdicts if verdict.is_beyond]
    if beyond:
        table_of(beyond, f"{len(beyond)} of {len(verdicts)} are slower than noise and tolerance allow").show()
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--update", action="store_true", help="write the reference instead of comparing with it")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="default: the committed one")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if something is slower, 2 for wrong input, with one line on stderr."""
    options = parse(arguments)
    found: list[int] = []
    failed = exit_code(lambda: found.append(check(options.reference, STEP, LAYER, update=options.update)))
    return failed or found[0]


if __name__ == "__main__":
    sys.exit(main())
