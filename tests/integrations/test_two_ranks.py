"""Do other trainers, on two ranks and on one, take the steps that our own loop takes, and go on from their checkpoints?"""

import importlib.util
from pathlib import Path

import pytest

from tests.integrations.workers import STEPS, accelerate_losses, continued, trainer_run, weights_are_values

# fp32, relative: invariant 3.
TOLERANCE = 1e-5
RUNS = ("stage 0", "stage 2", "stage 3 inplace", "stage 3 delta", "data parallel")
# All that is in a Trainer's checkpoint, beside the adapter.
FILES = [
    "checkpoint.json",
    "manifest.json",
    "masters.safetensors",
    "moments.safetensors",
    "random.safetensors",
    "selection.safetensors",
    "trainer_state.json",
    "training_args.json",
]


def check_losses(found: list[float], own: list[float]) -> None:
    assert own[-1] < own[0] - 0.3, "training has an effect"
    assert found == pytest.approx(own, rel=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_trainer_equals_our_own_loop(runs, name):
    run = runs["trainer"][name]
    own = runs["own"][run["placement"]]
    check_losses(run["losses"], own)
    assert run["written_back"] == (run["placement"] == "inplace")
    # The second half once more, by another Trainer that starts from the checkpoint between.
    assert run["resumed_losses"] == run["losses"], "bit for bit"
    assert run["sharded_at_first"] == (name == "stage 3 delta")
    assert run["num_groups"] == (3 if name == "stage 3 inplace" else 1 if "stage" in name else 2)


@pytest.mark.parametrize("name", RUNS)
def test_trainer_stores_a_checkpoint_and_an_adapter(runs, name):
    run = runs["trainer"][name]
    assert run["stored"] == FILES
    assert run["adapter_difference"] <= (0.0 if run["placement"] == "inplace" else 1e-5)
    assert run["final_adapter"]


@pytest.mark.parametrize("name", ["stage 2", "stage 3 inplace", "stage 3 delta", "data parallel"])
def test_trainer_continues_at_another_stage(runs, name):
    run = runs["trainer"][name]
    assert run["continued"] == pytest.approx(run["losses"][3:], rel=TOLERANCE)


def check_random(run: dict[str, list[float]]) -> None:
    """Dropout, order and rates go on as if nothing had happened."""
    assert run["resumed"] == run["whole"], "bit for bit"
    assert run["whole"] != pytest.approx(run["without dropout"], rel=1e-3), "dropout has an effect"
    assert len(set(run["rates"])) > 2, "rates change"


def test_trainer_goes_on_with_what_is_random_on_each_rank(runs):
    check_random(runs["trainer"]["random"])


def test_trainer_loads_the_best_checkpoint(runs):
    best = runs["trainer"]["stage 2"]["best"]
    assert best["best_is_first"]
    assert best["values_had_moved_on"]
    assert best["values_are_best"]
    assert best["written_back"]


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install 'sparse-zero[trl]'"
)
def test_sft_trainer_equals_our_own_loop(runs):
    run = runs["sft"]
    check_losses(run["losses"], runs["own"]["inplace"])
    assert run["resumed_losses"] == run["losses"], "bit for bit"
    assert run["stored"] == FILES


def test_accelerate_equals_our_own_loop(runs):
    """Three steps at stage 2, three at stage 3, with save_state and load_state between."""
    run = runs["accelerate"]
    check_losses(run["losses"], runs["own"]["inplace"])
    assert run["stored"] == [name for name in FILES if not name.startswith("train")]
    assert run["inplace_in_shards"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ulysses_equals_one_process(runs, stage):
    run = runs["splits"][f"ulysses {stage}"]
    assert run["change"] > 0.05
    assert run["loss_difference"] <= TOLERANCE
    assert run["difference"] <= 1e-6
    assert run["written_back"]


def test_ulysses_in_the_trainer_equals_one_process(runs):
    run = runs["splits"]["trainer 3"]
    assert run["change"] > 0.05
    assert run["loss_difference"] <= TOLERANCE
    assert run["difference"] <= 1e-6


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("autotp", "autotp_size (or tp_model_init's tp_size) is 2: AutoTP puts sliced linears"),
        ("tp_model_init", "autotp_size (or tp_model_init's tp_size) is 2: AutoTP puts sliced linears"),
        ("autoep", "expert_parallel.enabled is true: AutoEP swaps the experts"),
        ("reduce_scatter", "reduce_scatter is false at stage 3 with sequence parallelism"),
        ("trainer 2", "sequence parallelism over 2 ranks at zero stage 2: the Trainer's gradients would be 2 times"),
    ],
)
def test_splits_that_cannot_work_are_refused(runs, what, message):
    assert message in runs["splits"][what]


def test_what_a_trainer_cannot_do_under_deepspeed_is_refused(runs):
    assert (
        "optimizers=(...) is dropped by the Trainer under DeepSpeed: pass optimizer_cls_and_kwargs="
        in (runs["refusals"]["optimizers"])
    )
    assert "tensor_parallel.autotp_size" in runs["refusals"]["autotp"]


def test_trainer_without_deepspeed_equals_our_own_loop(runs, tmp_path):
    run = trainer_run(tmp_path, "inplace")
    assert run["losses"] == pytest.approx(runs["own"]["inplace"], rel=1e-5)
    assert run["resumed_losses"] == run["losses"], "bit for bit"
    assert run["stored"] == FILES
    assert run["written_back"]
    assert run["adapter_difference"] == 0.0


def test_another_number_of_ranks_continues(runs, tmp_path):
    """What two ranks have trained at stage 2 and 3, in this process and without DeepSpeed."""
    for source, placement in (("stage 2", "inplace"), ("stage 3 delta", "delta")):
        checkpoint = Path(runs["folder"]) / source / "checkpoint-3"
        losses = continued(tmp_path / source, checkpoint, placement)  # type: ignore[arg-type]
        assert losses == pytest.approx(runs["trainer"][source]["losses"][3:], rel=1e-5)


def test_accelerate_without_deepspeed_equals_our_own_loop(runs, tmp_path):
    first, model = accelerate_losses(tmp_path / "state", 0, 3, stage=None)
    assert weights_are_values(model)
    second, _ = accelerate_losses(tmp_path / "state", 3, STEPS, stage=None)
    assert first + second == pytest.approx(runs["own"]["inplace"], rel=1e-5)
