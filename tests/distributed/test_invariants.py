"""Invariants 1 and 3: only values train, and any distributed run equals AdamW on the dense model."""

import pytest

from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_invariants_1_and_3_every_combination_equals_the_dense_reference(world_size):
    report = run_ranks("tests.distributed.workers:invariants_1_and_3", world_size, steps=5)
    assert len(report) == 32
    for entry in report:
        combination = entry["combination"]
        # Invariant 3: the losses and the trained weights are those of a dense single-process AdamW.
        assert entry["effect_of_training"] > 1e-2, combination
        assert entry["loss_difference"] <= 1e-5, combination
        assert entry["weight_difference"] <= 2e-5, combination
        # Invariant 1: nothing else requires grad, and the optimizer owns nothing else (but padding).
        assert entry["requiring_grad"] == entry["num_parameters"], combination
        assert entry["dense_gradients"] == 0, combination
        excess = entry["optimizer_elements"] - entry["num_parameters"]
        assert 0 <= excess <= 32 * world_size * entry["num_groups"], combination


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_invariant_1_only_values_and_their_gradients_travel(stage):
    report = run_ranks("tests.distributed.workers:communicated_bytes", 2, stage=stage)
    assert report["calls"] > 0
    # The values' gradients once, and from stage 1 on the updated values once; norms, flags and padding besides.
    expected = report["value_bytes"] * (1 if stage == 0 else 2)
    assert expected <= report["bytes"] <= 1.1 * expected + 512
    assert report["dense_bytes"] > 5 * report["value_bytes"]
