"""What is a run of two ranks that starts in a second, how is it ended, and what has it left in its folder?

The ranks are forked from one process that has imported everything, and run launcher/train.py as a launcher would start
it: real DeepSpeed engines over gloo, a random Llama of some hundred kilobytes, word problems.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_zero.checkpoint.folders import MANIFEST
from sparse_zero.zero.config import Placement
from tests.distributed.rank_main import be_a_program
from tests.distributed.spawn import environments_of_job, preloaded_context

WORLD_SIZE = 2
# What a launcher gives its ranks after SIGTERM.
_GRACE_SECONDS = 30.0
_CONTINUES = re.compile(r"continuing from \S+ after step (\d+)")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How much is trained."""

    # Of every run.
    steps: int = 24
    # Steps from one checkpoint to the next.
    every: int = 4
    # Of the model; wide enough for a save to take some hundredths of a second.
    hidden: int = 192
    layers: int = 2
    fraction: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How it is trained, and what is made of it."""

    stage: int
    placement: Placement
    reselects: bool
    reports: bool

    def describe(self) -> str:
        """In a few words."""
        extras = (", re-selection" if self.reselects else "") + (", report" if self.reports else "")
        return f"stage {self.stage}, {self.placement}{extras}"


# --- the run ---------------------------------------------------------------------------------------------------


def write_base(folder: Path, settings: RunSettings) -> None:
    """A random Llama, and word problems to train it on."""
    from models.word_problems import write_word_problems
    from tests.models.tiny import write_tiny_llama

    hidden = settings.hidden
    write_tiny_llama(folder / "model", hidden=hidden, layers=settings.layers, intermediate=2 * hidden, tie=True)
    write_word_problems(folder / "data", 24, 4, 4, seed=0)


def write_config(base: Path, folder: Path, kind: Kind, settings: RunSettings) -> Path:
    """The YAML of a run into ``folder / run``."""
    import yaml

    regions: list[dict[str, Any]] = [
        {"kind": "block", "modules": ["*.self_attn.{q,k,v,o}_proj"], "block_size": 16},
        {"kind": "row", "modules": ["*.mlp.up_proj"]},
        {"kind": "column", "modules": ["*.mlp.down_proj"]},
    ]
    selection: dict[str, Any] = {
        "regions": regions,
        "budget": {"fraction": settings.fraction},
        "calibration_batches": 2,
        "calibration_batch_size": 2,
    }
    if kind.reselects:
        selection["reselect"] = {"every": settings.every + 1, "calibration_batches": 1}
    config = {
        "model": {"name_or_path": str(base / "model")},
        "data": {
            "train": str(base / "data" / "train.json"),
            "template": "plain",
            "batching": "pack",
            "max_length": 96,
        },
        "selection": selection,
        "training": {
            "steps": settings.steps,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
        },
        "zero": {"stage": kind.stage, "placement": kind.placement},
        "checkpoint": {"every": settings.every, "keep": 2},
        "output": {"folder": str(folder / "run"), "merged": True, "evaluate": False, "report": kind.reports},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def be_a_rank(arguments: Sequence[str], environment: dict[str, str], log: str) -> None:
    """Run one rank in this forked process, as a launcher would start it; ends the process with its exit code."""
    be_a_program("launcher.train", arguments, Path.cwd(), environment, Path(log))


class Start:
    """The ranks of one start of a run, and what lay in the run folder before it.

    Args:
        config: the YAML of the run.
        folder: has the run folder, ``run``, and gets the output of the ranks.
        overrides: of the config.
    """

    def __init__(self, config: Path, folder: Path, *overrides: str) -> None:
        self.run = folder / "run"
        self.checkpoint_before, self.halves_before = newest_checkpoint(self.run), half_saved(self.run)
        self._metrics_before = _inode(self.run / "metrics.jsonl")
        context = preloaded_context()
        environments = environments_of_job(WORLD_SIZE)
        self.began = time.monotonic()
        self.logs = [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
        self.processes = []
        for environment, log in zip(environments, self.logs, strict=True):
            log.write_bytes(b"")
            arguments = ["--config", str(config), *overrides]
            process = context.Process(target=be_a_rank, args=(arguments, environment, str(log)))
            process.start()
            self.processes.append(process)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def trains(self) -> bool:
        """Whether it has loaded everything: the metrics are written anew then."""
        return _inode(self.run / "metrics.jsonl") not in (None, self._metrics_before)

    @property
    def halves(self) -> set[str]:
        """Names of the temporary checkpoints that it has made."""
        return half_saved(self.run) - self.halves_before

    @property
    def continued_after(self) -> int:
        """The step that it went on from, once it trains; 0 from the base."""
        found = _CONTINUES.search(self.logs[0].read_text(errors="replace"))
        return 0 if found is None else int(found[1])

    def codes(self) -> list[int | None]:
        """Exit codes; None while a rank runs."""
        return [process.exitcode for process in self.processes]

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """A signal to some of the ranks, as far as they are there."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid or 0, number)

    def kill(self, victims: Sequence[int]) -> None:
        """SIGKILL to all of them at once; returns when they are gone."""
        self.send(signal.SIGKILL, victims)
        for rank in victims:
            self.processes[rank].join()

    def end_survivors(self, patience: float) -> str:
        """End those that are left as a launcher does; how that went."""
        how = "by themselves"
        for seconds, number in ((patience, signal.SIGTERM), (_GRACE_SECONDS, signal.SIGKILL)):
            deadline = time.monotonic() + seconds
            while None in self.codes() and time.monotonic() < deadline:
                time.sleep(0.01)
            for rank, code in enumerate(self.codes()):
                if code is None:
                    how = f"after {number.name}"
                    self.send(number, [rank])
        for process in self.processes:
            process.join()
        return how

    def output(self) -> str:
        """What the ranks said last."""
        told = [log.read_text(errors="replace")[-4000:] for log in self.logs]
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(told))


# --- what lies in the run folder ---------------------------------------------------------------------------------


def steps_done(run: Path) -> int:
    """The last step of the metrics; 0 where there is none. A line that is not finished is none yet."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def newest_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint that was committed; 0 where there is none."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / MANIFEST).is_file()]
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def _inode(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


def half_saved(run: Path) -> set[str]:
    """Names of temporary checkpoints."""
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(run / "checkpoints") if name.startswith(".step-")}
    return set()


def pointer(run: Path) -> int:
    """The step that ``checkpoints/latest`` names; 0 where it does not exist."""
    path = run / "checkpoints" / "latest"
    return int(path.read_text().strip().removeprefix("step-")) if path.is_file() else 0


def leftovers(run: Path) -> list[str]:
    """Everything with a temporary name."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


def _tensors_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; its writer shuffles the metadata."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def result_of(run: Path) -> dict[str, Any]:
    """What two runs must have in common: bytes of weights, and every number that does not measure time or memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes", "seconds")
    summary = json.loads((run / "summary.json").read_text())
    counts = {**summary["parameters"], "peak_memory_bytes": None}
    return {
        "metrics": [
            {key: value for key, value in row.items() if key not in timed and not key.endswith("_seconds")}
            for row in rows
        ],
        "summary": [summary["steps"], summary["final_loss"], summary["base"], {**counts}],
        **{
            str(path.relative_to(run)): _tensors_of(path)
            for part in ("adapter", "merged")
            for path in sorted((run / part).rglob("*.safetensors"))
        },
    }


def difference(wanted: dict[str, Any], run: Path) -> str | None:
    """What the run in ``run`` left otherwise than the one without a kill; None if nothing."""
    found = result_of(run)
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    left = leftovers(run)
    return f"{', '.join(different)} differ" if different else f"{', '.join(left)} left behind" if left else None
