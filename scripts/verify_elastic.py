#!/usr/bin/env python3
"""Does a checkpoint continue alike, whatever the number of ranks, ZeRO stage and placement it came from and goes to?

Every configuration trains a tiny Llama by a real DeepSpeed engine on real ranks (gloo, fp32), saves after some steps
and trains on: that is the uninterrupted run. Then each of the checkpoints is loaded into a new engine of every
configuration, which takes the steps after it. All losses are compared with those of one process that trains the dense
model by plain AdamW and was never interrupted. Where ranks, stage, placement and offloading are equal, losses and
trained values must be those of the uninterrupted run, bit for bit. For how many of the others this holds is told:
stages and numbers of ranks add up gradients in another order, before the checkpoint, too. Within a placement, masters
and moments of the new engine after loading must be those of the checkpoint, bit for bit.

Weight decay is 0: with it, a checkpoint is refused in the other placement, where it means something else.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sparse_zero as sz
from scripts import verify_zero
from scripts.benchmarking import among_ranks, chosen_names, exit_code, machine, start_ranks
from scripts.verify_zero import GLOBAL_BATCH, LEARNING_RATE, Combination, difference
from sparse_zero.files import atomic_write_json
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.state import read_training_state

# Steps before the checkpoint and after it.
BEFORE, AFTER = 3, 2
# Largest relative difference of a loss.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True, order=True)
class Configuration:
    """What a checkpoint comes from, and what it goes to."""

    ranks: int
    placement: Placement
    stage: Literal[0, 1, 2, 3]
    offload: bool = False  # masters and moments on the host; at stage 3 the base's shards, too

    @property
    def name(self) -> str:
        """Of its checkpoint."""
        return f"{self.ranks}-{self.placement}-{self.stage}" + ("-offload" if self.offload else "")

    def combination(self) -> Combination:
        """What :mod:`scripts.verify_zero` calls it."""
        return Combination(
            stage=self.stage,
            placement=self.placement,
            dtype="float32",
            offload=self.offload,
            accumulation=1,
            checkpointing=False,
            decay=0.0,
        )


def configurations(ranks: Sequence[int], stages: Sequence[int], offload: bool) -> Iterator[Configuration]:
    """All of them; with offloading also those that have something to offload."""
    for size, placement, stage in itertools.product(ranks, PLACEMENTS, stages):
        for offloads in (False, True) if offload and stage else (False,):
            yield Configuration(ranks=size, placement=placement, stage=stage, offload=offloads)  # type: ignore[arg-type]


def _engine(configuration: Configuration, folder: Path | None) -> tuple[Any, bool]:
    """A new engine, with the checkpoint in a folder loaded, and whether it has that state bit for bit. Collective."""
    combination = configuration.combination()
    model = verify_zero.make_model(combination.dtype)
    checkpoint = None if folder is None else sz.read_checkpoint(folder)
    selection = verify_zero.make_selection(model) if checkpoint is None else checkpoint.selection
    sz.sparsify(model, selection, configuration.placement)
    engine, *_ = sz.initialize(
        model=model,
        config=verify_zero.engine_config(combination, GLOBAL_BATCH // configuration.ranks),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0),
    )
    if checkpoint is None:
        return engine, False
    sz.load_checkpoint(engine, checkpoint)
    stored, loaded = checkpoint.read_state(), read_training_state(engine)
    groups = [(stored.masters, loaded.masters)]
    groups += [(stored.moments[name], loaded.moments[name]) for name in stored.moments]
    is_exact = stored.step == loaded.step and stored.moments.keys() == loaded.moments.keys()
    return engine, is_exact and all(
        wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
        for wanted, found in groups
    )


def _train(engine: Any, batches: torch.Tensor) -> list[float]:
    """Losses of the steps, over all ranks. Collective."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for tokens in batches:
        loss = verify_zero.loss_of(engine, tokens.chunk(world_size)[rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(float(total) / world_size)
    return losses


def _end(engine: Any) -> str:
    """A hash of the fp32 masters, after which the engine is taken apart. Collective."""
    from sparse_zero.zero.compat import detach_engine
    from sparse_zero.zero.state import read_masters

    digest = hashlib.sha256()
    for name, master in sorted(read_masters(engine).items()):
        digest.update(name.encode() + master.numpy().tobytes())
    detach_engine(engine)
    gc.freeze()  # Each engine that is taken apart collects; what is left by now are modules, most of its time.
    return digest.hexdigest()


def save_all(folder: str, stages: Sequence[int], offload: bool) -> list[dict[str, Any]]:
    """Train, save and train on, in every configuration of this number of ranks. Collective.

    Returns:
        For each its fields, all losses, and the hash of the trained values at the end.
    """
    import torch.distributed as dist

    batches, results = verify_zero.make_batches(BEFORE + AFTER), []
    for configuration in configurations([dist.get_world_size()], stages, offload):
        engine, _ = _engine(configuration, None)
        losses = _train(engine, batches[:BEFORE])
        sz.save_checkpoint(engine, Path(folder) / configuration.name, extra={"step": BEFORE})
        losses += _train(engine, batches[BEFORE:])
        results.append({**asdict(configuration), "losses": losses, "values": _end(engine)})
    return results


def load_all(folder: str, stored: Sequence[str], stages: Sequence[int], offload: bool) -> list[dict[str, Any]]:
    """Continue every checkpoint of ``stored`` in every configuration of this number of ranks. Collective.

    Returns:
        For each pair both configurations' names, whether the state was that of the checkpoint, the losses after it,
        and the hash of the values.
    """
    import torch.distributed as dist

    batches, results = verify_zero.make_batches(BEFORE + AFTER)[BEFORE:], []
    for configuration in configurations([dist.get_world_size()], stages, offload):
        for name in stored:
            engine, is_exact = _engine(configuration, Path(folder) / name)
            pair = {"from": name, "into": configuration.name, "exact": is_exact, "losses": _train(engine, batches)}
            results.append({**pair, "values": _end(engine)})
    return results


def save_and_load(folder: str, stages: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """:func:`save_all` and :func:`load_all` on the same ranks. Collective."""
    saved = save_all(folder, stages, False)
    return saved, load_all(folder, sorted(path.name for path in Path(folder).iterdir()), stages, False)


@functools.cache
def expected(placement: Placement) -> list[float]:
    """Losses of plain AdamW on the dense model in one process."""
    plain = Configuration(ranks=1, placement=placement, stage=0)
    return verify_zero.reference(plain.combination(), BEFORE + AFTER)


def judge(saved: Sequence[dict[str, Any]], loaded: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every pair: how far its losses are from the dense run's, whether it is the uninterrupted run, and passes.

    The difference is the larger one of the steps before the checkpoint, in its own configuration, and after it.
    """
    runs = {}
    for run in saved:
        fields = {key: run[key] for key in ("ranks", "placement", "stage", "offload")}
        runs[Configuration(**fields).name] = (Configuration(**fields), run)
    pairs = []
    for pair in loaded:
        (source, before), (target, uninterrupted) = runs[pair["from"]], runs[pair["into"]]
        found = [*before["losses"][:BEFORE], *pair["losses"]]
        wanted = expected(source.placement)[:BEFORE] + expected(target.placement)[BEFORE:]
        distance = difference(found, wanted)
        bitwise = pair["losses"] == uninterrupted["losses"][BEFORE:] and pair["values"] == uninterrupted["values"]
        exact = pair["exact"]
        passed = distance <= TOLERANCE and (bitwise or source != target)
        passed = passed and (exact or source.placement != target.placement)
        pairs.append(
            {
                "from": asdict(source),
                "into": asdict(target),
                "difference": distance,
                "exact": exact,
                "bitwise": bitwise,
                "passed": passed,
            }
        )
    return pairs


def _kind(pair: dict[str, Any]) -> str:
    """What differs between the two configurations of a pair."""
    names = ("ranks", "placement", "stage", "offload")
    different = [name for name in names if pair["from"][name] != pair["into"][name]]
    return ", ".join(different) or "nothing"


def print_tables(pairs: Sequence[dict[str, Any]]) -> None:
    """Largest difference by ranks and placement on both sides, and how many pairs are bitwise by what differs."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    sides = sorted({(pair["from"]["ranks"], pair["from"]["placement"]) for pair in pairs})
    table = Table(title="Largest relative loss difference to dense AdamW in one process; all stages on both sides")
    table.add_column("from \\ into")
    for ranks, placement in sides:
        table.add_column(f"{ranks} {placement}", justify="right")
    for row in sides:
        cells = []
        for column in sides:
            members = [
                pair["difference"]
                for pair in pairs
                if (pair["from"]["ranks"], pair["from"]["placement"]) == row
                and (pair["into"]["ranks"], pair["into"]["placement"]) == column
            ]
            cells.append(f"{max(members):.1e}" if members else "")
        table.add_row(f"{row[0]} {row[1]}", *cells)
    console.print(table)
    table = Table(title="Pairs by what differs between the two configurations")
    for heading in ("differs", "pairs", "passed", "largest difference", "same state", "same run"):
        table.add_column(heading, justify="left" if heading == "differs" else "right")
    for kind, group in itertools.groupby(sorted(pairs, key=_kind), key=_kind):
        members = list(group)
        table.add_row(
            kind,
            str(len(members)),
            str(sum(member["passed"] for member in members)),
            f"{max(member['difference'] for member in members):.1e}",
            str(sum(member["exact"] for member in members)),
            str(sum(member["bitwise"] for member in members)),
        )
    console.print(table)
    for pair in pairs:
        if not pair["passed"]:
            console.print(f"[red]FAILED[/red] {pair}")
    console.print(f"{sum(pair['passed'] for pair in pairs)} of {len(pairs)} pairs passed")


def on_ranks(ranks: int, job: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What rank 0 of a new world returns from :func:`save_all` or :func:`load_all`.

    Raises:
        RuntimeError: a rank failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="verify_elastic_") as folder:
        out = Path(folder) / "results.json"
        job = {**job, "stages": options.stages, "offload": options.offload}
        what = f"{ranks} ranks"
        arguments = ["--worker", json.dumps({"job": job, "out": str(out)})]
        start_ranks(__file__, arguments, world_size=ranks, threads=1, device="cpu", what=what)
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
        return found


def work(told: dict[str, Any]) -> None:
    """What each rank does."""
    job, out = told["job"], Path(told["out"])
    with among_ranks(1, "cpu") as rank:
        found = load_all(**job) if "stored" in job else save_all(**job)
        if rank == 0:
            out.write_text(json.dumps(found), encoding="utf-8")


def verify(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run, judge and show everything."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="verify_elastic_") as folder:
        saved, loaded = [], []
        for ranks in options.world_sizes:
            print(f"saving on {ranks} ranks ...", file=sys.stderr, flush=True)
            saved += on_ranks(ranks, {"folder": folder}, options)
        stored = sorted(path.name for path in Path(folder).iterdir())
        for ranks in options.world_sizes:
            print(f"loading on {ranks} ranks ...", file=sys.stderr, flush=True)
            loaded += on_ranks(ranks, {"folder": folder, "stored": stored}, options)
    pairs = judge(saved, loaded)
    print_tables(pairs)
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} seconds", file=sys.stderr)
    if options.json is not None:
        atomic_write_json(options.json, {"machine": machine(), "seconds": seconds, "pairs": pairs})
    return pairs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", default="1,2,3,4", help="numbers of ranks (default: 1,2,3,4)")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages (default: 0,1,2,3)")
    parser.add_argument("--offload", action="store_true", help="cross offloading with everything else")
    parser.add_argument("--json", type=Path, default=None, help="also write all pairs to this file")
    parser.add_argument("--worker", type=json.loads, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = [str(size) for size in range(1, GLOBAL_BATCH + 1) if GLOBAL_BATCH % size == 0]
    options.world_sizes = [int(size) for size in chosen_names(options.world_sizes, known, "--world-sizes")]
    options.stages = [int(stage) for stage in chosen_names(options.stages, tuple("0123"), "--stages")]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a pair failed, 2 for wrong input."""
    passed = True

    def everything() -> None:
        nonlocal passed
        options = parse(arguments)
        if options.worker is not None:
            work(options.worker)
        else:
            passed = all(pair["passed"] for pair in verify(options))

    return exit_code(everything) or (0 if passed else 1)


if __name__ == "__main__":
    sys.exit(main())
