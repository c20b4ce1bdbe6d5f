"""Which runs load their model in shards, and what do those say that cannot?"""

import warnings
from typing import Any

import pytest

from launcher.config import RunConfig, parse_config
from launcher.preparing import _loads_sharded
from models.sharded_loading import ShardedLoadingWarning


def make(stage: int, model: dict[str, Any] | None = None, **selection: Any) -> RunConfig:
    rows = {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}]}
    return parse_config(
        {
            "model": {"name_or_path": "m", **(model or {})},
            "data": {"train": "d.json"},
            "selection": selection or rows,
            "training": {"steps": 1},
            "zero": {"stage": stage, "placement": "delta"},
            "output": {"folder": "o"},
        }
    )


FULL: dict[str, Any] = {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}], "calibration_weights": "full"}


@pytest.mark.parametrize(
    ("config", "is_selected", "sharded"),
    [
        (make(3), False, True),
        (make(2), False, False),
        (make(2, None, **FULL), False, False),
        (make(3, None, **FULL), True, True),
        (make(3, file="selection.safetensors"), False, True),
    ],
)
def test_stage_3_loads_shards(config: RunConfig, is_selected: bool, sharded: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _loads_sharded(config, is_selected=is_selected) == sharded


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (make(3, None, **FULL), "selection.calibration_weights is 'full'"),
        (make(3, {"quantization": "nf4"}), "model.quantization is 'nf4'"),
    ],
)
def test_what_needs_whole_weights_first_is_told(config: RunConfig, field: str) -> None:
    with pytest.warns(ShardedLoadingWarning, match=f"{field}, which needs whole weights: at zero.stage 3 every rank"):
        assert not _loads_sharded(config, is_selected=False)
