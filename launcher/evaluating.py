"""How well are the test problems answered, or is a text predicted, by the base, an adapter or the trained model?"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.exporting import labels_of, load_merged_shards, load_with_adapter
from launcher.run_folder import RunFolder, check_out_file
from launcher.same_input import check_same_problems
from launcher.world import World, join_world
from models.classified_data import Labels
from models.classified_evaluation import evaluate_classify
from models.data import TokenizedSample, load_records
from models.evaluation import EvaluationResult, evaluate, write_result
from models.loading import pad_token_id
from models.mean_loss import MeanLoss, mean_loss
from sparse_zero.collectives import PeerError, failing_together, leave_process_group
from sparse_zero.errors import InputError
from sparse_zero.zero.compat import has_shards
from sparse_zero.zero.inference import sharded_forward

# Exit code of wrong input.
_EXIT_INPUT = 2


def evaluate_model(
    config: RunConfig,
    world: World,
    model: Any,
    tokenizer: Any,
    records: Sequence[dict[str, str]],
    out: Path,
    title: str,
    labels: Labels | None = None,
) -> EvaluationResult:
    """Answer ``records`` with the ranks together; rank 0 writes ``out``. Collective.

    ``labels`` are those of a classifier's data.
    """
    sharded, data = has_shards(model), config.data
    with _at_work(config, world, model, title) as tell:
        shared: dict[str, Any] = {
            "rank": world.rank, "world_size": world.world_size, "lockstep": sharded, "progress": tell,
        }  # fmt: skip
        if labels is not None:
            result = evaluate_classify(model, tokenizer, records, data, labels, **shared)
        else:
            result = evaluate(
                model, tokenizer, records, data.evaluation, template=data.template, fields=data.fields, **shared
            )
    if world.is_main:
        write_result(out, result)
    return result


def loss_on(
    config: RunConfig, world: World, model: Any, tokenizer: Any, samples: Sequence[TokenizedSample], title: str
) -> MeanLoss:
    """Mean loss of a model, whole or in shards, over samples of text; a progress bar on rank 0. Collective."""
    with _at_work(config, world, model, title) as tell:
        return mean_loss(
            model,
            samples,
            pad_token_id(tokenizer),
            batching=config.data.batching,
            batch_size=config.training.micro_batch_size,
            chunk=config.training.loss_chunk,
            rank=world.rank,
            world_size=world.world_size,
            progress=tell,
        )


@contextmanager
def _at_work(config: RunConfig, world: World, model: Any, title: str) -> Iterator[Callable[[int, int], None]]:
    """Let a model forward, in shards or whole; a progress bar on rank 0, which is told what is done of how much."""
    from rich.console import Console
    from rich.progress import Progress

    with (
        Progress(console=Console(stderr=True, quiet=not world.is_main), transient=True) as progress,
        sharded_forward(model, deepspeed_config(config, world.world_size) if has_shards(model) else {}),
    ):
        task = progress.add_task(title, total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            world.pulse.tick()

        yield tell


def evaluation_file(config: RunConfig, adapter: Path | None) -> Path:
    """Where an evaluation goes unless it is told: named by who answered what, and never a run's own file.

    That is ``evaluation/<who>-<what>.json`` in ``output.folder``: ``base``, or the folder that holds the adapter
    (``mine`` for ``runs/mine/adapter``), and the test data's name without folder and suffix.
    """
    assert config.data.test is not None
    who = "base"
    if adapter is not None:
        name = adapter.resolve().parent.name
        who = "adapter" if name in ("", "base") else name
    parts = (who, Path(config.data.test).stem)
    name = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
    return RunFolder(config.output.folder).evaluation / f"{name}.json"


def evaluate_run(config: RunConfig, adapter: Path | None, out: Path | None = None) -> int:
    """Evaluate the base, or an adapter on it, on ``data.test``; prints the accuracy. Collective.

    Args:
        config: the run; its folder is not read, and need not hold this run.
        adapter: its folder; None: the base answers.
        out: the file of the predictions; None: :func:`evaluation_file`.

    Returns:
        0; 2 where another rank reports what is wrong.

    Raises:
        InputError: the data, the model or the adapter cannot be used.
    """
    if out is None:
        out = evaluation_file(config, adapter)
        check_out_file(out, "the evaluation in output.folder")
    world = join_world()
    try:
        _evaluate_in_world(config, world, adapter, out)
    except PeerError:
        leave_process_group()
        return _EXIT_INPUT
    except InputError:
        leave_process_group()
        raise
    leave_process_group()
    return 0


def _evaluate_in_world(config: RunConfig, world: World, adapter: Path | None, out: Path) -> None:
    sharded = config.zero.stage == 3 and config.model.quantization == "none" and world.world_size > 1
    model: Any = None
    tokenizer: Any = None
    labels: Labels | None = None
    with failing_together():
        records = load_records(config.data, "test")
    if world.world_size > 1:
        # Before weights are loaded.
        check_same_problems(records[: config.data.evaluation.limit])
    with failing_together():
        if config.model.classifies:
            labels = labels_of(config, config.model, adapter=adapter)
        if not sharded:
            model, tokenizer = load_with_adapter(config, adapter)
    if sharded:
        model, tokenizer = load_merged_shards(config, adapter, world.world_size)
    model.to(world.device)
    name = "base" if adapter is None else str(adapter)
    result = evaluate_model(config, world, model, tokenizer, records, out, f"evaluating {name}", labels)
    if world.is_main:
        print(
            f"{name}: {result.correct} of {result.num_problems} correct ({100 * result.accuracy:.1f}%); "
            f"every prediction in {out}"
        )
