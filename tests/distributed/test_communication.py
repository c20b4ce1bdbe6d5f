"""Do as many bytes travel as the formula says, nothing at the start that need not, and is offloading only a place?"""

from typing import Any

import pytest
import torch

from sparse_zero.errors import InputError
from sparse_zero.zero.communication import Traffic, ring_bytes, step_communication
from sparse_zero.zero.same_weights import fingerprint
from tests.distributed.spawn import run_ranks

# (stage, placement, accumulation, gradient checkpointing, bf16, entries up to which stage 3 keeps parameters whole)
COMBINATIONS = [
    *[(stage, "inplace", 2, False, False, 0) for stage in (0, 1, 2)],
    (1, "delta", 1, False, True, 0),
    (2, "delta", 2, True, True, 0),
    (3, "delta", 2, True, False, 0),
    (3, "delta", 2, False, False, 3000),
    (3, "inplace", 2, False, True, 0),
    (3, "inplace", 1, True, False, 1000),
]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_of_a_step_are_those_of_the_formula(world_size):
    report = run_ranks("tests.distributed.communication_workers:bytes_of_steps", world_size, combinations=COMBINATIONS)
    assert len(report) == len(COMBINATIONS)
    for entry in report:
        measured = sum(each["bytes"] for each in entry["traffic"].values())
        expected = sum(entry["expected"].values())
        assert measured == pytest.approx(expected, rel=0.01), entry
        assert entry["expected"]["gradients"] > 1e4, entry
        reduced = entry["traffic"].get("reduce_scatter", entry["traffic"]["all_reduce"])["bytes"]
        assert reduced == pytest.approx(entry["expected"]["gradients"], rel=0.01), entry
        if entry["combination"][0] < 3:
            assert entry["expected"]["weights"] == 0
            gathered = entry["traffic"].get("all_gather", {"bytes": 0})["bytes"]
            assert gathered == pytest.approx(entry["expected"]["values"], rel=0.01), entry


def test_nothing_travels_at_the_start_where_all_ranks_have_the_same_weights():
    report = run_ranks("tests.distributed.communication_workers:start_without_broadcast", 2)
    for stage in (2, 3):
        assert report[f"broadcast {stage} True"] > report["weights"]
        assert report[f"broadcast {stage} False"] < 0.01 * report["weights"]
        # What does travel: sums over the weights, and once the values.
        assert report[f"all {stage} False"] < 0.25 * report["weights"]
        assert report[f"equal {stage}"], f"stage {stage}: other losses without the broadcast"
    assert report["different weight"].startswith("layers.2.self_attn.o_proj.weight differs between ranks")
    assert "other parameters on some ranks" in report["different model"]
    assert report["then"] == 1


@pytest.mark.slow
def test_offloading_is_a_place_and_no_other_training():
    report = run_ranks("tests.distributed.communication_workers:offloaded_losses", 2)
    assert len(report) == 4
    for case, (plain, offloaded, continued) in report.items():
        assert plain[0] - plain[-1] > 1e-3, case
        assert offloaded == pytest.approx(plain, rel=1e-6), case
        assert continued == pytest.approx(plain, rel=1e-6), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex64])
def test_fingerprints_see_every_bit_and_every_place(dtype):
    tensor = torch.arange(30).reshape(5, 6).to(dtype)
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.t().contiguous().t())), "not how it lies in memory"
    changed = tensor.clone()
    changed[4, 5] += 1
    assert not torch.equal(before, fingerprint(changed))
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1].clone(), tensor[0, 0].clone()
    assert not torch.equal(before, fingerprint(swapped)), "the same numbers elsewhere"


def test_formula():
    common: dict[str, Any] = {"num_values": 1000, "world_size": 4, "accumulation": 3}
    assert step_communication(stage=0, **common) == {"gradients": 4000, "values": 0, "weights": 0, "constants": 4}
    one = step_communication(stage=1, values_itemsize=2, **common)
    assert (one["gradients"], one["values"]) == (2000, 2000)
    assert step_communication(stage=2, values_itemsize=2, **common)["gradients"] == 3 * 2000
    three = step_communication(stage=3, placement="delta", num_weights=500, kept_weights=100, **common)
    assert (three["gradients"], three["values"]) == (3 * 4000, 3 * 2 * 4000)
    assert three["weights"] == 4 * (3 * 2 * 500 + 100)
    three = step_communication(stage=3, gathered_weights=700, gathered_values=0, kept_values=1000, **common)
    assert three["weights"] == 4 * 3 * 700
    assert three["values"] == 4 * 1000, "kept, and at hand at write-back"
    three = step_communication(stage=3, gathered_values=200, kept_values=900, **common)
    assert three["values"] == 4 * (3 * 200 + 900 + 100)
    assert sum(step_communication(stage=3, num_values=1000, num_weights=500, world_size=1).values()) == 0
    with pytest.raises(InputError, match="stage is 4"):
        step_communication(stage=4, num_values=1, world_size=2)
    traffic = {"all_reduce": Traffic(calls=1, bytes=400), "all_gather": Traffic(calls=2, bytes=80)}
    assert ring_bytes(traffic, 4) == 2 * 400 * 3 / 4 + 80 * 3 / 4
