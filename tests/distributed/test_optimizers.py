"""Every optimizer trains values at every stage as it trains entries of a dense model, and goes on from a checkpoint."""

import importlib.util

import pytest

from tests.distributed.spawn import run_ranks

STEPS = 20
NAMES = ["adamw", "adafactor", "muon"]
# DeepSpeed compiles these for the machine when they are first used.
COMPILED = ["deepspeed_adamw", "lion"]
STATES = {
    "adamw": ["exp_avg", "exp_avg_sq"],
    "deepspeed_adamw": ["exp_avg", "exp_avg_sq"],
    "lion": ["exp_avg"],
    "adafactor": ["variance"],
    "muon": ["exp_avg", "exp_avg_sq", "momentum_buffer"],
}


def check_resumed(name, resumed, uninterrupted):
    """The step after a resume is the step that would have been, bit for bit.

    DeepSpeed's CPUAdam multiplies powers of the betas up from step to step, and computes them anew after a resume.
    """
    assert resumed == (pytest.approx(uninterrupted, rel=1e-6) if name == "deepspeed_adamw" else uninterrupted), name


def check_report(report, names):
    assert [entry["combination"][0] for entry in report] == [name for name in names for _ in range(4)]
    for entry in report:
        name, combination = entry["combination"][0], entry["combination"]
        # Adafactor's steps are relative to the values, which start at zero under delta.
        assert entry["change"] > (1e-4 if combination[::2] == ["adafactor", "delta"] else 5e-3), combination
        assert entry["loss_difference"] <= 1e-6, combination
        assert entry["weight_difference"] <= 1e-6, combination
        check_resumed(name, entry["resumed"], entry["uninterrupted"])
        assert entry["step"] == STEPS // 2, combination
        assert entry["optimizers"] == [name.removeprefix("deepspeed_")], combination
        assert entry["states"] == STATES[name], combination


def check_elsewhere(report, written):
    expected = {tuple(entry["combination"][:2]): entry["uninterrupted"] for entry in written}
    for entry in report:
        assert entry["losses"] == pytest.approx(expected[entry["name"], entry["stored"]], rel=1e-5), entry
        name, other = (each.removeprefix("deepspeed_") for each in (entry["name"], entry["other"]))
        assert f"trained with the optimizer '{other}', and the engine has '{name}'" in entry["error"], entry


@pytest.mark.parametrize(
    "names", [pytest.param(NAMES, id="torch"), pytest.param(COMPILED, id="deepspeed", marks=pytest.mark.slow)]
)
def test_every_optimizer_equals_the_dense_reference_and_resumes(tmp_path, names):
    written = run_ranks(
        "tests.distributed.optimizer_workers:against_references", 2, folder=str(tmp_path), names=names, steps=STEPS
    )
    check_report(written, names)
    elsewhere = run_ranks(
        "tests.distributed.optimizer_workers:resume_elsewhere", 1, folder=str(tmp_path), names=names, steps=STEPS
    )
    check_elsewhere(elsewhere, written)
    if names == COMPILED:
        check_offloaded(
            run_ranks("tests.distributed.optimizer_workers:offloaded_states", 2, folder=str(tmp_path), names=names)
        )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quant")
def test_states_of_8_bits_are_saved_in_fp32_and_quantized_again(tmp_path):
    report = run_ranks("tests.distributed.optimizer_workers:eight_bit", 2, folder=str(tmp_path))
    for entry in report:
        assert entry["has_8_bits"], entry
        assert entry["left_wide"] == [], entry
        assert entry["states"] == ["state1", "state2"], entry
        assert entry["distance_to_adamw"] < 0.05, entry
        assert entry["quantized_again"] < 0.02, entry
        assert entry["distance_after_resume"] < 0.02, entry


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_ranks("tests.distributed.optimizer_workers:all_in_one_world", 2, folder=str(folder))


def test_an_overflow_lowers_the_loss_scale_only_and_a_checkpoint_keeps_it(world):
    found = world["loss_scale"]
    assert found["unchanged"]
    assert not found["applied"]
    # Two overflows in a row: one is forgiven, the other halves the scale; after some good steps it doubles again.
    assert found["scales"] == [2.0**9, 2.0**10]
    assert found["stored"] == found["loaded"]
    assert found["stored"] == {"cur_scale": 2.0**9, "cur_iter": 4, "last_overflow_iter": 3, "cur_hysteresis": 1}
    assert found["resumed"] == found["uninterrupted"]


def test_optimizers_that_are_not_ours(world):
    found = world["other_optimizers"]
    for name in ("amsgrad", "sgd"):
        uninterrupted, resumed = found[name]["losses"]
        assert resumed == uninterrupted, name
    assert found["sgd"]["algorithm"] == "sgd"
    assert (
        "Factored has a state row_var that is neither its step counter nor a number for each" in found["factored_error"]
    )


def test_checkpoints_that_name_no_optimizer_are_adams(world):
    found = world["old_checkpoint"]
    assert found["resumed"] == found["uninterrupted"]
    assert "trained with the optimizer 'adamw', and the engine has 'adafactor'" in found["error"]


def check_offloaded(report):
    for entry in report:
        assert entry["losses"] == pytest.approx(entry["plain"], rel=1e-6), entry
        check_resumed(entry["combination"][0], entry["resumed"], entry["losses"][3:])


def test_states_in_the_hosts_memory_are_saved_and_loaded(world):
    assert len(world["offloaded"]) == 6
    check_offloaded(world["offloaded"])


def test_another_selection_takes_over_the_state_of_what_it_keeps(world):
    found = world["migrations"]["adafactor"]
    assert min(found["counts"]) > 50
    assert all(found["same"])
    assert all(found["started"])
    assert found["states"] == ["variance"]
    assert all(loss < 4.5 for loss in found["losses"])
    # Where an entry would have to go from a block to a row, nothing has changed.
    assert "muon keeps another state for blocks than for other kinds" in world["migrations"]["muon"]["error"]
    assert all(loss < 4.5 for loss in world["migrations"]["muon"]["goes_on"])


def test_stochastic_rounding_is_equal_on_all_ranks_and_resumes(world):
    assert [entry["stage"] for entry in world["stochastic_rounding"]] == [0, 1, 2, 3]
    for entry in world["stochastic_rounding"]:
        # Stage 0 in bf16 has taken as many steps, and decayed as often; stage 3 sums bf16 gradients in another order.
        assert entry["masters_of_stage_0"] < (1e-6 if entry["stage"] < 3 else 0.05), entry
        assert entry["as_expected"], entry
        assert entry["not_nearest"] > 50, entry
        assert entry["written"], entry
        assert entry["equal_on_all_ranks"], entry
        assert entry["same_weights"], entry
        assert entry["resumed"] == entry["uninterrupted"], entry
