"""How well are the test problems answered, by the base, by an adapter, or by the model that was just trained?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.exporting import load_merged
from launcher.run_folder import RunFolder
from launcher.world import World, join_world, leave_world
from models.data import load_records
from models.evaluation import EvaluationResult, evaluate, write_result
from sparse_zero.collectives import failing_together


def evaluate_model(
    config: RunConfig,
    world: World,
    model: Any,
    tokenizer: Any,
    records: Sequence[dict[str, str]],
    out: Path,
    title: str,
) -> EvaluationResult:
    """Answer ``records`` with the ranks together; rank 0 writes ``out``. Collective."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, quiet=not world.is_main), transient=True) as progress:
        task = progress.add_task(title, total=None)
        result = evaluate(
            model,
            tokenizer,
            records,
            config.data.evaluation,
            template=config.data.template,
            fields=config.data.fields,
            rank=world.rank,
            world_size=world.world_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if world.is_main:
        write_result(out, result)
    return result


def evaluate_run(config: RunConfig, adapter: Path | None) -> int:
    """Evaluate the base, or an adapter on it, on ``data.test``; prints the accuracy and returns 0."""
    world = join_world()
    try:
        with failing_together():
            records = load_records(config.data, "test")
            model, tokenizer = load_merged(config, adapter)
        model.to(world.device)
        name = "base" if adapter is None else "tuned"
        out = RunFolder(config.output.folder).evaluation / f"{name}.json"
        result = evaluate_model(config, world, model, tokenizer, records, out, f"evaluating the {name} model")
        if world.is_main:
            print(
                f"{name}: {result.correct} of {result.num_problems} correct ({100 * result.accuracy:.1f}%); "
                f"every prediction in {out}"
            )
    finally:
        leave_world()
    return 0
