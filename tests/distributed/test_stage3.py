"""Stage 3: do values train in place and added, in weights and hooked parameters that no rank ever holds whole?"""

import pytest

from tests.distributed.spawn import run_ranks

WORKERS = "tests.distributed.stage3_workers"
# DeepSpeed's own settings, with which everything so small stays whole between steps.
PERSISTENT = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


def check_against_dense(world_size: int, *, tie: bool, persistent: bool = False, **settings: object) -> None:
    """Both placements, with and without accumulation and gradient checkpointing."""
    report = run_ranks(f"{WORKERS}:against_dense", world_size, tie=tie, settings=settings)
    assert len(report) == 4
    for entry in report:
        case = entry["case"]
        assert entry["effect"] > 1e-2, case
        assert entry["loss_difference"] <= 1e-5, case
        assert entry["weight_difference"] <= 1e-6, case
        # Inplace all ranks' shards together are, bit for bit, what the masters say; delta leaves them as they were.
        assert entry["written"], case
        assert entry["untouched"], case
        assert (entry["sharded"] == 0) == persistent, case
        assert entry["secondary"] == ("zero_hpz_partition_size" in settings), case
        # Of each of the values as much padding as makes it a multiple of the ranks.
        assert 0 <= entry["optimizer_elements"] - entry["num_parameters"] < world_size * entry["num_values"], case


def test_both_placements_equal_the_dense_reference_in_parameters_of_every_kind():
    check_against_dense(2, tie=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {}),
        (3, {}),
        (2, {"stage3_param_persistence_threshold": 0}),
        (2, PERSISTENT),
        (2, {"offload_param": {"device": "cpu"}}),
        (2, {"stage3_allgather_sequential": True}),
        (2, {"stage3_use_all_reduce_for_fetch_params": True}),
        # Second shards, in groups of two ranks, which forward gathers from.
        (4, {"zero_hpz_partition_size": 2}),
    ],
    ids=["alone", "three", "none_whole", "persistent", "offloaded", "sequential", "all_reduce", "hpz"],
)
def test_every_way_to_hold_shards_equals_the_dense_reference(world_size, settings):
    check_against_dense(world_size, tie=False, persistent=settings is PERSISTENT, **settings)


@pytest.mark.slow
def test_parameters_train_however_they_are_read():
    names = ["tied", "functional", "listed", "attention", "recurrent", "checks_within"]
    for entry in run_ranks(f"{WORKERS}:ways_to_read", 2, names=names):
        assert entry["effect"] > 0.1, entry
        assert entry["difference"] <= 1e-5, entry


def test_no_gathered_parameter_is_kept_between_forward_and_backward():
    for entry in run_ranks(f"{WORKERS}:kept_between_forward_and_backward", 2):
        placement, with_notes = entry["case"]
        # The embedding for itself and as the head, and the experts; under delta each with a copy.
        assert entry["made"] == (3 if placement == "inplace" else 6), entry
        # Without notes the head and the experts keep theirs.
        assert entry["alive"] == (0 if with_notes else 2), entry


def test_frozen_linears_keep_nothing_of_their_input():
    found = run_ranks(f"{WORKERS}:kept_by_frozen_linears", 2)
    # The first needs all of its input; the last one, which DeepSpeed's function computes, keeps what nobody needs.
    assert found["kept"] == [20, 28]
    assert found["same"]
    assert found["names"] == ["FrozenLinear", "Linear", "_Own"]


def test_a_write_back_gathers_the_values_and_no_weight():
    found = run_ranks(f"{WORKERS}:written_into_shards", 2)
    assert found["spoiled"] == 13
    assert found["restored"]
    assert found["available"] == found["moved"] == []
    assert found["calls"] == 1
    assert found["value_bytes"] <= found["bytes"] <= found["value_bytes"] + found["padding_bytes"]
    assert found["dense_bytes"] > 5 * found["bytes"]
    assert found["same"]
    assert found["fewest_buckets"] <= found["buckets"]
    # Two int32 for each value, on the rank whose shard it is written into.
    assert found["index_bytes"] == 2 * found["value_bytes"]


def test_checkpoints_adapters_merge_and_sharded_bases_at_stage_3(tmp_path):
    found = run_ranks(f"{WORKERS}:there_and_back", 2, folder=str(tmp_path))
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    assert found["written"]
    assert found["adapter_difference"] <= 1e-6
    assert found["adapters_equal"]
    for placement in ("inplace", "delta"):
        entry = found[placement]
        # Merged: what trained, bit for bit. Unmerged: the base. Made sparse in its shards: the same training again.
        assert all(entry.values()), (placement, entry)
