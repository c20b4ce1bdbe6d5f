"""The optimizer of a run: read from YAML, refused early where it cannot work, and scheduled for each kind."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import RunConfig, parse_config
from launcher.preparing import check_run
from launcher.training_config import TrainingConfig
from sparse_zero.errors import InputError
from sparse_zero.zero.optimizers import KindOptimizerConfig, OptimizerConfig, PerKindConfig
from tests.launcher.test_train import base, cli, losses, rows, run, worker, write_config
from tests.models.tiny import write_tiny_llama

__all__ = ["base"]


def config(tmp_path: Path, **training: Any) -> RunConfig:
    """A run that trains blocks and rows of a tiny Llama."""
    if not (tmp_path / "model").exists():
        write_tiny_llama(tmp_path / "model")
        (tmp_path / "train.json").write_text(json.dumps([{"instruction": "1 + 1", "output": "2"}]))
    zero = {name.removeprefix("zero_"): training.pop(name) for name in list(training) if name.startswith("zero_")}
    return parse_config(
        {
            "model": {"name_or_path": str(tmp_path / "model")},
            "data": {"train": str(tmp_path / "train.json"), "template": "plain"},
            "selection": {
                "regions": [
                    {"kind": "block", "modules": ["*.q_proj"], "block_size": 8},
                    {"kind": "row", "modules": ["*.up_proj"]},
                ],
                "budget": {"fraction": 0.05},
            },
            "training": {"steps": 2, **training},
            "zero": zero,
            "output": {"folder": str(tmp_path / "run")},
        }
    )


def test_the_training_section_says_it_all():
    found = TrainingConfig(
        steps=1,
        optimizer="lion",
        learning_rate=2e-5,
        beta2=0.99,
        weight_decay=0.1,
        per_kind=PerKindConfig(row=KindOptimizerConfig(learning_rate_factor=3.0)),
    ).optimizer_config()
    assert found == OptimizerConfig(
        name="lion",
        learning_rate=2e-5,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.1,
        per_kind=PerKindConfig(row=KindOptimizerConfig(learning_rate_factor=3.0)),
    )


def test_settings_of_a_kind_are_read(tmp_path):
    found = config(tmp_path, optimizer="muon", per_kind={"row": {"learning_rate": 1e-3, "weight_decay": 0.0}})
    assert found.training.per_kind == PerKindConfig(row=KindOptimizerConfig(learning_rate=1e-3, weight_decay=0.0))
    check_run(found)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optimizer": "adam"}, "training.optimizer is 'adam': it may be adamw, .*; did you mean adamw?"),
        ({"per_kind": {"rows": {}}}, "unknown key training.per_kind.rows in the config: did you mean .*per_kind.row?"),
        ({"per_kind": {"row": {"lr": 1e-3}}}, "unknown key training.per_kind.row.lr"),
        ({"per_kind": {"row": {"learning_rate": -1.0}}}, "per_kind learning_rate is -1.0: it must be a positive number"),
        ({"per_kind": {"column": {"weight_decay": 0.0}}}, "per_kind.column is set, but the selection trains block, row"),
        ({"zero_rounding": "stochastic"}, "zero.rounding is 'stochastic' with zero.placement inplace and .* fp32"),
    ],
)  # fmt: skip
def test_what_is_refused_before_a_model_is_loaded(tmp_path, training, message):
    with pytest.raises(InputError, match=message):
        check_run(config(tmp_path, **training))


@pytest.mark.slow
def test_a_run_with_muon_and_settings_of_a_kind_does_not_depend_on_ranks_and_stage(base, tmp_path):
    changes = {
        "training__optimizer": "muon",
        "training__learning_rate": 5e-3,
        "training__per_kind": {"row": {"learning_rate_factor": 0.1}, "column": {"weight_decay": 0.1}},
        "output__merged": False,
        "output__evaluate": False,
    }
    found = []
    for number, (stage, placement) in enumerate(((0, "inplace"), (3, "inplace"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write_config(base, folder, zero__stage=stage, zero__placement=placement, **changes)
        # One process alone, and two ranks.
        run(worker(path) if number == 0 else cli("launch", "--config", str(path)), folder)
        found.append(losses(folder))
        assert [row["learning_rate"] for row in rows(folder)][2] == pytest.approx(5e-3, rel=0.2)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert sum(found[0][-8:]) < sum(found[0][:8])
