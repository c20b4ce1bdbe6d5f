"""How does a run select anew while it trains: on which data, and what is told of it?"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher.config import RunConfig
from launcher.preparing import calibration_batches, calibration_loss
from launcher.run_folder import RunFolder
from launcher.summary import ABSENT, format_percent
from launcher.world import World
from models.data import Sample
from sparse_zero.layers.sparsify import selection_of
from sparse_zero.module_map import ModuleMap
from sparse_zero.reselection.reselect import Reselection, config_at, reselect


def check_selection_now(
    config: RunConfig,
    world: World,
    engine: Any,
    step: int,
    *,
    samples: Sequence[Sample],
    pad_token_id: int,
    folder: RunFolder,
    module_map: ModuleMap,
    make_engine: Callable[[Any], Any],
) -> tuple[Any, dict[str, Any]]:
    """The check after ``step`` optimizer steps. Collective; a function of the state and the step alone.

    Args:
        config: of the run, with ``selection.reselect``.
        world: this process's place in the run.
        engine: between two steps; at its end when another one is returned.
        step: optimizer steps done.
        samples: the calibration data, of which others are drawn at every check.
        pad_token_id: for batches of different lengths.
        folder: where the new selection is written.
        module_map: of the base.
        make_engine: from the sparsified model to an engine.

    Returns:
        The engine to go on with, and the row of metrics.
    """
    started = time.perf_counter()
    drawn = dataclasses.replace(config, selection=config_at(config.selection, step))
    batches = calibration_batches(drawn, samples, pad_token_id, world.device)
    engine, found = reselect(
        engine,
        batches if config.selection.needs_data else None,
        config.selection,
        make_engine=make_engine,
        loss_fn=calibration_loss(config),
        module_map=module_map,
        step=step,
    )
    engine.train()
    if found.changed and world.keeps_folder:
        assert found.scores is not None
        found.scores.save(folder.scores)
        selection_of(engine.module).save(folder.selection)
    return engine, _row(found, time.perf_counter() - started)


def _row(found: Reselection, seconds: float) -> dict[str, Any]:
    return {
        "kind": "reselection",
        "step": found.step,
        "changed": found.changed,
        **dataclasses.asdict(found.entries),
        "captured_before": found.captured_before,
        "captured_after": found.captured_after,
        "problem": found.problem,
        "seconds": seconds,
    }


def describe_check(row: dict[str, Any]) -> str:
    """A row of metrics in words: what the selection captured, and what changed."""
    if row.get("problem") is not None:
        return f"step {row['step']}: the selection could not be checked, and stays: {row['problem']}"
    before, after = (
        ABSENT if row[name] is None else format_percent(row[name]) for name in ("captured_before", "captured_after")
    )
    if not row["changed"]:
        return f"step {row['step']}: the selection captures {before} of the score and stays"
    returned = f" ({row['returned']:,} of them back)" if row["returned"] else ""
    return (
        f"step {row['step']}: selected anew, {before} -> {after} of the score captured; {row['kept']:,} entries kept, "
        f"{row['new']:,} new{returned}, {row['retired']:,} retired"
    )
