"""Invariant 5: a checkpoint continues with the step that would have been, at any world size, stage and placement."""

import pytest

from tests.distributed.spawn import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def written(folder):
    return run_ranks("tests.distributed.workers:write_checkpoints", 2, folder=str(folder))


def test_invariant_5_resume_is_bitwise_at_equal_configuration(written):
    assert [entry["stage"] for entry in written] == [0, 1, 2, 3]
    for entry in written:
        assert entry["resumed"] == entry["uninterrupted"], entry
        assert entry["extra"] == {"step": 3}
        assert entry["optimizer_step"] == 3


def test_invariant_5_resume_is_bitwise_in_bf16(tmp_path):
    report = run_ranks("tests.distributed.workers:write_checkpoints", 2, folder=str(tmp_path), bf16=True)
    assert [entry["stage"] for entry in report] == [0, 1, 2, 3]
    for entry in report:
        assert entry["resumed"] == entry["uninterrupted"], entry
        assert entry["uninterrupted"] != entry["before"][:2]


def test_invariant_5_resume_at_another_world_size_and_stage(written, folder):
    report = run_ranks("tests.distributed.workers:resume_elsewhere", 1, folder=str(folder), decay=0.1)
    expected = {entry["stage"]: entry["uninterrupted"] for entry in written}
    assert len(report) == 16
    for entry in report:
        if entry["stored"][1] == entry["into"][1]:
            assert entry["error"] is None, entry
            assert entry["losses"] == pytest.approx(expected[entry["stored"][0]], rel=1e-5), entry
        else:
            # Weight decay means something else there.
            assert "weight decay means something else" in entry["error"], entry


def test_invariant_5_the_other_placement_continues_alike_without_decay(tmp_path):
    losses = run_ranks("tests.distributed.workers:checkpoints_without_decay", 1, folder=str(tmp_path))
    report = run_ranks("tests.distributed.workers:resume_elsewhere", 2, folder=str(tmp_path), decay=0.0)
    for entry in report:
        assert entry["error"] is None, entry
        assert entry["losses"] == pytest.approx(losses[entry["stored"][0]], rel=1e-5), entry


def test_a_snapshot_is_apart_from_the_engine_and_random_streams_go_on(tmp_path):
    report = run_ranks("tests.distributed.checkpoint_workers:snapshots", 2, folder=str(tmp_path))
    assert [entry["stage"] for entry in report] == [0, 2, 3]
    for entry in report:
        assert entry["is_kept"] == [True, False]
        assert entry["same"], entry
        assert entry["resumed"] == entry["uninterrupted"], entry
        assert entry["extra"] == {"step": 3}
        assert entry["config"] == {"training": {"steps": 5}}
        assert entry["rng"] == {"num_ranks": 2, "names": ["numpy", "python", "torch"]}


def test_offloading_may_change_between_starts(tmp_path):
    report = run_ranks("tests.distributed.checkpoint_workers:offloading", 2, folder=str(tmp_path))
    assert len(report) == 4
    for entry in report:
        assert entry["same"] == entry["uninterrupted"], entry
        assert entry["other"] == pytest.approx(entry["uninterrupted"], rel=1e-5), entry


def test_what_the_optimizer_does_not_count_goes_on(tmp_path):
    found = run_ranks("tests.distributed.checkpoint_workers:counters", 2, folder=str(tmp_path))
    assert found["step"] == 3
    assert found["same_values"]
    assert found["resumed"] == found["uninterrupted"]
    assert found["rates"][0] == found["rates"][1]


def test_a_rank_that_cannot_read_fails_all_and_changes_nothing(tmp_path):
    found = run_ranks("tests.distributed.checkpoint_workers:unreadable", 2, folder=str(tmp_path))
    assert found["errors_of_rank_zero"] == {"folder": "PeerError: rank 1 failed", "whole": "PeerError: rank 1 failed"}
    assert found["after"] == found["expected"]


def test_ranks_continue_from_what_all_of_them_have_whole(tmp_path):
    found = run_ranks("tests.distributed.checkpoint_workers:starts", 2, folder=str(tmp_path))
    assert found["step"] == 2
    (missing, damaged) = found["told"]
    assert "step-000006: it is missing or another one where rank 1 see" in missing
    assert "step-000004: " in damaged
    assert "moments.safetensors has 0 bytes" in damaged
    assert "put output.folder on a file system that all nodes share" in found["blind"]


def test_an_engine_in_bf16_goes_on_from_all_that_an_adapter_has_learned(tmp_path):
    report = run_ranks("tests.distributed.checkpoint_workers:continued_adapters", 2, folder=str(tmp_path))
    assert len(report) == 12
    for entry in report:
        # Rounded to bf16, most of it would be gone.
        assert entry["hidden"] > 0.5, entry
        assert entry["same"], entry
        assert entry["rounded"], entry
        assert entry["stands"], entry
    first = report[0]["losses"]
    for entry in report:
        assert entry["losses"] == pytest.approx(first, rel=5e-3), entry
