"""Does the elastic matrix meet every pair, hold on real ranks, and would it notice a wrong continuation?"""

import pytest

from scripts import verify_elastic as verify
from tests.distributed.spawn import run_ranks


def test_every_configuration_is_there():
    assert len(set(verify.configurations([1, 2, 3, 4], [0, 1, 2, 3], False))) == 32
    offloading = list(verify.configurations([2], [0, 1, 2, 3], True))
    assert len(offloading) == 14
    assert not any(each.offload for each in offloading if each.stage == 0)
    assert len({each.name for each in offloading}) == 14


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What is saved on two ranks at stage 2, and continued there; other numbers of ranks are a matter of minutes."""
    return run_ranks(
        "scripts.verify_elastic:save_and_load", 2, folder=str(tmp_path_factory.mktemp("elastic")), stages=[2]
    )


def test_checkpoints_continue_in_their_own_and_in_the_other_placement(small):
    pairs = verify.judge(*small)
    assert len(pairs) == 4
    assert all(pair["passed"] for pair in pairs), pairs
    assert [pair["bitwise"] for pair in pairs if pair["from"] == pair["into"]] == [True, True]


def test_a_wrong_loss_and_a_resumed_run_that_is_not_the_same_fail(small):
    saved, loaded = small
    for pair in loaded:
        wrong = {**pair, "losses": [pair["losses"][0], pair["losses"][1] * (1 + 3e-5)]}
        assert not verify.judge(saved, [wrong])[0]["passed"]
        inexact = {**pair, "exact": False}
        same_placement = pair["from"].split("-")[1] == pair["into"].split("-")[1]
        assert verify.judge(saved, [inexact])[0]["passed"] == (not same_placement)
        other = {**pair, "values": "0"}
        assert verify.judge(saved, [other])[0]["passed"] == (pair["from"] != pair["into"])


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--world-sizes", "5"], "--world-sizes"), (["--stages", "4"], "--stages")]
)
def test_wrong_input_is_named(arguments, named, capsys):
    assert verify.main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_on_real_ranks(capsys):
    assert verify.main(["--world-sizes", "1,2", "--stages", "3", "--offload"]) == 0
    assert "64 of 64 pairs passed" in capsys.readouterr().out
