"""What the tests of calibration, saving and offloading run in processes of their own."""

import json
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, parse_config
from launcher.plan.forecasting import job_of
from launcher.plan.simulating import simulate_calibration_here, simulate_here
from launcher.plan.simulation import config_of, without_scores
from sparse_zero.memory.closed_form.job import MemoryJob


def mapping(folder: str, selection: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A run over the shapes in ``folder``."""
    return {
        "model": {"name_or_path": folder, "dtype": "bfloat16"},
        "data": {"train": "nowhere.json", "max_length": 128},
        "selection": {
            "regions": [{"kind": "block", "modules": ["*.self_attn.{q,k,v}_proj"], "block_size": 64}],
            "budget": {"fraction": 0.02},
            "calibration_batch_size": 4,
            **(selection or {}),
        },
        "training": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16"},
        "zero": {"stage": 2},
        "output": {"folder": "out"},
        **sections,
    }


def job(config: RunConfig) -> MemoryJob:
    """Of the run on 4 ranks."""
    return job_of(config, 4)


def calibration(out: str, **run: Any) -> None:
    """Write the phases of loading and calibration."""
    config = parse_config(run)
    Path(out).write_text(json.dumps(simulate_calibration_here(run, job(config))))


def training(out: str, **run: Any) -> None:
    """Write what is simulated of training."""
    from launcher.config import resolved_yaml
    from launcher.yaml_files import parse_yaml

    config = parse_config(run)
    planned = config_of(without_scores(config), job(config))
    found = simulate_here(parse_yaml(resolved_yaml(planned), "the run"), job(config), timeline=f"{out}.timeline")
    Path(out).write_text(json.dumps(found))
