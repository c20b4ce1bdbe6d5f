"""Does calibration by full fine-tuning score what plain full AdamW computes, and give the same model back?"""

import pytest

from tests.distributed.full_calibration_workers import BATCHES_PER_STEP, NUM_BATCHES
from tests.distributed.spawn import run_ranks

WORKERS = "tests.distributed.full_calibration_workers"
CASES = [
    {"stage": 2},
    {"stage": 3},
    {"stage": 2, "offload": True, "accumulate": "per_step", "tie": True},
    {"stage": 3, "offload": True, "accumulate": "per_step", "tie": True, "checkpointing": True},
    {"stage": 2, "keep_weights_in": "elsewhere", "checkpointing": True, "tie": True},
    {"stage": 3, "keep_weights_in": "elsewhere", "offload": True},
]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_scores_and_weights_equal_those_of_a_plain_loop(world_size):
    for entry in run_ranks(f"{WORKERS}:compare", world_size, cases=CASES):
        assert entry["calls"] == NUM_BATCHES // world_size
        assert entry["scores"] <= 1e-5, entry
        assert entry["state"] == [], entry
        assert entry["watched"] > 3, entry
        assert entry["alive"] == [], entry
        if "keep_weights_in" in entry["case"]:
            assert entry["weights"] <= 1e-5, entry
            assert entry["moved"] >= 1e-3, entry
        else:
            assert entry["restored"], entry


def test_bf16_weights_have_fp32_masters_and_accumulated_gradients():
    cases = [{"stage": stage, "bf16": True, "keep_weights_in": "elsewhere"} for stage in (2, 3)]
    for entry in run_ranks(f"{WORKERS}:compare", 2, cases=cases):
        # bf16 keeps 8 bits: a weight of up to 1 that moves by 3e-3 may end at the next number, 2^-8 away.
        assert entry["weights"] <= 2**-8, entry
        assert entry["scores"] <= 2e-2, entry
        assert entry["state"] == [], entry
        assert entry["alive"] == [], entry


def test_training_makes_a_difference_to_scores():
    assert run_ranks(f"{WORKERS}:frozen_difference", 1) > 1e-3


@pytest.mark.parametrize(("stage", "keep"), [(2, False), (3, True)])
def test_the_model_can_be_sparsified_and_trained_afterwards(stage, keep):
    found = run_ranks(f"{WORKERS}:select_and_train", 2, stage=stage, keep=keep)
    assert found["parameters"] > 0
    assert found["losses"][0] == found["losses"][1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_errors_of_all_ranks_leave_the_model_as_it_was(world_size):
    found = run_ranks(f"{WORKERS}:refusals", world_size)
    for name, (kind, message, unchanged) in found.items():
        assert kind == "InputError", (name, message)
        assert unchanged, name
    for stage in (2, 3):
        assert "6 micro-batches, not a multiple" in found[f"cut off {stage}"][1]
        assert f"batches_per_step {BATCHES_PER_STEP}" in found[f"cut off {stage}"][1]
        assert "micro-batch 0 has the non-finite loss inf" in found[f"not finite {stage}"][1]
    assert "no batches" in found["empty"][1]
