"""Re-selection during training: every entry goes on as it would have on its own, at any stage and world size."""

import pytest

from tests.distributed.spawn import run_ranks

WORKERS = "tests.distributed.reselection_workers"


@pytest.mark.parametrize(("world_size", "moments"), [pytest.param(1, "zero", marks=pytest.mark.slow), (2, "mean")])
def test_a_changing_selection_equals_a_moment_per_entry_on_the_dense_model(world_size, moments):
    report = run_ranks(f"{WORKERS}:migrations", world_size, moments=moments)
    assert len(report) == 8
    for entry in report:
        place = entry["place"]
        assert entry["losses"] == pytest.approx(entry["expected"], rel=1e-5), place
        assert entry["weight_difference"] <= 2e-5, place
        assert entry["kept_bitwise"], place
        # The engine before, its optimizer and its layers are gone, and so are its hooks.
        assert entry["freed"], place
        assert entry["hooks"] == entry["hooks_of_a_new_engine"], place
        for kept, new, returned, dropped, retired in entry["counts"]:
            assert min(kept, new, dropped, retired) > 0, place
            assert returned < new, place
        assert entry["counts"][0][2] == 0, place
        assert entry["counts"][1][2] > 0, place
        assert entry["num_retired"] == entry["counts"][1][4], place


def test_a_migration_keeps_the_wide_masters_of_a_bf16_run():
    for entry in run_ranks(f"{WORKERS}:migrations_in_bf16", 2):
        assert entry.pop("step") == 3
        place = entry.pop("place")
        assert all(entry.values()), (place, entry)


@pytest.mark.parametrize(("world_size", "decay"), [pytest.param(1, 0.1, marks=pytest.mark.slow), (2, 0.0)])
def test_a_checkpoint_after_a_reselection_continues_bit_for_bit(world_size, decay, tmp_path):
    for entry in run_ranks(f"{WORKERS}:checkpoints", world_size, folder=str(tmp_path), decay=decay):
        assert entry["resumed"] == entry["uninterrupted"], entry
        assert entry["num_retired"] > 0
        assert "sparsify with retired=read_checkpoint(folder).retired" in entry["forgotten"]
        assert max(entry["inplace_difference"], entry["delta_difference"]) <= 1e-5
        if decay == 0.0:
            assert entry["elsewhere"] == pytest.approx(entry["uninterrupted"], rel=1e-5), entry


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "scores", "stages", "number"),
    [(2, ["abs_of_mean"], [0, 1, 2, 3], 5), (1, ["gradient_times_weight", "magnitude"], [1, 3], 6)],
)
def test_what_is_selected_anew_is_what_select_finds_on_the_dense_model(world_size, scores, stages, number):
    found = run_ranks(f"{WORKERS}:reselections", world_size, scores=scores, stages=stages)
    assert len(found) == number
    for entry in found:
        place = entry["place"]
        assert entry["digests"] == entry["expected_digests"], place
        assert len(set(entry["digests"])) == 3, place
        assert entry["losses"] == pytest.approx(entry["expected"], rel=1e-5), place
        for number, (step, changed, before, after, new) in enumerate(entry["checks"]):
            assert (step, changed) == (3 * (number + 1), True), place
            assert 0.0 < before < after <= 1.0, place
            assert new > 0, place
        assert entry["config_is_kept"], place
        assert entry["num_parameters_model"][0] == entry["num_parameters_model"][1], place


def test_a_check_that_finds_enough_captured_and_a_refused_migration_leave_training_as_it_was():
    for entry in run_ranks(f"{WORKERS}:checks_that_change_nothing", 2):
        assert entry["same_engine"], entry
        assert entry["losses"] == entry["expected"], entry
        assert entry["step"] == 7
        assert entry["entries"] == [0, 0, 0]
        errors = entry["errors"]
        assert "the selection is empty" in errors["empty"]
        assert "no weight elsewhere.weight" in errors["another model"]
        assert "the new selection differs between rank 0 and ranks [1]" in errors["one rank only"]
        assert len(errors) == 3


def test_a_check_on_useless_data_is_said_and_training_goes_on():
    (entry,) = run_ranks(f"{WORKERS}:checks_that_cannot_be_made", 2)
    assert entry["same"]
    assert "rank 1" in entry["problem"] or "non-finite" in entry["problem"]
    assert any("could not be checked after step 2" in text for text in entry["said"])
    assert len(entry["losses"]) == 4
    assert entry["losses"][-1] < entry["losses"][0]
