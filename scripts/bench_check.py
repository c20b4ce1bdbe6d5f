#!/usr/bin/env python3
"""Has a step become slower than it was? Compares ratios of times, never times, with those that are committed.

A short form of bench_step.py and bench_layer.py gives the ratios of ours to the floor of the same run. One is beyond
when even the low end of its 95% interval, less the noise of the machine (the floor against itself, in the same run),
is above the high end of the committed interval plus the committed tolerance. A machine too noisy to see a loss
does not fail; it is told.

`--update` shows how this run compares with the present reference, and writes it as the new one, with its noise. A run
whose noise is above the tolerance would make a gate that sees nothing: it is not written, but with `--force`. Ratios
depend on the machine: a reference from another one is compared with all the same, and that is told, too.
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
class Reference:
    """What was committed: a run, its machine, and by how much its ratios may grow."""

    settings: Mapping[str, Any]
    machine: Mapping[str, str]
    tolerances: Mapping[str, float]  # shares, by what the name of a ratio begins with
    measured: Measured


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

    @property
    def mark(self) -> str:
        """For the table."""
        return "SLOWER" if self.is_beyond else "faster" if self.is_faster else "blind" if self.is_blind else "ok"


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
            v.mark,
        ]
        for v in verdicts
    ]
    return Table(title, ("time / floor", "measured [95%]", "reference", "low end's limit", "noise", ""), rows)


def read_reference(path: Path) -> Reference:
    """A committed reference.

    Raises:
        InputError: there is none, or it is of another form of this script.
    """
    if not path.is_file():
        raise InputError(f"there is no reference {path}: write one with --update")
    found = read_json(path)
    try:
        # The first references did not tell their noise.
        ratios, controls = (
            {name: Ratio(**ratio) for name, ratio in each.items()}
            for each in (found["ratios"], found.get("controls", {}))
        )
        return Reference(found["settings"], found["machine"], found["tolerances"], Measured(ratios, controls))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no reference of this script ({error!r}): remove it, and write one with --update"
        ) from error


def write_reference(path: Path, reference: Reference) -> None:
    """What :func:`read_reference` reads."""
    measured = reference.measured
    content = {
        "settings": reference.settings,
        "machine": reference.machine,
        "tolerances": reference.tolerances,
        "controls": {part: asdict(ratio) for part, ratio in measured.controls.items()},
        "ratios": {name: asdict(ratio) for name, ratio in measured.ratios.items()},
    }
    atomic_write_json(path, content)


def compare(measured: Measured, reference: Reference) -> list[Verdict]:
    """The verdicts on this run, which are shown, with how many of them say nothing."""
    if reference.machine != machine():
        print(f"the reference was measured on another machine or torch: {reference.machine}, here {machine()}")
    verdicts = judge(measured, reference.measured.ratios, reference.tolerances)
    table_of(verdicts, "Ratios of this run and of the reference").show()
    beyond = [verdict for verdict in verdicts if verdict.is_beyond]
    if beyond:
        table_of(beyond, f"{len(beyond)} of {len(verdicts)} are slower than noise and tolerance allow").show()
    num_blind = sum(verdict.mark == "blind" for verdict in verdicts)
    print(f"{num_blind} of {len(verdicts)} ratios are blind: a loss of 10% would not have been seen")
    return verdicts


def refuse_noise(measured: Measured, tolerances: Mapping[str, float]) -> None:
    """Raise InputError unless the floors of every part agree within its tolerance."""
    for part, control in measured.controls.items():
        off, tolerance = noise(control), tolerances[part.split()[0]]
        if off > tolerance:
            raise InputError(
                f"the floor of {part} differs from itself by up to {off:.1%}, above the tolerance of {tolerance:.1%}: "
                "the reference is not written; do it on a quiet machine, or all the same with --force"
            )


def update_reference(
    path: Path, old: Reference | None, measured: Measured, settings: Mapping[str, Any], *, force: bool
) -> None:
    """Compare this run with the old reference, if there is one, and write it as the new one; tolerances are kept."""
    tolerances = TOLERANCES if old is None else old.tolerances
    if old is not None:
        if old.settings != settings:
            print(f"{path} was measured with other settings")
        if set(old.measured.ratios) == set(measured.ratios):
            compare(measured, old)
        else:
            print(f"{path} has other ratios: not compared")
    if not force:
        refuse_noise(measured, tolerances)
    write_reference(path, Reference(settings, machine(), tolerances, measured))
    print(f"wrote {path}")


def check(path: Path, step: Settings, layer: bench_layer.Settings, *, update: bool, force: bool = False) -> int:
    """Measure, and judge or write the reference; 1 if something is beyond."""
    settings = {"step": asdict(step), "layer": asdict(layer)}
    reference = None if update and not path.is_file() else read_reference(path)
    if not update and reference is not None and reference.settings != settings:
        raise InputError(f"{path} was measured with other settings than this script has: write it anew with --update")
    torch.set_num_threads(step.threads)
    measured = measure(step, layer)
    for part, control in measured.controls.items():
        if noise(control) > NOISY:
            print(f"NOISY machine in {part}: the floor differs from itself by up to {noise(control):.1%}")
    if update or reference is None:
        update_reference(path, reference, measured, settings, force=force)
        return 0
    return 1 if any(verdict.is_beyond for verdict in compare(measured, reference)) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--update", action="store_true", help="write the reference instead of comparing with it")
    parser.add_argument("--force", action="store_true", help="with --update: write it whatever the noise")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="default: the committed one")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if something is slower, 2 for wrong input, with one line on stderr."""
    options = parse(arguments)
    found: list[int] = []

    def run() -> None:
        if options.force and not options.update:
            raise InputError("--force is without --update, and does nothing then: give both, or neither")
        found.append(check(options.reference, STEP, LAYER, update=options.update, force=options.force))

    return exit_code(run) or found[0]


if __name__ == "__main__":
    sys.exit(main())
