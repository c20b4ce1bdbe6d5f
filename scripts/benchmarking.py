"""What do the benchmarks share: a random Llama, settings as flags, fair turns, a process of its own, exit codes?"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparse_zero.errors import InputError
from sparse_zero.memory.measure import PeakMemory

# By which a turn is timed: what it took, or what this process worked meanwhile, which other processes hardly change.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Settings = TypeVar("Settings")
Input = TypeVar("Input")


@dataclass(frozen=True, kw_only=True)
class LlamaSettings:
    """The random Llama of a benchmark, and its batches; each benchmark adds what it asks, and has its own sizes."""

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    intermediate: int = 2816
    vocab: int = 8192
    batch: int = 2  # samples in a step
    length: int = 256  # tokens in a sample
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def random_llama(settings: Any) -> Any:
    """A random Llama in training mode.

    Args:
        settings: :class:`LlamaSettings`, or what else has hidden, layers, heads, intermediate, vocab, length, device,
            dtype and seed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device=settings.device, dtype=getattr(torch, settings.dtype))
    return model.train()


# --- the command line --------------------------------------------------------------------------------------


def make_parser(description: str | None, settings: type[Any]) -> argparse.ArgumentParser:
    """A parser with a flag for every field of the dataclass ``settings``, ``--small`` and ``--json``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run? (the numbers mean nothing)")
    parser.add_argument("--json", type=Path, default=None, help="also write tables and numbers to this file")
    for setting in fields(settings):
        parser.add_argument(
            _flag(setting.name), type=type(setting.default), default=None, help=f"default: {setting.default}"
        )
    return parser


def parse_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; ``given`` has them as they were written, so that a file can name the command that made it."""
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def read_settings(options: argparse.Namespace, usual: Settings, small: Settings) -> Settings:
    """The settings that the command line asks for: a preset, and what its flags change."""
    preset: dict[str, Any] = asdict(small if options.small else usual)  # type: ignore[call-overload]
    given = {name: value for name in preset if (value := getattr(options, name)) is not None}
    return type(usual)(**{**preset, **given})


def as_flags(settings: Any) -> list[str]:
    """A command line that :func:`read_settings` reads back as equal settings."""
    return [text for name, value in asdict(settings).items() for text in (_flag(name), str(value))]


def chosen_names(text: str, known: Sequence[str], flag: str) -> tuple[str, ...]:
    """The names in ``text``, joined by commas.

    Raises:
        InputError: one of them is not known.
    """
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{flag} has {unknown[0]!r}: choose from {', '.join(known)}")
    return names


def check_clock(clock: str, threads: int, device: str) -> None:
    """Raise InputError unless ``clock`` is one of :data:`CLOCKS` that says something of such a run."""
    if clock not in CLOCKS:
        raise InputError(f"--clock is {clock!r}: choose from {', '.join(CLOCKS)}")
    if clock == "cpu" and (threads != 1 or device != "cpu"):
        raise InputError(
            f"--clock cpu adds up the time of {threads} threads and knows nothing of device {device}: use it with "
            "--threads 1 --device cpu"
        )


def exit_code(work: Callable[[], None]) -> int:
    """Do ``work``; 2 for wrong input, with one line on stderr."""
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def machine() -> dict[str, str]:
    """What the numbers were made on, for their file."""
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    """As Linux tells it; what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- measuring ---------------------------------------------------------------------------------------------


def take_turns(
    prepared: Mapping[str, Callable[[Input], Any]],
    input_of: Callable[[int], Input],
    *,
    warmup: int,
    rounds: int,
    seed: int,
    device: str,
    on_round: Callable[[int], None],
    max_seconds: float = 0.0,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of every timed call, per method; in every round all take one turn, in random order, on one input.

    Args:
        prepared: what is timed, by name.
        input_of: what the round of a number works on.
        warmup: rounds before, not counted.
        rounds: timed rounds.
        seed: of the order.
        device: waited for before and after each call, so that a clock says what it seems to.
        on_round: called with the number of rounds done.
        clock: of :data:`CLOCKS`.
        max_seconds: no round is begun after so many of the wall clock, but the first that is timed; 0: no limit.
    """
    begun, now = time.perf_counter(), CLOCKS[clock]
    shuffler = random.Random(seed)
    seconds: dict[str, list[float]] = {method: [] for method in prepared}
    for number in range(warmup + rounds):
        if number > warmup and 0.0 < max_seconds < time.perf_counter() - begun:
            break
        given = input_of(number)
        gc.collect()
        gc.disable()
        for method in shuffler.sample(list(prepared), len(prepared)):
            _synchronize(device)
            start = now()
            prepared[method](given)
            _synchronize(device)
            if number >= warmup:
                seconds[method].append(now() - start)
        gc.enable()
        on_round(number + 1)
    return seconds


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_of(work: Callable[[], Any], device: str, remedy: str) -> tuple[int, int, Any]:
    """Bytes held before ``work``, bytes held at most during it (on CUDA by its allocator), and what it returned.

    Raises:
        InputError: the system does not tell; ends with ``remedy``.
    """
    gc.collect()
    with PeakMemory(device) as memory:
        loaded = memory.current_bytes()
        if loaded is None or not memory.reset():
            raise InputError(f"the peak memory of a process cannot be measured on {platform.system()}{remedy}")
        result = work()
        return loaded, memory.peak_bytes(), result


def start_ranks(
    script: str, arguments: Sequence[str], *, world_size: int, threads: int, device: str, what: str
) -> None:
    """Run ``script`` with ``arguments`` on every rank of a new world, by a launcher that ends them together.

    Raises:
        RuntimeError: a rank failed; with what it said, after ``what``.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command += [str(Path(script).resolve()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")


@contextmanager
def among_ranks(threads: int, device: str) -> Iterator[int]:
    """Join the ranks that :func:`start_ranks` has started, for the block, which is told its own; leave with them."""
    import deepspeed
    import torch.distributed as dist

    from sparse_zero.collectives import leave_process_group

    torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if device == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    yield dist.get_rank()
    dist.barrier()
    leave_process_group()


def in_own_process(script: str, arguments: Sequence[str], threads: int) -> Any:
    """The JSON that a benchmark prints last when it is started again with ``arguments``.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments[:2])} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])
