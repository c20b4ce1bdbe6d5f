#!/usr/bin/env python3
"""How long is it from the command to the end of the first step, part by part, and how long with transformers alone?

Every start is a process of its own, and all kinds take turns. ``train`` is `sparse-zero train`, whose functions are
timed from outside; ``launch`` is `sparse-zero launch` with two ranks and all its checks, of which the whole is timed,
and ``unchecked`` the same without the checks of `doctor`;
``transformers`` is a script of some lines that loads the same model and tokenizes the same records with transformers,
and does one step of full fine-tuning. With --beside, ``train`` and ``launch`` of another checkout take turns too.

Cold starts (--cold) are those of a model that was not used before: its files are taken out of the page cache, and no
hash of them is known. The libraries stay in the page cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.benchmarks.tables import Table

ROOT = Path(__file__).resolve().parent.parent
# Where the children import the project from: this checkout, or the one beside it.
TREE = "SPARSE_ZERO_BENCH_TREE"
sys.path.insert(0, os.environ.get(TREE, str(ROOT)))

# What is timed of a run, as (module, function, part). Parts within parts are taken out of the outer ones.
TIMED = (
    ("launcher.commands.common", "load_config", "config"),
    ("launcher.train", "join_world", "process group"),
    ("launcher.train", "check_run", "checks"),
    ("launcher.preparing", "check_run", "checks"),
    ("launcher.preparing", "validate_with_deepspeed", "checks"),
    ("launcher.preparing", "load_tokenizer", "tokenizer"),
    ("launcher.preparing", "load_samples", "data"),
    ("launcher.preparing", "check_same_input", "data"),
    ("launcher.preparing", "load_model", "model"),
    ("launcher.preparing", "base_identity", "base identity"),
    ("launcher.train", "_select", "selection"),
    ("launcher.train", "make_engine", "engine"),
    ("launcher.train", "train", "first step"),
)
KINDS = ("train", "launch", "unchecked", "transformers")
PARTS = (
    "imports", "config", "process group", "checks", "tokenizer", "data", "model", "base identity", "selection",
    "engine", "first step", "rest",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """What is started."""

    model: str = ""  # folder of the model; default: SmolLM2-135M-Instruct in the user's cache
    rounds: int = 3  # starts of each kind, after one that does not count; 0: that one only
    records: int = 4000  # training records
    calibration_batches: int = 2  # of two samples each
    threads: int = 2  # of each process


SMALL = StartSettings(rounds=0, records=32)


# --- one start, in a process of its own --------------------------------------------------------------------------


class Marks:
    """Seconds of each part since the command, by the clock, and of the processor, which other work hardly lengthens.

    A part that begins in another one interrupts it.
    """

    def __init__(self, began: float) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._stack, self._since, self._cpu_since = ["imports"], began, 0.0

    def _take(self) -> None:
        now, cpu_now, name = time.monotonic(), time.process_time(), self._stack[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + cpu_now - self._cpu_since
        self._since, self._cpu_since = now, cpu_now

    @contextlib.contextmanager
    def part(self, name: str) -> Any:
        """The block is a part."""
        self._take()
        self._stack.append(name)
        yield
        self._take()
        self._stack.pop()

    def go_on(self, name: str) -> None:
        """What follows is another part."""
        self._take()
        self._stack[-1] = name

    def timed(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, whose calls are a part."""

        def call(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return inner(*given, **named)

        return call

    def tell(self, out: Path) -> None:
        """Write what was measured, at the end of the first step."""
        self._take()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory = {name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile")}
        told = {"parts": self.seconds, "cpu_parts": self.cpu_seconds, "memory": memory}
        out.write_text(json.dumps(told), encoding="utf-8")


def start_train(config: str, began: float, out: Path, cold: bool) -> int:
    """`sparse-zero train` in this process."""
    import importlib

    marks = Marks(began)
    import launcher.preparing as preparing
    import models.base_identity as identity
    from launcher.__main__ import main
    from launcher.metrics import MetricsLog

    for name, function, part in TIMED:
        module = importlib.import_module(name)
        setattr(module, function, marks.timed(getattr(module, function), part))
    begin = getattr(preparing, "begin_base_identity", None)
    if begin is not None:  # What it returns waits for it.
        setattr(preparing, "begin_base_identity", lambda *given: marks.timed(begin(*given), "base identity"))  # noqa: B010
    if cold:
        identity.default_hash_cache = lambda: out.with_name("hashes.json")
    write = MetricsLog.write

    def seen(log: MetricsLog, row: Mapping[str, object]) -> None:
        write(log, row)
        if row["kind"] == "train" and not out.exists():
            marks.tell(out)

    MetricsLog.write = seen  # type: ignore[method-assign,assignment]
    marks.go_on("rest")
    return main(["train", "--config", config])


def start_transformers(config: str, began: float, out: Path, cold: bool) -> int:
    """What a short script does to begin training, with transformers alone."""
    marks = Marks(began)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = json.loads(Path(config).read_text(encoding="utf-8"))
    folder = settings["model"]["name_or_path"]
    with marks.part("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with marks.part("data"):
        records = json.loads(Path(settings["data"]["train"]).read_text(encoding="utf-8"))
        samples = tokenizer([f"{each['instruction']}\n{each['output']}" for each in records])["input_ids"]
    with marks.part("model"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with marks.part("engine"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with marks.part("first step"):
        for sample in samples[: settings["training"]["global_batch_size"]]:
            ids = torch.tensor([sample])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    marks.tell(out)
    return 0


# --- all of them ---------------------------------------------------------------------------------------------------


def write_inputs(settings: StartSettings, folder: Path) -> Path:
    """Data and config of the runs; the config is YAML that is JSON."""
    from models.smollm2 import default_cache, smollm2_folder
    from models.word_problems import write_word_problems

    write_word_problems(folder / "data", settings.records, 4, 4, seed=0)
    model = settings.model or str(smollm2_folder(default_cache()))
    config = {
        "model": {"name_or_path": model},
        "data": {"train": str(folder / "data" / "train.json"), "template": "plain", "max_length": 128},
        "selection": {
            "regions": [{"kind": "block", "modules": ["*.self_attn.{q,k,v}_proj"], "block_size": 16}],
            "budget": {"fraction": 0.01},
            "calibration_batches": settings.calibration_batches,
            "calibration_batch_size": 2,
        },
        "training": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-4},
        "zero": {"stage": 2},
        "output": {
            "folder": str(folder / "run"),
            "adapter": False,
            "merged": False,
            "evaluate": False,
            "report": False,
        },
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache; those that are mapped or not yet written stay."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(command: list[str], tree: Path, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(tree), TREE: str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def one_start(kind: str, tree: Path, config: Path, threads: int, cold: bool) -> dict[str, Any]:
    """Seconds of one start: its parts, and the whole."""
    import shutil

    run, out = config.parent / "run", config.parent / "marks.json"
    shutil.rmtree(run, ignore_errors=True)
    for left in (out, out.with_name("hashes.json")):
        left.unlink(missing_ok=True)
    began = time.monotonic()
    if kind in ("train", "transformers"):
        command = [sys.executable, __file__, "--start", kind, str(config), str(began), str(out), str(int(cold))]
        _run(command, tree, threads)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return {**found, "seconds": sum(found["parts"].values())}
    to_wall = time.time() - began
    command = [sys.executable, "-m", "launcher", "launch", "--config", str(config), "--cluster.ranks_per_node=2"]
    if kind == "unchecked":
        command.append("--cluster.preflight=false")
    _run(command, tree, max(1, threads // 2))
    # The row of the first step is the last one.
    return {"parts": {}, "seconds": (run / "metrics.jsonl").stat().st_mtime - to_wall - began}


def measure(
    settings: StartSettings, kinds: list[str], beside: Path | None, cold: bool, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """All starts of every kind, ``before: train`` being that of the checkout beside this one."""
    starts = {kind: (kind, ROOT) for kind in kinds}
    if beside is not None:
        starts |= {f"before: {kind}": (kind, beside) for kind in kinds if kind != "transformers"}
    shuffler, found = random.Random(0), {name: list[dict[str, Any]]() for name in starts}
    with tempfile.TemporaryDirectory(prefix="sparse_zero_start_") as scratch:
        config = write_inputs(settings, Path(scratch))
        model = Path(json.loads(config.read_text(encoding="utf-8"))["model"]["name_or_path"])
        for number in range(settings.rounds + 1):
            for name in shuffler.sample(list(starts), len(starts)):
                if cold:
                    forget(model)
                one = one_start(*starts[name], config, settings.threads, cold)
                say(f"{'warm-up' if number == 0 else f'round {number}'}: {name} {one['seconds']:.2f} s")
                if number or not settings.rounds:
                    found[name].append(one)
    return found


def table_of(found: Mapping[str, list[dict[str, Any]]]) -> Table:
    """The medians, a column for each kind."""
    from scripts.benchmarks.tables import Table

    rows: list[list[str]] = []
    for part in PARTS:
        row = []
        for starts in found.values():
            known = [(each["parts"][part], each["cpu_parts"][part]) for each in starts if part in each["parts"]]
            both = [median(each) for each in zip(*known, strict=True)]
            row.append(f"{both[0]:.2f} ({both[1]:.2f})" if both else "")
        rows.append([part, *row])
    whole = []
    for starts in found.values():
        cpu = median(sum(each.get("cpu_parts", {}).values()) for each in starts)
        whole.append(f"{median(each['seconds'] for each in starts):.2f}" + (f" ({cpu:.2f})" if cpu else ""))
    rows.append(["all", *whole])
    for name, key in (("peak MiB", "VmHWM"), ("of its own MiB", "RssAnon")):
        held = [[each["memory"][key] / 2**20 for each in starts if "memory" in each] for starts in found.values()]
        rows.append([name, *(f"{median(each):.0f}" if each else "" for each in held)])
    title = "Seconds from the command to the end of the first step (of the processor); medians"
    return Table(title, ("part", *found), rows)


def main() -> int:
    if sys.argv[1:2] == ["--start"]:
        kind, config, began, out, cold = sys.argv[2:]
        start = {"train": start_train, "transformers": start_transformers}[kind]
        return start(config, float(began), Path(out), cold == "1")
    sys.path.insert(0, str(ROOT))
    from scripts.benchmarking import chosen_names, exit_code, make_parser, parse_flags, read_settings
    from scripts.benchmarks.results import finish
    from sparse_zero.errors import InputError

    parser = make_parser(__doc__, StartSettings)
    parser.add_argument("--kinds", default=",".join(KINDS), help="what is started (default: all)")
    parser.add_argument("--beside", type=Path, default=None, help="another checkout, of which the same is started")
    parser.add_argument("--cold", action="store_true", help="with the model's files out of the page cache")
    options = parse_flags(parser, None)

    def work() -> None:
        settings = read_settings(options, StartSettings(), SMALL)
        kinds = list(chosen_names(options.kinds, KINDS, "--kinds"))
        if options.beside is not None and not (options.beside / "launcher" / "train.py").is_file():
            raise InputError(
                f"--beside is {options.beside}, which is no checkout: name a folder with launcher/train.py"
            )
        found = measure(settings, kinds, options.beside, options.cold, lambda text: print(text, file=sys.stderr))
        finish(
            options,
            script=__file__,
            doc=__doc__,
            settings=settings,
            tables=[table_of(found)],
            numbers={"starts": found},
        )

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
