#!/usr/bin/env python3
"""What do the benchmarks of a step, its memory, one linear and the budgets say together?

Runs them one after the other, about ten minutes on two cores. Each writes its numbers and its plot into `--out`;
`summary.md` there has the tables, the plots, and which of the targets hold. By hand: linears larger than 1024 x 1024
(bench_layer.py), steps of ours under delta (bench_step.py --delta), and the other benchmarks, of which
docs/speed/benchmarks.md has a list.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_budget, bench_layer, bench_step
from scripts.benchmarking import exit_code
from scripts.benchmarks.methods import PEFT, PUBLISHED
from scripts.benchmarks.ratios import MIN_ROUNDS, Ratio, noise, paired
from scripts.benchmarks.results import read_benchmark
from scripts.benchmarks.tables import Table
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_text, read_json

SCRIPTS = Path(__file__).parent
# The flags of each part; those of --small come before them.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    # All methods but those under delta: a target names each of them. A round takes about 18 s on two cores.
    "step": ("bench_step.py", ("--no-memory", "--warmup", "1", "--max-seconds", "240")),
    "memory": ("bench_step.py", ("--methods", "floor,full,lora,blocks,rows,columns", "--steps", "2", "--warmup", "1")),
    "top_half": (
        "bench_step.py",
        (
            *("--no-memory", "--methods", "floor,floor2,lora,blocks,rows,columns", "--depth-from", "0.5"),
            *("--warmup", "1", "--max-seconds", "90"),
        ),
    ),
    "layer": ("bench_layer.py", ("--delta", "--sizes", "64x64,256x256,1024x1024", "--max-seconds", "20")),
    "budget": ("bench_budget.py", ("--max-seconds", "90")),
}
SMALL_PARTS: dict[str, tuple[str, ...]] = {
    "step": ("--no-memory",),
    "memory": ("--methods", "floor,full,lora,rows"),
    "top_half": ("--no-memory", "--methods", "floor,floor2,lora,blocks,rows,columns", "--depth-from", "0.5"),
    "layer": ("--sizes", "64x64"),
    "budget": ("--budgets", "0.05"),
}
MODULES = {"bench_step.py": bench_step, "bench_layer.py": bench_layer, "bench_budget.py": bench_budget}
PLOTTED = ("step", "top_half", "budget")


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of two methods in one part."""

    part: str
    own: str
    over: str
    at_most: float | None = None
    at_least: float | None = None

    def row(self, seconds: Mapping[str, Sequence[float]]) -> list[str]:
        """For the table of targets: what is asked, what was found, whether it holds."""
        found = paired(seconds[self.own], seconds[self.over])
        off = noise(paired(seconds["floor2"], seconds["floor"]))
        return [
            f"{self.part}: {self.own} / {self.over}",
            f"<= {self.at_most:.2f}" if self.at_most is not None else f">= {self.at_least:.2f}",
            f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]",
            self.verdict(found, off),
        ]

    def verdict(self, found: Ratio, off: float) -> str:
        """Whether it holds, as far as the interval of ``found`` and noise of the share ``off`` let see."""
        if found.num_rounds < MIN_ROUNDS:
            return "too few rounds"
        if self.at_most is not None:
            holds, fails = found.high <= self.at_most, found.low > self.at_most * (1 + off)
        else:
            assert self.at_least is not None
            holds, fails = found.low >= self.at_least, found.high * (1 + off) < self.at_least
        return "yes" if holds else "NO" if fails else "not told apart"


def targets() -> list[Target]:
    """What the project sets out to show."""
    limits = {"blocks": 1.02, "rows": 1.02, "columns": 1.02, "mixed": 1.03, "small_blocks": 1.03}
    found = [Target("step", own, "floor", at_most=limit) for own, limit in limits.items()]
    same = ("blocks", "rows", "columns")
    found += [Target("step", "full", own, at_least=1.5) for own in same]
    found += [Target("step", peer, own, at_least=1.1) for peer in ("shira", "dora") for own in same]
    # Nobody is faster than ours; a published way is compared with that of ours which trains the same shape.
    alike = {
        **dict.fromkeys((*PEFT, "masked"), same),
        "copies": ("blocks",),
        "concat": ("rows",),
        "diagonal": ("blocks",),
    }
    assert set(alike) == {*PEFT, *PUBLISHED}
    found += [Target("step", own, peer, at_most=1.0) for peer, owns in alike.items() for own in owns]
    return found + [Target("top_half", "lora", own, at_least=1.25) for own in same]


def summarize(results: Mapping[str, Mapping[str, Any]], taken_seconds: Mapping[str, float]) -> str:
    """The Markdown summary."""
    sections = ["# Benchmarks", ""]
    known = [target for target in targets() if target.part in results]
    rows = [target.row(results[target.part]["step_seconds"]) for target in known]
    sections.append(Table("Targets", ("ratio of paired times", "asked", "found [95%]", "holds"), rows).markdown())
    for part, result in results.items():
        script = PARTS[part][0]
        found = read_benchmark(result)
        machine = ", ".join(f"{name} {value}" for name, value in found.machine.items())
        sections += [f"# {part}", "", f"`{script}`, {taken_seconds[part]:.0f} s on {machine}.", ""]
        if part in PLOTTED:
            sections += [f"![{part}]({part}.png)", ""]
        sections += [table.markdown() for table in found.tables]
        sections += [*(f"- {line}" for line in found.remarks), ""]
    return "\n".join(sections)


def run(options: argparse.Namespace) -> None:
    """Run the parts and write the summary."""
    chosen = options.parts.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise InputError(f"--parts has {unknown[0]!r}: choose from {', '.join(PARTS)}")
    results, taken = {}, {}
    for part in chosen:
        script, flags = PARTS[part]
        out = options.out / f"{part}.json"
        command = [sys.executable, str(SCRIPTS / script), "--json", str(out)]
        command += ["--small", *SMALL_PARTS[part]] if options.small else flags
        if part in PLOTTED:
            command += ["--plot", str(out.with_suffix(".png"))]
        print(f"{part}: {script} {' '.join(command[4:])}", flush=True)
        start = time.perf_counter()
        if subprocess.run(command, check=False).returncode != 0:
            raise InputError(f"{part} failed, see above: the summary is not written")
        taken[part] = time.perf_counter() - start
        results[part] = read_json(out)
    atomic_write_text(options.out / "summary.md", summarize(results, taken))
    print(f"summary: {options.out / 'summary.md'}, {sum(taken.values()):.0f} s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of what is written")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run, joined by commas")
    parser.add_argument("--small", action="store_true", help="tiny models: does it run? (the numbers mean nothing)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input, with one line on stderr."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
