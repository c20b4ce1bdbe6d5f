"""Does the verification of ZeRO meet every combination, and would it notice a wrong loss?"""

import itertools
from dataclasses import asdict

import pytest

from scripts import verify_zero as verify


def test_every_pair_of_settings_meets():
    found = [asdict(combination) for combination in verify.combinations(False)]
    assert len(found) == 64
    for one, other in itertools.combinations(found[0], 2):
        pairs = {(each[one], each[other]) for each in found}
        assert len(pairs) == len({each[one] for each in found}) * len({each[other] for each in found}), (one, other)
    assert len(set(verify.combinations(True))) == 256


def test_a_wrong_loss_and_a_foreign_parameter_fail():
    combination = next(verify.combinations(False, [2], ["float32"]))
    losses = verify.reference(combination, 2)
    right = {**asdict(combination), "losses": losses, "owns_values_only": True}
    wrong = {**right, "losses": [losses[0], losses[1] * (1 + 3e-5)]}
    foreign = {**right, "owns_values_only": False}
    judged = verify.judge([right, wrong, foreign, {**asdict(combination), "refused": "why"}], 2)
    assert [result.get("passed") for result in judged] == [True, False, False, None]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--world-sizes", "5"], "--world-sizes"), (["--stages", "4"], "--stages"), (["--steps", "0"], "--steps")],
)
def test_wrong_input_is_named(arguments, named, capsys):
    assert verify.main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_on_real_ranks(capsys):
    assert verify.main(["--world-sizes", "2", "--stages", "2,3", "--dtypes", "float32", "--steps", "2"]) == 0
    assert "16 of 16 combinations passed, 0 were refused" in capsys.readouterr().out
