"""What does it take to get a small Llama that has learned a language, in half an hour and without a download?

Usage: python scripts/pretrain_llama.py --out bases/small-llama
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.data import TokenizedSample
    from scripts.pretraining.settings import Schedule, Shape
    from scripts.pretraining.state import Progress

_DONE, _CURVE, _PICTURE, _VALIDATION = "pretraining.json", "learning_curve.json", "learning_curve.png", "validation.txt"
# Of the time, for validations and saving.
_OVERHEAD = 0.06
# Tokens of the held-out text that every validation predicts; the file has all of it.
_VALIDATION_TOKENS = 8192
_EXAMPLES = """
examples:
  python scripts/pretrain_llama.py --out bases/small-llama                  text made here, 25 minutes
  python scripts/pretrain_llama.py --out bases/small-llama --resume         goes on after a stop or a kill
  python scripts/pretrain_llama.py --out bases/mine --text a.txt b.txt --minutes 60
  sparse-zero train --config run.yaml --model.name_or_path=bases/small-llama \\
      --data.forgetting=bases/small-llama/validation.txt

The folder holds the model and its tokenizer in transformers' form, validation.txt (text it has not been trained on),
learning_curve.png and .json, and pretraining.json. Equal seed, text, steps and threads give equal weights: --minutes
finds the number of steps from the time of the first ones, and pretraining.json says it for --steps.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for."""
    from scripts.pretraining.settings import Schedule, Shape

    parser = argparse.ArgumentParser(
        description="Pre-train a small Llama and its tokenizer from nothing. Every width is a multiple of 256.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder of the model")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="plain text, its documents between empty lines (default: text that is generated)")  # fmt: skip
    add("--characters", type=int, default=8_000_000, help="of generated text (default: %(default)s)")
    add("--minutes", type=float, default=25.0, help="until it is done, over all starts (default: %(default)s)")
    add("--steps", type=int, help="so many steps instead, whatever they take")
    add("--seed", type=int, default=0, help="of text, weights and order (default: %(default)s)")
    add("--resume", action="store_true", help="go on from what an earlier start has saved in --out, if it has")
    for name in ("vocab", "hidden", "intermediate", "layers", "heads"):
        add(f"--{name}", type=int, default=getattr(Shape(), name), help="default: %(default)s")
    schedule = Schedule()
    add("--batch", type=int, default=schedule.batch, help="samples of a step (default: %(default)s)")
    add("--length", type=int, default=schedule.length, help="tokens of a sample (default: %(default)s)")
    add("--learning-rate", type=float, default=schedule.learning_rate, help="the highest (default: %(default)s)")
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> tuple[Shape, Schedule]:
    """Everything that can be found wrong before any work.

    Raises:
        InputError: names the option, its value and the remedy.
    """
    from launcher.run_folder import check_can_write_in
    from scripts.pretraining.settings import Schedule, Shape
    from scripts.pretraining.state import STATE_NAME
    from sparse_zero.errors import InputError
    from sparse_zero.optional import require

    shape = Shape(**{each.name: getattr(given, each.name) for each in fields(Shape) if hasattr(given, each.name)})
    schedule = Schedule(batch=given.batch, length=given.length, learning_rate=given.learning_rate)
    if given.length > shape.positions:
        raise InputError(f"--length is {given.length}: the model has {shape.positions} positions; give fewer")
    if given.steps is not None and given.steps < 1:
        raise InputError(f"--steps is {given.steps}: it must be at least 1")
    if not given.minutes > 0:
        raise InputError(f"--minutes is {given.minutes}: it must be above 0")
    if given.seed < 0:
        raise InputError(f"--seed is {given.seed}: it must not be negative")
    for file in given.text:
        if not file.is_file():
            raise InputError(f"--text is {file}, which is no file: name files of plain text")
    check_can_write_in(given.out, f"--out is {given.out}")
    found = {path.name for path in given.out.iterdir() if path.name[0] != "."} if given.out.is_dir() else set()
    if _DONE not in found and STATE_NAME not in found and found:
        raise InputError(f"--out is {given.out}, which holds something else: name a new folder")
    if found and not given.resume:
        raise InputError(f"--out is {given.out}, which has a pre-training already: go on with --resume, or delete it")
    require("matplotlib", extra="plots", purpose="draw the learning curve")
    return shape, schedule


def pretrain(given: argparse.Namespace, shape: Shape, schedule: Schedule) -> int:
    """Pre-train and write everything; the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from launcher.progress import LineClock
    from launcher.stopping import stop_requests
    from scripts.pretraining import loop, text
    from scripts.pretraining.state import STATE_NAME, load_state, save_state
    from scripts.pretraining.state import Progress as Done
    from sparse_zero.errors import InputError

    began = time.monotonic()
    documents, digest = text.read_documents(given.text, given.characters, given.seed)
    training, held_out = text.split_documents(documents)
    tokenizer = text.train_tokenizer(training, shape.vocab)
    samples, num_tokens = text.make_samples(training, tokenizer, schedule.length)
    validation, _ = text.make_samples(held_out, tokenizer, min(schedule.length, 32 if len(held_out) < 50 else 10**9))
    validation = validation[: max(1, _VALIDATION_TOKENS // len(validation[0].input_ids))]
    what = {"text_sha256": digest, "seed": given.seed, "shape": asdict(shape), "schedule": asdict(schedule)}
    model = loop.make_model(shape, given.seed)
    optimizer = loop.make_optimizer(model, schedule)
    done = Done()
    if (given.out / STATE_NAME).is_file():
        done = load_state(given.out, model, optimizer, what)
        print(f"going on after step {done.step}", file=sys.stderr)
    if given.steps is not None and done.num_steps not in (None, given.steps):
        raise InputError(f"--steps is {given.steps}, and it was begun for {done.num_steps}: leave --steps out")
    done.num_steps = given.steps or done.num_steps
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{total:,} parameters, {len(tokenizer):,} tokens in the vocabulary, {num_tokens:,} tokens of text in "
        f"{len(samples):,} samples",
        file=sys.stderr,
    )

    def save() -> None:
        save_state(given.out, model, optimizer, done, what)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)
    lines = LineClock()
    with stop_requests() as request, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pre-training", total=done.num_steps, completed=done.step)

        def tell(progress: Done, loss: float) -> None:
            losses = f"loss {loss:.3f}" + (
                f", validation {progress.validation[-1][1]:.3f}" if progress.validation else ""
            )
            bar.update(task, completed=progress.step, total=progress.num_steps, description=losses)
            # A file would hold the last state of the bar only.
            is_last = progress.step == progress.num_steps
            if not console.is_terminal and lines.is_due(time.monotonic(), is_last=is_last):
                all_steps = progress.num_steps or "as many as there is time for"
                console.print(f"step {progress.step} of {all_steps}: {losses}")

        is_done = loop.train(
            model,
            optimizer,
            samples,
            validation,
            schedule,
            done,
            seed=given.seed,
            seconds_left=lambda: (60 * given.minutes - (time.monotonic() - began)) * (1 - _OVERHEAD),
            tell=tell,
            is_stopped=lambda: bool(request.signal),
            save=save,
        )
        if not is_done:
            print(f"stopped after step {done.step}; go on with --resume", file=sys.stderr)
            return 128 + request.signal
        save()
        _finish(given, shape, schedule, model, tokenizer, held_out, samples, done, what, num_tokens)
        (given.out / STATE_NAME).unlink()
    return 0


def _finish(
    given: argparse.Namespace,
    shape: Shape,
    schedule: Schedule,
    model: Any,
    tokenizer: Any,
    held_out: Sequence[str],
    samples: Sequence[TokenizedSample],
    done: Progress,
    what: dict[str, Any],
    num_tokens: int,
) -> None:
    """Write what the folder is to hold; the file that says it is complete comes last."""
    import torch

    from launcher.plots import loss_figure, to_png
    from sparse_zero.files import atomic_write_bytes, atomic_write_json, atomic_write_text

    tokenizer.model_max_length = shape.positions
    tokenizer.save_pretrained(given.out)
    model.eval().save_pretrained(given.out)
    atomic_write_text(given.out / _VALIDATION, "\n\n".join(held_out) + "\n")
    curve = {
        name: [{"step": step, "loss": loss} for step, loss in points]
        for name, points in (("train", done.train), ("validation", done.validation))
    }
    atomic_write_json(given.out / _CURVE, curve)
    atomic_write_bytes(given.out / _PICTURE, to_png(loss_figure(curve["train"], curve["validation"])))
    seen = done.step * schedule.batch * (schedule.length - 1)
    atomic_write_json(
        given.out / _DONE,
        {
            **what,
            "text": [file.name for file in given.text] or f"generated, {given.characters} characters",
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary": len(tokenizer),
            "text_tokens": num_tokens,
            "steps": done.step,
            "tokens": seen,
            "epochs": done.step * schedule.batch / len(samples),
            "loss": done.train[-1][1],
            "validation_loss": done.validation[-1][1],
            "seconds": done.seconds,
            "tokens_per_second": seen / done.seconds,
            "threads": torch.get_num_threads(),
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder, and return the exit code: 0; 2 with one line on stderr for unusable input; 128 + signal."""
    from launcher.run_folder import RunLock
    from sparse_zero.errors import InputError

    given = parse(arguments)
    try:
        shape, schedule = check(given)
        if not (given.out / _DONE).is_file():
            given.out.mkdir(parents=True, exist_ok=True)
            with RunLock(given.out, "--out", "another pre-training") as lock:
                lock.take()
                code = pretrain(given, shape, schedule)
            if code:
                return code
        told = json.loads((given.out / _DONE).read_text())
    except InputError as error:
        print(f"pretrain_llama: {error}", file=sys.stderr)
        return 2
    print(
        f"{given.out}: {told['num_parameters']:,} parameters, {told['steps']:,} steps, {told['tokens']:,} tokens, loss "
        f"{told['loss']:.3f}, validation loss {told['validation_loss']:.3f}, {told['tokens_per_second']:,.0f} tokens/s"
    )
    return 0


if __name__ == "__main__":
    # Started as a script, the folder of this file is on the path, not the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
