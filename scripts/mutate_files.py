#!/usr/bin/env python3
"""Does any damaged or hostile file of ours load silently wrong, end in a traceback, or have anything written elsewhere?

A tiny Llama is trained for some steps: two checkpoints of one selection (with retired entries), one of another, an
adapter of each, and a run folder. Copies are mutated, one way at a time (scripts/mutations.py), and read as a user
does: read_checkpoint and load_checkpoint into an engine, load_adapter into a model, and what a resumed run reads of its
folder. What is then in the engine or the model is compared, bit for bit, with what the whole file gives.

    refused      an InputError, and the model or the engine is as it was
    passed over  a run continues from an older checkpoint, and a warning names the damaged one
    equal        loaded, with all numbers and fields as they were
    other        loaded with other numbers: the mutation left (or made) a valid file of other content, manifest
                 included; nothing can tell it from what somebody else has trained
    WRONG        loaded with other numbers where the mutation cannot be a valid file; or refused, and something changed
    TRACEBACK    another exception than an InputError, or no answer within 30 seconds
    OUTSIDE      something was written, moved or deleted outside of the mutated folder, or pickled code was asked for

The last three must not occur: the exit code is 1 if they do.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import sparse_zero as sz
from launcher.config import RunConfig, parse_config, resolved_yaml
from launcher.metrics import MetricsLog, read_metrics
from launcher.resuming import CheckpointWarning, choose_start, clear_interrupted
from launcher.run_folder import RunFolder, check_same_run
from launcher.summary import load_summary, summary_rows
from scripts import mutations
from scripts.benchmarking import random_llama
from scripts.mutations import Context, Done, Mutation
from sparse_zero.collectives import lone_process_group
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, atomic_write_text
from sparse_zero.layers.retired import Retired, RetiredEntries
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.state import read_training_state

BAD = ("WRONG", "TRACEBACK", "OUTSIDE")
OUTCOMES = ("refused", "passed over", "equal", "other", *BAD)
SECONDS = 30
SIZES = SimpleNamespace(
    hidden=16, layers=2, heads=2, intermediate=24, vocab=40, length=16, device="cpu", dtype="float32", seed=0
)
DEEPSPEED = {
    "train_batch_size": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


# --- what is mutated ------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """SHA-256 of JSON values and tensors, by structure."""
    sha = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, Tensor):
            sha.update(f"{each.dtype} {tuple(each.shape)}".encode())
            sha.update(each.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(each, dict):
            for key in sorted(each):
                sha.update(repr(key).encode())
                add(each[key])
        else:
            sha.update(repr(each).encode())

    add(value)
    return sha.hexdigest()


def a_selection(model: Any, number: int) -> Selection:
    """Blocks, rows, columns and a whole vector; another one for another number."""
    config = sz.SelectionConfig(
        regions=(
            sz.RegionConfig(kind="block", modules=("*.self_attn.{q,k}_proj",), block_size=4, per_matrix=3),
            sz.RegionConfig(kind="row", modules=("*.v_proj", "*.embed_tokens"), per_matrix=2),
            sz.RegionConfig(kind="column", modules=("*.down_proj",), per_matrix=2 + number),
            sz.RegionConfig(kind="whole", modules=("*.input_layernorm.weight",)),
        ),
        score="random",
        seed=number,
    )
    return sz.select(model, None, config)


class Engine:
    """One engine, the checkpoint it was built for, and what it is like after that is loaded."""

    def __init__(self, selection: Selection, retired: Retired | None) -> None:
        model = random_llama(SIZES)
        sz.sparsify(model, selection, "inplace", retired=retired)
        self.engine, *_ = sz.initialize(model=model, config=DEEPSPEED)

    def train(self, steps: int) -> None:
        """Some optimizer steps on random tokens."""
        for _ in range(steps):
            tokens = torch.randint(0, SIZES.vocab, (2, SIZES.length))
            self.engine.backward(self.engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            self.engine.step()

    def facts(self) -> str:
        """Of everything that training depends on."""
        state = read_training_state(self.engine)
        weights = dict(self.engine.module.state_dict())
        return digest([state.masters, state.moments, state.step, state.schedule, weights, torch.get_rng_state()])


def header_facts(found: Any) -> str:
    """Of what a checkpoint tells besides the engine's state."""
    fields = (found.selection.digest(), found.placement, found.optimizers, found.extra, found.config, found.base)
    retired = {name: [each.positions, each.numbers] for name, each in found.retired.entries.items()}
    return digest([*map(repr, fields), retired])


@dataclass(kw_only=True)
class Target:
    """One kind of folder, whole copies of it, and how a user reads one."""

    name: str
    whole: Path
    others: tuple[Path, ...]
    mutations: dict[str, Mutation]
    # Reads a folder; what was found, to be compared.
    read: Callable[[Path], str]
    # What must not change when reading is refused.
    state: Callable[[], str]
    # Puts the state of the whole folder back.
    reset: Callable[[], None]
    # What the whole folder gives, and the state before that.
    wanted: str = ""
    before: str = ""


def checkpoint_target(folder: Path, engine: Engine) -> Target:
    """A checkpoint, loaded into an engine that has its state already."""
    whole = folder / "checkpoints" / "step-000004"

    def read(path: Path) -> str:
        sz.read_checkpoint(path)
        return header_facts(sz.load_checkpoint(engine.engine, path)) + engine.facts()

    def reset() -> None:
        sz.load_checkpoint(engine.engine, whole)

    return Target(
        name="checkpoint",
        whole=whole,
        others=(whole.with_name("step-000002"), folder.parent / "foreign", folder / "adapter"),
        mutations={**mutations.OF_ANY, **mutations.OF_FOLDERS, **mutations.OF_CHECKPOINTS},
        read=read,
        state=engine.facts,
        reset=reset,
    )


def adapter_target(folder: Path) -> Target:
    """An adapter, loaded into a plain model."""
    base = random_llama(SIZES)
    used: dict[str, Any] = {}

    def read(path: Path) -> str:
        selection = sz.load_adapter(used["model"], path)
        return digest([selection.digest(), sz.num_retired(used["model"]), dict(used["model"].state_dict())])

    def reset() -> None:
        used["model"] = copy.deepcopy(base)

    reset()
    return Target(
        name="adapter",
        whole=folder / "adapter",
        others=(
            folder.parent / "other-adapter",
            folder.parent / "foreign-adapter",
            folder / "checkpoints" / "step-000004",
        ),
        mutations={**mutations.OF_ANY, **mutations.OF_FOLDERS},
        read=read,
        state=lambda: digest(dict(used["model"].state_dict())),
        reset=reset,
    )


def run_target(folder: Path, config: Callable[[Path], RunConfig], engine: Engine) -> Target:
    """A run folder, as a start that continues the run reads it."""
    checkpoint = folder / "checkpoints" / "step-000004"

    def read(path: Path) -> str:
        run = RunFolder(path)
        check_same_run(run, config(path))
        clear_interrupted(run)
        start = choose_start(run, config(path))
        found = ["none"]
        if start is not None:
            sz.load_checkpoint(engine.engine, start)
            with MetricsLog(path, resumed_step=start.extra["step"]) as log:
                log.event(start.extra["step"], "continued")
            found = [header_facts(start), engine.facts()]
        rows = read_metrics(path / "metrics.jsonl")
        selection, scores = Selection.load(run.selection), sz.RegionScores.load(run.scores)
        found += [digest({f"{key}": each for key, each in scores.scores.items()}), selection.digest()]
        found += [repr(scores.candidates), repr(scores.metadata), repr(selection.metadata)]
        return digest([*found, summary_rows(load_summary(path)), [{**row} for row in rows]])

    def reset() -> None:
        sz.load_checkpoint(engine.engine, checkpoint)

    return Target(
        name="run folder",
        whole=folder,
        others=(folder.parent / "other-run",),
        mutations={**mutations.OF_ANY, **mutations.OF_RUNS},
        read=read,
        state=lambda: "",  # Folders of a run may be read in part before something is refused.
        reset=reset,
    )


def run_config(folder: Path) -> RunConfig:
    """The config of the made-up run."""
    return parse_config(
        {
            "model": {"name_or_path": "base"},
            "data": {"train": "train.json"},
            "selection": {"file": "selection.safetensors"},
            "training": {"steps": 8, "global_batch_size": 2, "micro_batch_size": 2},
            "zero": {"stage": 1},
            "checkpoint": {"every": 2},
            "output": {"folder": str(folder)},
        }
    )


def make_targets(folder: Path) -> list[Target]:
    """Train, and write everything that is mutated below ``folder``."""
    plain = random_llama(SIZES)
    selection, foreign = a_selection(plain, 0), a_selection(plain, 1)
    positions = torch.tensor([3, 5, 200])
    dropped = RetiredEntries(positions=positions, numbers=torch.tensor([0.5, -1.0, 2.0]))
    retired = Retired(placement="inplace", entries={"model.layers.0.mlp.up_proj.weight": dropped})
    base = sz.BaseIdentity(name="base", sha256="0" * 64)
    run, other = folder / "run", folder / "other-run"
    engine = Engine(selection, retired)
    for step in (2, 4):
        engine.train(2)
        extra = {"step": step, "tokens": 64.0 * step, "seconds": 0.5, "final_loss": 3.0}
        sz.save_checkpoint(
            engine.engine, run / "checkpoints" / f"step-{step:06d}", extra=extra, base=base, config={"a": 1}
        )
        sz.save_adapter(engine.engine, folder / "other-adapter" if step == 2 else run / "adapter", base=base)
    for number, (each, chosen) in enumerate(((run, selection), (other, foreign))):
        chosen.save(each / "selection.safetensors")
        config = sz.SelectionConfig(
            regions=(sz.RegionConfig(kind="row", modules=("*_proj",)),),
            score="random",
            seed=number,
            budget=sz.BudgetConfig(parameters=100),
        )
        sz.score_regions(plain, None, config).save(each / "scores.safetensors")
        atomic_write_text(each / "config.yaml", resolved_yaml(run_config(folder / "copy")))
        atomic_write_text(each / "checkpoints" / "latest", "step-000004\n")
        atomic_write_json(each / "summary.json", {"steps": 8 + number, "final_loss": 2.5, "phases": {"train": 1.5}})
        with MetricsLog(each) as log:
            for step in range(1, 7):
                log.write({"kind": "train", "step": step, "loss": 3.0 - step / 10 - number})
    apart = Engine(foreign, None)
    apart.train(2)
    sz.save_checkpoint(apart.engine, folder / "foreign", extra={"step": 2}, base=base)
    sz.save_adapter(apart.engine, folder / "foreign-adapter", base=base)
    return [checkpoint_target(run, engine), adapter_target(run), run_target(run, run_config, engine)]


# --- who watches ----------------------------------------------------------------------------------------------------


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of sys.addaudithook: the numbers of the arguments that are paths which are changed, and of the descriptors of
# the folders that these start at.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.truncate": ((0, None),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}
_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class Watch:
    """What Python code writes, moves and deletes outside of one folder, and whether anything is unpickled."""

    def __init__(self) -> None:
        self._inside: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside is None:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {arguments!r:.80}")
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        for path_at, folder_at in _CHANGES.get(event, ()):
            path, start = arguments[path_at], -1 if folder_at is None else arguments[folder_at]
            if isinstance(path, int):
                continue  # A descriptor belongs to a file whose opening was seen.
            above = f"/proc/self/fd/{start}" if start is not None and start >= 0 else os.getcwd()
            head, tail = os.path.split(os.path.join(above, os.fsdecode(path)))
            name = os.path.join(os.path.realpath(head), tail)
            if not f"{name}/".startswith(f"{self._inside}/") and name != os.devnull:
                self.seen.append(f"{event} {name}")

    @contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        """Watch while the block runs; what happens inside of ``folder`` is allowed."""
        self.seen = []
        self._inside = os.path.realpath(folder)
        try:
            yield
        finally:
            self._inside = None


class Hangs(BaseException):
    """Reading took too long."""


def _on_alarm(number: int, frame: object) -> None:
    raise Hangs


def tree(folder: Path) -> str:
    """Names, sizes, times and links of everything below a folder."""
    return repr(
        sorted(
            (str(path), path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_mode)
            for path in folder.rglob("*")
        )
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one mutation."""

    number: int
    target: str
    kind: str
    what: str
    outcome: str
    said: str
    seconds: float


def judge(target: Target, path: Path, done: Done, watch: Watch) -> tuple[str, str]:
    """(outcome, message) of reading one mutated folder."""
    outside = tree(path.parent / "outside")
    with warnings.catch_warnings(record=True) as told, watch.on(path):
        warnings.simplefilter("always")
        signal.alarm(SECONDS)
        try:
            found, said, error = target.read(path), "", None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as caught:
            found, said, error = "", str(caught), caught
        finally:
            signal.alarm(0)
    if watch.seen or tree(path.parent / "outside") != outside:
        return "OUTSIDE", "; ".join(watch.seen) or "a file outside changed"
    if error is not None and not isinstance(error, InputError):
        return "TRACEBACK", "".join(traceback.format_exception(error)[-3:])
    if error is not None:
        return ("refused", said) if target.state() == target.before else ("WRONG", f"refused, but changed: {said}")
    if found == target.wanted:
        return "equal", ""
    passed_over = [str(each.message) for each in told if issubclass(each.category, CheckpointWarning)]
    if passed_over:
        return "passed over", passed_over[0]
    return ("other" if done.may_be_valid else "WRONG"), "loaded with another content"


def fresh(target: Target, folder: Path) -> tuple[Path, Path]:
    """A whole copy to mutate, and a folder beside it that nobody is to touch; those of before are removed."""
    path, outside = folder / "copy", folder / "outside"
    for each in (path, outside):
        shutil.rmtree(each, ignore_errors=True)
    shutil.copytree(target.whole, path)
    outside.mkdir()
    (outside / "canary").write_text("untouched")
    return path, outside


def read_whole(target: Target, folder: Path) -> None:
    """Find out what the whole folder gives."""
    path, _ = fresh(target, folder)
    target.reset()
    target.before = target.state()
    target.wanted = target.read(path)
    path, _ = fresh(target, folder)
    target.reset()
    assert (target.state(), target.read(path)) == (target.before, target.wanted), "reading the same twice differs"


def mutate(number: int, seed: int, targets: Sequence[Target], wanted: str, folder: Path, watch: Watch) -> Result:
    """Make one mutation, of the kinds whose names have ``wanted`` in them, and read the result."""
    ways = [(target, kind) for target in targets for kind in target.mutations if wanted in f"{target.name}, {kind}"]
    target, kind = ways[number % len(ways)]
    target.reset()
    path, outside = fresh(target, folder)
    random = Random(f"{seed}-{number}")
    done = target.mutations[kind](Context(random=random, folder=path, others=target.others, outside=outside))
    started = time.perf_counter()
    outcome, said = judge(target, path, done, watch)
    seconds = time.perf_counter() - started
    return Result(
        number=number, target=target.name, kind=kind, what=done.what, outcome=outcome, said=said, seconds=seconds
    )


# --- the table ------------------------------------------------------------------------------------------------------


def print_table(results: Sequence[Result]) -> None:
    """A row for each target and kind of mutation, a column for each outcome."""
    head = f"{'':44}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES)
    for target in dict.fromkeys(each.target for each in results):
        print(f"\n{target}\n{head}")
        own = [each for each in results if each.target == target]
        for kind in [*dict.fromkeys(each.kind for each in own), "together"]:
            counted = Counter(each.outcome for each in own if kind in (each.kind, "together"))
            print(f"  {kind:42}" + "".join(f"{counted[outcome] or '':>12}" for outcome in OUTCOMES))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=500, help="mutations, spread over all kinds; default: 500")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations; default: 0")
    parser.add_argument("--only", type=int, default=None, help="the number of a single mutation, to look at")
    parser.add_argument("--kind", default="", help='only kinds with this in their name: "checkpoint, file swapped"')
    parser.add_argument("--json", type=Path, default=None, help="also write what became of each to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Mutate, read, print; 1 if anything happened that must not."""
    options = parse_arguments(argv)
    warnings.filterwarnings("ignore", category=sz.SelectionWarning)
    signal.signal(signal.SIGALRM, _on_alarm)
    torch.set_num_threads(1)
    watch, results = Watch(), []
    with tempfile.TemporaryDirectory() as folder, lone_process_group():
        targets = make_targets(Path(folder))
        for target in targets:
            read_whole(target, Path(folder))
        started, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        numbers = range(options.number) if options.only is None else [options.only]
        for number in numbers:
            results.append(mutate(number, options.seed, targets, options.kind, Path(folder), watch))
            if results[-1].outcome in BAD or options.only is not None:
                last = results[-1]
                print(
                    f"{last.number}: {last.target}, {last.kind}: {last.what}\n  {last.outcome}: {last.said}", flush=True
                )
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print_table(results)
    slowest = max(results, key=lambda each: each.seconds)
    bad = sum(each.outcome in BAD for each in results)
    print(
        f"\n{len(results)} mutations in {seconds:.0f} s, {bad} of them read as must not be; the slowest reading took "
        f"{slowest.seconds:.2f} s ({slowest.number}: {slowest.what}); peak memory grew by {grown:.0f} MB"
    )
    if options.json is not None:
        atomic_write_json(options.json, {"results": [vars(each) for each in results], "peak_grown_mb": grown})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
