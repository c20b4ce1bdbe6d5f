"""Which is the largest model that so many GPUs of so much memory can train, by the closed form?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.plan.planned_run import Gpu
from launcher.plan.search import largest_that_fits
from scripts.memory.study_config import StudyConfig
from scripts.memory.study_points import Forecasts, Point, can_be_trained

_HEAD_DIM, _VOCABULARY = 128, 32_000


def written_llama(layers: int, parent: Path) -> str:
    """A folder with the config.json of a Llama whose width is 128 times its depth, as in Llama 2 7B and 13B."""
    hidden = _HEAD_DIM * layers
    folder = parent / f"llama-{layers}-layers"
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "hidden_size": hidden,
        # Eight thirds, rounded up to whole 256s.
        "intermediate_size": 256 * -(-8 * hidden // (3 * 256)),
        "num_hidden_layers": layers,
        "num_attention_heads": layers,
        "num_key_value_heads": layers,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def frontier(
    config: StudyConfig, forecasts: Forecasts, folder: Path, on_row: Callable[[], None]
) -> list[dict[str, Any]]:
    """The rows of the largest models, one for each number of GPUs, memory and method that can train one.

    Args:
        config: of the study.
        forecasts: made once.
        folder: for the models' config.json.
        on_row: called after each.
    """
    rows = []
    for method in config.frontier.methods:
        for gib in config.frontier.gpu_gib:
            for world_size in config.frontier.gpus:
                best = max(
                    (
                        found
                        for stage in config.frontier.stages
                        if can_be_trained(method, stage)
                        and (found := _largest(config, forecasts, folder, method, gib, world_size, stage)) is not None
                    ),
                    key=lambda row: row["parameters"],
                    default=None,
                )
                if best is not None:
                    rows.append({**best, "gpu_gib": gib})
                on_row()
    return rows


def _largest(
    config: StudyConfig,
    forecasts: Forecasts,
    folder: Path,
    method: Any,
    gib: float,
    world_size: int,
    stage: int,
) -> dict[str, Any] | None:
    base = config.base

    def point(layers: int) -> Point:
        return Point(
            curve="frontier",
            model=written_llama(layers, folder),
            method=method,
            world_size=world_size,
            stage=stage,
            length=base.length,
            micro_batch=base.micro_batch,
            gradient_checkpointing=base.gradient_checkpointing,
        )

    def fits(halves: int) -> bool:
        return forecasts.run(point(2 * halves)).fits(Gpu(gib=gib))

    halves = largest_that_fits(1, config.frontier.most_layers // 2, fits)
    return None if halves is None else {**forecasts.row(point(2 * halves)), "model": f"llama, {2 * halves} layers"}
