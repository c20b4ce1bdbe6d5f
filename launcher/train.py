"""What does one rank of a run do, from its config to the adapter? Also the script that every launcher starts.

deepspeed --num_gpus 8 launcher/train.py --config run.yaml
torchrun --nproc_per_node 8 launcher/train.py --config run.yaml
mpirun -n 8 python launcher/train.py --config run.yaml
python launcher/train.py --config run.yaml
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, load_config, resolved_yaml
from launcher.ending import code_of, tell_notes
from launcher.evaluating import evaluate_model, loss_on
from launcher.forgetting import Forgetting, measure_forgetting
from launcher.memory.measuring import RunMemory
from launcher.memory.notes import MemoryNotes
from launcher.methods import Method, SelectedParts
from launcher.metrics import MetricsLog
from launcher.prefix_caching import open_prefix_cache
from launcher.preparing import (
    Phases,
    Prepared,
    check_run,
    choose_selection,
    new_engine,
    prepare,
)
from launcher.process_ranks import find_ranks, reports_errors
from launcher.report import FOLDER_NAME, PAGE_NAME, write_report
from launcher.run_folder import RunFolder, RunLock
from launcher.selection_terminal import save_choice
from launcher.shared_folder import find_folders
from launcher.starting.node_guard import write_exit_record
from launcher.stopping import EXIT_ERROR, EXIT_INPUT, EXIT_SIGNAL, Stopped, StopRequest, stoppable
from launcher.summary import print_summary
from launcher.training_loop import LoopState, NonFiniteError, TrainingResult, train
from launcher.world import World, join_world, speak_once
from models.gather import gather_json
from models.heads import fresh_head
from models.loading import pad_token_id
from sparse_zero.checkpoint.checkpoint import load_checkpoint
from sparse_zero.checkpoint.folders import clear_leftovers
from sparse_zero.collectives import PeerError, failing_together, leave_process_group
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, atomic_write_text, read_json
from sparse_zero.selection.select import num_parameters


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def _evaluate(prepared: Prepared, world: World, model: Any, name: str) -> tuple[float, int, Any]:
    """(accuracy, problems, a classifier's metrics) of ``model`` on the test records.

    From the file of an earlier start if it is there.
    """
    out = prepared.folder.evaluation / f"{name}.json"
    reuse = name == "base" and prepared.resumes and out.is_file()
    if all(gather_json(reuse)):
        earlier = read_json(out, strict=True)
        try:
            return float(earlier["accuracy"]), int(earlier["num_problems"]), earlier.get("metrics")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{out} is no evaluation ({error!r}): delete it, and it is made again") from error
    result = evaluate_model(
        prepared.config,
        world,
        model,
        prepared.tokenizer,
        prepared.test,
        out,
        f"evaluating the {name} model",
        prepared.labels,
    )
    _say(world, f"{name} model: {result.correct} of {result.num_problems} test problems correct")
    return result.accuracy, result.num_problems, result.metrics


def _train(
    prepared: Prepared, engine: Any, world: World, memory: RunMemory, notes: MemoryNotes | None, has_checkpoints: bool
) -> tuple[TrainingResult, Any]:
    """Continue from the checkpoint if there is one, and train to the end or to a signal; the engine it ended with."""
    if engine is None:  # There is nothing to train.
        _validate_base(prepared, world)
        nothing = TrainingResult(
            step=0, stopped_by=0, final_loss=math.nan, tokens=0.0, seconds=0.0,
            peak_memory_bytes=[0] * world.world_size,
        )  # fmt: skip
        return nothing, None
    earlier: dict[str, Any] = {}
    if prepared.checkpoint is not None:
        with memory.engine("resume"):
            earlier = load_checkpoint(engine, prepared.checkpoint).extra
        _say(world, f"continuing from {prepared.checkpoint.folder} after step {earlier['step']}")
    first_step = int(earlier.get("step", 0))
    prefix_cache = open_prefix_cache(prepared, engine.module, world)
    state = LoopState(
        config=prepared.config,
        world=world,
        engine=engine,
        make_engine=lambda model: new_engine(model, prepared.config, world.world_size),
        module_map=prepared.module_map,
        train=prepared.train.samples,
        calibration=prepared.calibration_samples,
        validation=prepared.validation.samples if prepared.validation else (),
        pad_token_id=pad_token_id(prepared.tokenizer),
        folder=prepared.folder,
        base=prepared.base,
        first_step=first_step,
        earlier=earlier,
        memory=memory,
        notes=notes,
        prefix_cache=prefix_cache,
        has_checkpoints=has_checkpoints,
    )
    resumed, tensorboard = first_step if first_step else None, world.is_main and prepared.config.output.tensorboard
    with ExitStack() as stack:
        log = None
        if prefix_cache is not None:
            stack.enter_context(prefix_cache)
        if world.keeps_folder:
            log = stack.enter_context(MetricsLog(prepared.folder.path, resumed_step=resumed, tensorboard=tensorboard))
        return train(state, log), state.engine


def _validate_base(prepared: Prepared, world: World) -> None:
    """Write metrics of a run that trains nothing: the loss on the validation data, of what is no classifier."""
    row = None
    if prepared.validation is not None and not prepared.config.model.classifies:
        model, tokenizer, texts = prepared.model, prepared.tokenizer, prepared.validation.texts
        found = loss_on(prepared.config, world, model, tokenizer, texts, "validating")
        measured = {"loss": found.loss, "response_tokens": found.num_labels, "pieces": found.pieces}
        row = {"kind": "validation", "step": 0, **measured}
    if world.keeps_folder:
        with MetricsLog(prepared.folder.path) as log:
            if row is not None:
                log.write(row)


def _write_summary(
    prepared: Prepared,
    world: World,
    phases: Phases,
    result: TrainingResult,
    accuracy: dict[str, Any],
    forgetting: Forgetting | None,
    counts: dict[str, Any],
    communication: dict[str, int],
    memory: RunMemory,
    notes: MemoryNotes | None,
    adapter_bytes: int,
) -> None:
    folder, summary = prepared.folder, prepared.folder.summary
    peaks = gather_json(max(peak for name, peak in memory.peaks.peaks.items() if name != "load"))
    ranks = gather_json(memory.to_json())
    if not world.is_main:
        return
    atomic_write_json(
        summary,
        {
            "phases": phases.seconds,
            "accuracy": accuracy,
            "forgetting": forgetting,
            "parameters": counts,
            "peak_memory_bytes_per_rank": peaks,
            "communication_bytes_per_step": communication,
            "tokens_per_second": result.tokens_per_second,
            "adapter_bytes": adapter_bytes,
            "merged_bytes": folder.size_of(folder.merged),
            "world_size": world.world_size,
            "steps": result.step,
            "checkpoint_stall_seconds": result.checkpoint_stall_seconds,
            "prefix_cache": result.prefix_cache,
            "resumed_after_step": 0 if prepared.checkpoint is None else prepared.checkpoint.extra["step"],
            "final_loss": result.final_loss,
            "base": {"name": prepared.base.name, "sha256": prepared.base.sha256},
            "memory": None if notes is None else notes.finish(ranks),
        },
    )


def _end_again(config: RunConfig, world: World) -> int:
    """What a start of a complete run does: it tells so, and draws the report if none was drawn of the end."""
    folder = RunFolder(config.output.folder)
    _say(world, f"the run in {folder.path} is complete already; for another merged model or report: export, report")
    if world.is_main:
        print_summary(folder.path)
        page = folder.path / FOLDER_NAME / PAGE_NAME
        if config.output.report and not (page.is_file() and page.stat().st_mtime >= folder.summary.stat().st_mtime):
            print(f"report: {write_report(folder.path)}")
    return 0


def _take_over(config: RunConfig, folder: RunFolder, lock: RunLock) -> None:
    """Remove what killed starts have left half written in the run folder, and say there which run it is."""
    folder.path.mkdir(parents=True, exist_ok=True)
    lock.take()
    for place in (folder.path, folder.checkpoints, folder.evaluation, folder.path / FOLDER_NAME):
        if place.is_dir():
            clear_leftovers(place, ".+")
    atomic_write_text(folder.config, resolved_yaml(config))


def _run_in_world(config: RunConfig, world: World, request: StopRequest, memory: RunMemory, method: Method) -> int:
    path = RunFolder(config.output.folder).memory
    with RunLock(Path(config.output.folder)) as lock, ExitStack() as stack:
        stack.callback(memory.peaks.close)
        notes = None
        if world.is_main and method.has_forecasts:
            notes = stack.enter_context(MemoryNotes(config, world.world_size, world.device.type, path))
        return _run_alone(config, world, request, lock, memory, notes, method)


def _run_alone(
    config: RunConfig,
    world: World,
    request: StopRequest,
    lock: RunLock,
    memory: RunMemory,
    notes: MemoryNotes | None,
    method: Method,
) -> int:
    folder = RunFolder(config.output.folder)
    phases = Phases(world.pulse)
    with phases.measure("load"), memory.phase("load"):
        world = find_folders(config, world)
        with failing_together():
            if world.keeps_folder:
                lock.take()
        prepared = prepare(config, world, check_model=method.check_model)
    if all(gather_json(folder.summary.is_file())) and config.checkpoint.resume == "auto":
        return _end_again(config, world)
    with failing_together():
        if world.keeps_folder:
            _take_over(config, folder, lock)
    world.pulse.tick(owns_folder=True)
    started = "" if world.launcher == "none" else f", started by {world.launcher}"
    _say(world, f"{world.world_size} rank{'s' * (world.world_size > 1)} on {world.device.type}{started}")
    accuracy: dict[str, Any] = {"base": None, "tuned": None, "num_problems": 0}
    metrics: dict[str, Any] = {}
    total = num_parameters(prepared.model)
    if new := fresh_head(prepared.model):
        _say(world, f"the base lacks a head: {', '.join(new)} start from training.seed {config.training.seed}")
    if prepared.test and config.output.evaluate_base:
        with phases.measure("evaluate_base"), memory.phase("evaluate"):
            found = _evaluate(prepared, world, prepared.model, "base")
            accuracy["base"], accuracy["num_problems"], metrics["base"] = found
    forgetting: Forgetting | None = None
    if prepared.forgetting is not None:
        with phases.measure("forgetting"), memory.phase("evaluate"):
            forgetting = measure_forgetting(prepared, world, prepared.model, "base")
    with phases.measure("calibrate"), memory.phase("calibration"):
        trained = method.choose(prepared, world, memory, notes)
    _say(world, f"training {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)")
    with phases.measure("train"):
        result, engine = _train(
            prepared, method.make_engine(prepared, world, memory), world, memory, notes, method.has_checkpoints
        )
    # A signal that came with the last step, or after the ranks had spoken about it, has only been noted.
    stopped_by = result.stopped_by or max(gather_json(request.signal))
    if stopped_by:
        again = "continue" if method.has_checkpoints else "train anew"
        _say(world, f"stopped by signal {stopped_by} after step {result.step}; start again to {again}")
        return EXIT_SIGNAL + stopped_by
    counts = {"total": total, **method.counts(engine)}
    communication = method.communication(engine)
    is_quantized = config.model.quantization != "none"
    with phases.measure("save"), memory.phase("save"):
        if config.output.adapter:
            method.save_adapter(prepared, engine)
        # Not where nobody asks for it: what is offloaded to a disk could not be read.
        needs_model = config.output.merged or prepared.test or forgetting is not None
        model: Any = method.tuned_model(prepared, engine) if needs_model else None
        if config.output.merged and not is_quantized:
            method.save_merged(prepared, world, model)
    if prepared.test:
        with phases.measure("evaluate_tuned"), memory.phase("evaluate"):
            found = _evaluate(prepared, world, model.to(world.device), "tuned")
            accuracy["tuned"], accuracy["num_problems"], metrics["tuned"] = found
    if forgetting is not None:
        with phases.measure("forgetting"), memory.phase("evaluate"):
            forgetting = measure_forgetting(prepared, world, model.to(world.device), "tuned", forgetting)
    if config.output.merged and is_quantized:
        with phases.measure("save"), memory.phase("save"):
            method.save_merged(prepared, world, model)
    if config.model.classifies:
        accuracy["metrics"] = metrics
    size = method.adapter_bytes(prepared)
    _write_summary(prepared, world, phases, result, accuracy, forgetting, counts, communication, memory, notes, size)
    if world.is_main:
        print_summary(folder.path)
        if config.output.report:
            print(f"report: {write_report(folder.path)}")
    return 0


def _said_by_one(code: int) -> int:
    """The exit code of the rank that reports for all, on every rank; the others give 0. Collective."""
    return int(max(gather_json(code)))


def _in_world(
    config: RunConfig,
    work: Callable[[World, StopRequest, RunMemory], int],
    check: Callable[[], None],
    folder: Path,
    record: str | None = None,
) -> int:
    """Join the ranks, do ``work``, leave; the exit code. Signals outside the training loop end it at once.

    An unexpected error leaves the process group as it is: leaving might wait for ranks that wait for this one, and the
    launcher ends them when this process ends.

    Args:
        config: of the run.
        work: gets this process's place, what tells of signals that have not raised, and what measures memory.
        check: what can be found wrong before anything is started.
        folder: what is written into, for errors of the disk.
        record: folder of the guard of this node.
    """
    ranks = find_ranks(os.environ)
    rank = ranks.rank
    if ranks.world_size == 1:
        check()  # Alone, what is wrong is said before anything is started.
    memory: RunMemory | None = None
    with stoppable() as request:
        try:
            world = join_world(record)
            speak_once(world)
            memory = RunMemory(config.memory, world.device)
            code = work(world, request, memory)
            request.raises = False  # From here on there is nothing to cut short.
        except Stopped as stop:
            tell_notes(stop)
            print(
                f"sparse-zero: rank {rank} was {stop} at once; start again to continue from what is complete",
                file=sys.stderr,
            )
            return EXIT_SIGNAL + stop.signal
        except PeerError as error:
            request.raises = False
            tell_notes(error)
            code = _said_by_one(0)
        except NonFiniteError as error:
            request.raises = False
            tell_notes(error)
            _say(world, f"sparse-zero: error: {error}")
            code = EXIT_ERROR
        except Exception as error:
            request.raises = False
            tell_notes(error)
            agrees = getattr(error, "speaks_for_all", False)  # The others have met a PeerError.
            if isinstance(error, InputError):
                if agrees:
                    _said_by_one(EXIT_INPUT)
                leave_process_group()
                raise
            explained = code_of(error, folder, config, ranks, memory)
            if agrees:
                _said_by_one(explained or EXIT_ERROR)
            if explained is None:
                raise
            if not agrees:
                return explained
            code = explained
        leave_process_group()
        return code


def run(config: RunConfig, record: str | None = None, method: Method | None = None) -> int:
    """Train one run in this process and its peers, if a launcher started some; returns the exit code.

    Args:
        config: the run.
        record: folder of the guard of this node, which `sparse-zero launch` started.
        method: how it trains; default: the selected parts.

    Raises:
        InputError: the config cannot be used; nothing has been written then.
    """
    trained = SelectedParts() if method is None else method
    return _in_world(
        config,
        lambda world, request, memory: _run_in_world(config, world, request, memory, trained),
        lambda: check_run(config),
        Path(config.output.folder),
        record,
    )


def select_only(config: RunConfig, out: Path, scores_out: Path | None) -> int:
    """Calibrate, select, write selection and scores, print what was chosen, and stop; returns 0, or 2 as a peer.

    Args:
        config: the run.
        out: the file of the selection.
        scores_out: the file of the scores; None: they are not kept.
    """

    def work(world: World, request: StopRequest, memory: RunMemory) -> int:
        with memory.phase("load"):
            prepared = prepare(config, world, continues=False)
        with memory.phase("calibration"):
            selection, scores = choose_selection(prepared, world)
        if world.is_main:
            save_choice(selection, scores, out, scores_out)
        return 0

    return _in_world(config, work, lambda: check_run(config, continues=False), out.parent)


def main(argv: Sequence[str] | None = None) -> int:
    """The worker: ``--config FILE`` and overrides ``--section.key=value``."""
    parser = argparse.ArgumentParser(description="One rank of a run; see `sparse-zero launch --help`.")
    parser.add_argument("--config", required=True, help="the YAML file of the run")
    # DeepSpeed's launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    # Where `sparse-zero launch` reads how each rank ended; see launcher.starting.node_guard.
    parser.add_argument("--exit_record", default=None, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args(argv)
    try:
        code = run(load_config(args.config, overrides), args.exit_record)
    except InputError as error:
        if reports_errors(error, os.environ):
            print(f"sparse-zero: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = EXIT_INPUT
    write_exit_record(args.exit_record, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
