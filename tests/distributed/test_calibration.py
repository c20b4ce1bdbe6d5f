"""Invariant 4 for scores: equal on all ranks, independent of their number and of whether weights are sharded."""

import re
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks

WORKERS = "tests.distributed.calibration_workers"
# Not a multiple of 2, 3 or 4: the last round is not full.
NUM_BATCHES = 7


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    """Scores that one rank computes, by number of micro-batches."""
    folder = str(tmp_path_factory.mktemp("alone"))
    found = {number: run_ranks(f"{WORKERS}:scores_on_ranks", 1, number=number, folder=folder) for number in (2, 7)}
    assert all(each["strips"] < 1e-6 for each in found.values())
    return found


# Two micro-batches on three ranks: one of them has none.
@pytest.mark.parametrize(("world_size", "number"), [(2, NUM_BATCHES), (3, NUM_BATCHES), (4, NUM_BATCHES), (3, 2)])
def test_invariant_4_scores_do_not_depend_on_the_world_size(world_size, number, alone, tmp_path):
    found = run_ranks(f"{WORKERS}:scores_on_ranks", world_size, number=number, folder=str(tmp_path))
    # The sums of strips are those of gradients that were formed and accumulated in fp32, relative to the sums of |g|.
    assert found["strips"] < 1e-6
    assert found["scores"].keys() == alone[number]["scores"].keys()
    for variant, of_key in found["scores"].items():
        # Sums of dense gradients in fp32 depend on what was added first; everything else is added up in fp64.
        in_fp32 = variant in ("mean_of_abs", "everything")
        for key, scores in of_key.items():
            got, wanted = torch.tensor(scores).double(), torch.tensor(alone[number]["scores"][variant][key]).double()
            difference = float((got - wanted).abs().max() / wanted.abs().max())
            assert difference <= (1e-6 if in_fp32 else 1e-13), (variant, key)
            assert torch.equal(got.argsort(descending=True), wanted.argsort(descending=True)), (variant, key)


@pytest.mark.parametrize(
    ("world_size", "number", "checkpointing"), [(2, 5, "non-reentrant"), (3, 5, "reentrant"), (3, 2, "off")]
)
def test_sharded_weights_give_the_same_scores(world_size, number, checkpointing, tmp_path):
    found = run_ranks(
        f"{WORKERS}:sharded_scores", world_size, number=number, checkpointing=checkpointing, folder=str(tmp_path)
    )
    assert len(found) == 9
    assert all(difference <= 1e-6 for difference in found.values()), found


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_error_on_one_rank_ends_all_of_them(world_size, tmp_path):
    found = run_ranks(f"{WORKERS}:errors_on_ranks", world_size, folder=str(tmp_path))
    third = str(2 % world_size)  # The rank of micro-batch 2.
    for case, message in (
        ("nan", "InputError: calibration micro-batch 2 has the non-finite loss nan"),
        ("exception", "ArithmeticError: no third micro-batch"),
        ("nan, sharded", "InputError: calibration micro-batch 2 has the non-finite loss nan"),
        ("folder", "InputError: selection.accumulator_folder is"),
    ):
        where = "1" if case == "folder" else third
        assert found[case][where].startswith(message), (case, found[case])
        others = {text for rank, text in found[case].items() if rank != where}
        assert others == {f"PeerError: rank {where} failed"}, (case, found[case])
    # In layer 0 or below it, on the rank that met it.
    texts = sorted(found["gradient"].values())
    assert re.match(
        r"InputError: calibration micro-batch \d+ has a non-finite gradient of (embed|layers\.0)", texts[0]
    ), texts
    assert all(text.startswith("PeerError") for text in texts[1:])
    texts = sorted(found["rule"].values())
    assert texts[0].startswith("ArithmeticError: a rule that fails")
    assert all(text.startswith("PeerError") for text in texts[1:])


# ZeRO-3 shards the weights; before it, each rank has them.
@pytest.mark.parametrize("stage", [0, 3])
def test_what_one_rank_alone_raises_ends_both_ranks(stage):
    found = run_ranks(f"{WORKERS}:lone_failures", 2, stage=stage)
    expected = {
        "pattern": r"InputError: .*nowhere",
        "score": r"InputError: .*missing",
        "rule of weights": "ArithmeticError: a rule of weights on rank 1",
        "rule of gradients": "ArithmeticError: a rule of gradients on rank 1",
        "data": "ArithmeticError: data on rank 1",
    } | ({} if stage else {"full": "ArithmeticError: a rule of gradients on rank 1"})
    assert found.keys() == expected.keys()
    for case, message in expected.items():
        assert found[case][0] == "PeerError: rank 1 failed", (case, found[case])
        assert re.match(message, found[case][1]), (case, found[case])


def test_ranks_of_one_host_share_its_memory():
    found = run_ranks(f"{WORKERS}:memory_on_ranks", 2)
    assert found["ranks"] == 2
    assert re.match(
        r"InputError: accumulators of 1 weights.*on the host of rank 0, shared by 2 ranks", found["said"][0]
    )
    assert found["said"][1] == "PeerError: rank 0 failed"


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_accumulator_reaches_its_owner_only(world_size, tmp_path):
    found = run_ranks(f"{WORKERS}:accumulators_on_ranks", world_size, folder=str(tmp_path))
    assert found["right"] == [True] * (2 * world_size)
    assert found["elsewhere"] == [True] * (2 * world_size * (world_size - 1))
