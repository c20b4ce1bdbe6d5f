"""What holds on several real ranks: equal selections, adapters, skipped steps, write-back, refusals."""

import pytest

from tests.distributed.spawn import run_ranks


def test_invariant_4_selections_do_not_depend_on_the_world_size():
    reports = {size: run_ranks("tests.distributed.workers:select_on_ranks", size) for size in (1, 2, 3)}
    assert reports[1]["digests"] == reports[2]["digests"] == reports[3]["digests"]
    assert len(set(reports[1]["digests"].values())) == 4
    assert reports[1]["disagreement"] == ""
    assert reports[2]["disagreement"] == (
        "the test's text differs between rank 0 and ranks [1]: every rank must get equal input"
    )
    assert "ranks [1, 2]" in reports[3]["disagreement"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_and_merge_reproduce_what_training_used(world_size, tmp_path):
    report = run_ranks("tests.distributed.workers:adapters", world_size, folder=str(tmp_path))
    assert [entry["stage"] for entry in report] == [0, 1, 2, 3]
    for entry in report:
        other = "delta" if entry["placement"] == "inplace" else "inplace"
        assert entry[f"{entry['placement']}_difference"] == 0.0, entry
        assert entry[f"{other}_difference"] <= 1e-5, entry
        assert entry["inplace_trainable"] == entry["delta_trainable"] == 0
        assert entry["merged_equals_training"], entry


def test_adapters_hold_the_fp32_masters_of_a_bf16_run(tmp_path):
    for entry in run_ranks("tests.distributed.workers:adapters", 2, folder=str(tmp_path), bf16=True):
        assert entry[f"{entry['placement']}_difference"] == 0.0, entry
        # Under delta the sum is rounded once.
        assert entry["merged_equals_training"] or entry["placement"] == "delta", entry


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_non_finite_gradient_skips_the_step_on_all_ranks(world_size):
    for entry in run_ranks("tests.distributed.workers:non_finite_steps", world_size):
        flags = {name: value for name, value in entry.items() if name != "stage"}
        assert all(flags.values()), entry


def test_initialize_refuses_what_would_not_train_as_asked():
    found = run_ranks("tests.distributed.workers:refusals", 1)
    assert "no trainable values" in found["dense"]
    assert "lm_head.weight requires grad" in found["extra"]
    assert "is 'nvme' with placement 'inplace', which writes into the base" in found["disk"]
    assert "is set with placement 'inplace', which writes into the weights" in found["quantized"]
    assert "(training.precision fp16) at zero stage 0" in found["stage0"]


def test_values_are_written_back_once_per_accumulation_boundary():
    report = run_ranks("tests.distributed.workers:write_back_calls", 2)
    assert report == {"at_start": 1, "during_training": 4, "weights_equal_values": 1}
