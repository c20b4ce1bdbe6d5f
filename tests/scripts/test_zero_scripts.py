"""Do the scripts that measure memory and communication under ZeRO run, and do they compute what they print?"""

import json
from pathlib import Path

import pytest

from scripts import bench_zero_memory, measure_communication
from scripts.zero_variants import Settings
from sparse_zero.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora-2", "delta-3"])
def test_memory_is_measured_on_fresh_ranks(tmp_path: Path, variant: str) -> None:
    out = tmp_path / "numbers.json"
    arguments = ["--small", "--steps", "1", "--variants", f"full-2,{variant}", "--json", str(out)]
    assert bench_zero_memory.main(arguments) == 0
    found = json.loads(out.read_text())
    assert list(found["variants"]) == ["full-2", variant]
    assert found["variants"][variant]["trained"] == 10240
    for row in found["variants"].values():
        assert row["life_bytes"] >= row["training_bytes"] >= row["ready_bytes"] > 10**8
    assert [len(each["ranks"]) for each in found["ranks"].values()] == [2, 2]


def test_memory_is_that_of_the_rank_that_needs_most() -> None:
    def ranks(*peaks: int) -> list[dict[str, int]]:
        return [{"ready_bytes": 1, "training_bytes": peak, "life_bytes": peak + 1} for peak in peaks]

    found = {"full-2": {"trained": 9, "ranks": ranks(8, 10)}, "delta-3": {"trained": 3, "ranks": ranks(4, 3)}}
    summary = bench_zero_memory.summarize(found)
    assert summary["delta-3"] == {
        "trained": 3, "ready_bytes": 1, "training_bytes": 4, "life_bytes": 5, "of_full": 0.4,
    }  # fmt: skip
    assert "of_full" not in bench_zero_memory.summarize({"delta-3": found["delta-3"]})["delta-3"]


@pytest.mark.slow
def test_communication_is_counted_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    arguments = ["--small", "--variants", "full-0,lora-2,inplace-2,delta-3", "--json", str(out)]
    assert measure_communication.main(arguments) == 0
    found = json.loads(out.read_text())["variants"]
    for name, row in found.items():
        assert row["measured_bytes"] == pytest.approx(row["formula_bytes"], rel=0.01), name
        assert row["sent_bytes"] <= row["measured_bytes"], name
    assert found["lora-2"]["formula"]["gradients"] == found["inplace-2"]["formula"]["gradients"]
    assert found["full-0"]["formula"]["gradients"] > 5 * found["inplace-2"]["formula"]["gradients"]
    assert found["delta-3"]["formula"]["weights"] > 0
    assert "inplace-2" in capsys.readouterr().out


def test_blocks_that_lora_cannot_match_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"--lora 3 trains 983040 parameters, which is no number of whole blocks of 300"
    ):
        Settings(lora=3, block_size=300)
    assert bench_zero_memory.main(["--variants", "full-9"]) == 2


def test_one_rank_sends_nothing() -> None:
    assert measure_communication.main(["--small", "--world-size", "1"]) == 2
