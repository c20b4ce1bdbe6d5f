"""Does a model in shards, whose frozen linears keep nothing of their inputs, get the scores of a whole one?"""

from pathlib import Path

import pytest

from tests.distributed.spawn import run_ranks
from tests.models.tiny import tiny_llama


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_base_in_shards_is_scored_as_a_whole_one(checkpointing: bool, tmp_path: Path) -> None:
    tiny_llama(layers=2).save_pretrained(tmp_path)
    found = run_ranks(
        "tests.distributed.sharded_calibration_workers:scores", 2, folder=str(tmp_path), checkpointing=checkpointing
    )
    assert found["difference"] < 1e-5
    # All of them, and none afterwards.
    assert (found["frozen"], found["left"]) == (found["linears"], 0)


def test_a_loss_that_is_of_no_use_on_one_rank_keeps_none_waiting(tmp_path: Path) -> None:
    tiny_llama(layers=1).save_pretrained(tmp_path)
    first, second = run_ranks("tests.distributed.sharded_calibration_workers:refused", 2, folder=str(tmp_path))
    assert first == ["PeerError: rank 1 failed"] * 3 + ["nothing"]
    for said, part in zip(second, ("returned no loss", "shape (2,)", "depends on none", "nothing"), strict=True):
        assert part in said
