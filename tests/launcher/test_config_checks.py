"""Is a config that no rank could start with refused by whatever trains or plans, and by nothing else?"""

import argparse
from pathlib import Path

import pytest

from launcher.commands.common import read_run
from launcher.plan.defaults import default_run
from launcher.yaml_files import dump_yaml
from sparse_zero.errors import InputError
from tests.launcher.test_bad_input import run_mapping


def test_answers_may_be_given_in_another_precision_than_training(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_yaml(run_mapping()), encoding="utf-8")
    args = argparse.Namespace(config=tmp_path / "run.yaml", overrides=["--model.dtype=bfloat16"])
    assert read_run(args, trains=False).model.dtype == "bfloat16"
    with pytest.raises(InputError, match=r"training\.precision is fp32 but model\.dtype is bfloat16"):
        read_run(args)


def test_a_planned_run_has_weights_of_its_precision() -> None:
    assert default_run("llama-2-7b", "smt").model.dtype == "bfloat16"
    assert default_run("llama-2-7b", "smt", ["--training.precision=fp32"]).model.dtype == "float32"
    with pytest.raises(InputError, match=r"model\.quantization is 'nf4'.*set zero\.placement to delta"):
        default_run("llama-2-7b", "smt", ["--model.quantization=nf4"])
