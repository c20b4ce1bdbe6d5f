"""Does the gate fail for a loss that it can see, and only for that?"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import bench_check as check
from scripts import bench_layer
from scripts.benchmarking import machine
from scripts.benchmarks import methods
from scripts.benchmarks.ratios import Ratio, paired
from sparse_zero.errors import InputError
from sparse_zero.layers.sparse_linear import SparseLinear

# By the processor's clock: tests run beside others.
STEP = replace(methods.SMALL, small_blocks=4, steps=7, threads=1, clock="cpu")
LAYER = replace(bench_layer.SMALL, sizes="64x64", rounds=3, threads=1, clock="cpu")


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _ratio(true: float, spread: float, seed: int, rounds: int = 25) -> Ratio:
    """Of a method that takes ``true`` times the reference, on a machine that scatters by ``spread``."""
    shuffler = random.Random(seed)
    return paired([true * shuffler.lognormvariate(0, spread) for _ in range(rounds)], [1.0] * rounds)


def _verdict(true: float, spread: float, *, seed: int = 0, committed: float = 1.02) -> check.Verdict:
    measured = check.Measured({"step/rows": _ratio(true, spread, seed)}, {"step": _ratio(1.0, spread, seed + 1000)})
    reference = {"step/rows": _ratio(committed, 0.003, 1)}
    (verdict,) = check.judge(measured, reference, {"step": 0.02})
    return verdict


@pytest.mark.parametrize(
    ("true", "spread", "beyond"),
    [
        (1.02, 0.003, False),
        (1.03, 0.003, False),  # within the tolerance
        (1.06, 0.003, True),
        (1.06, 0.05, False),  # the machine was too noisy to see it
        (1.5, 0.05, True),  # but not for this
        (0.9, 0.003, False),
    ],
)
def test_only_what_noise_and_tolerance_cannot_explain_is_beyond(true: float, spread: float, beyond: bool) -> None:
    assert _verdict(true, spread).is_beyond == beyond


def test_a_scattered_ratio_is_judged_by_its_low_end() -> None:
    """The floors agree, but this method's own time scatters: its median alone would fail."""
    measured = check.Measured({"step/rows": _ratio(1.08, 0.2, 3)}, {"step": _ratio(1.0, 0.001, 4)})
    (verdict,) = check.judge(measured, {"step/rows": _ratio(1.0, 0.001, 1)}, {"step": 0.02})
    assert verdict.measured.median > verdict.limit
    assert not verdict.is_beyond


def test_an_unchanged_step_does_not_fail_at_any_noise() -> None:
    """Ten ratios a run: a false alarm in a thousand ratios is one in a hundred runs."""
    for spread in (0.002, 0.01, 0.05):
        alarms = sum(_verdict(1.02, spread, seed=seed).is_beyond for seed in range(100))
        assert alarms == 0, spread


def test_a_faster_and_a_blind_verdict_are_told() -> None:
    assert _verdict(0.9, 0.003).is_faster
    assert not _verdict(1.02, 0.003).is_faster
    assert _verdict(1.02, 0.4).is_blind
    table = check.table_of([_verdict(0.9, 0.003), _verdict(1.2, 0.003), _verdict(1.02, 0.003)], "title")
    assert [row[-1] for row in table.rows] == ["faster", "SLOWER", "ok"]


def test_other_ratios_than_the_reference_has() -> None:
    measured = check.Measured({"step/rows": _ratio(1.0, 0.01, 0)}, {"step": _ratio(1.0, 0.01, 1)})
    with pytest.raises(InputError, match=r"step/columns.*--update"):
        check.judge(measured, {"step/rows": _ratio(1, 0, 0), "step/columns": _ratio(1, 0, 0)}, {"step": 0.1})


@pytest.mark.slow
def test_a_really_slowed_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = tmp_path / "reference.json"
    assert check.check(reference, STEP, LAYER, update=True, force=True) == 0
    found = json.loads(reference.read_text())
    assert set(found["ratios"]) == {
        f"{part}/{m}" for part in ("step", "layer 64x64") for m in (*methods.OURS, *methods.DELTA)
    }
    found["tolerances"]["layer"] = 1e9  # only the step is looked at
    reference.write_text(json.dumps(found))
    forward = SparseLinear.forward

    def slowed(self: SparseLinear, x: torch.Tensor) -> Any:
        if list(self.selection.kinds()) == ["row"] and self.placement == "inplace":
            began = time.process_time()
            while time.process_time() - began < 0.03:
                pass
        return forward(self, x)

    monkeypatch.setattr(SparseLinear, "forward", slowed)
    capsys.readouterr()
    assert check.check(reference, STEP, LAYER, update=False) == 1
    printed = capsys.readouterr().out
    assert "of 20 ratios are blind" in printed
    lines = printed[printed.index("slower than noise") :].splitlines()
    assert any("step/rows" in line and "SLOWER" in line for line in lines)
    assert not any("layer" in line for line in lines)


SETTINGS = {"step": {"hidden": 1}, "layer": {}}


def _made_up(true: float, floor: float) -> check.Measured:
    """A run of steps and one linear on a machine whose floors differ by ``floor``."""
    ratios = {"step/rows": _ratio(true, 0.001, 1), "layer 64x64/rows": _ratio(true, 0.001, 2)}
    return check.Measured(ratios, {part: _ratio(1 + floor, 0.001, 3) for part in ("step", "layer 64x64")})


def test_update_shows_what_changes_and_keeps_the_committed_tolerances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reference.json"
    old = check.Reference(SETTINGS, machine(), {"step": 0.5, "layer": 0.7}, _made_up(1.02, 0.0))
    check.write_reference(path, old)
    assert check.read_reference(path) == old, "with its controls"
    check.update_reference(path, old, _made_up(2.0, 0.4), SETTINGS, force=False)
    printed = capsys.readouterr().out
    assert printed.index("2.0") < printed.index("ratios are blind") < printed.index("wrote")
    assert "SLOWER" not in printed, "both tolerances and the noise allow it"
    found = check.read_reference(path)
    assert (found.tolerances, found.measured) == (old.tolerances, _made_up(2.0, 0.4))
    check.update_reference(path, found, _made_up(1.0, 0.0), {**SETTINGS, "step": {"hidden": 2}}, force=False)
    printed = capsys.readouterr().out
    assert "other settings" in printed
    assert "faster" in printed, "compared all the same"
    other = check.Measured({"step/columns": _ratio(1.0, 0.001, 1)}, found.measured.controls)
    check.update_reference(path, found, other, SETTINGS, force=True)
    assert "has other ratios: not compared" in capsys.readouterr().out


def test_update_refuses_a_noisy_machine(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    noisy = _made_up(1.0, 0.03)
    with pytest.raises(InputError, match=r"of step differs from itself by up to 3.*tolerance of 2.0%.*--force"):
        check.update_reference(path, None, noisy, SETTINGS, force=False)
    assert not path.exists()
    check.update_reference(path, None, _made_up(1.0, 0.01), SETTINGS, force=False)
    found = check.read_reference(path)
    assert found.measured == _made_up(1.0, 0.01)
    assert found.tolerances == check.TOLERANCES
    # A layer may be off by more than a step.
    part = replace(noisy, controls={"layer 64x64": noisy.controls["layer 64x64"]})
    check.refuse_noise(part, check.TOLERANCES)
    check.update_reference(path, found, noisy, SETTINGS, force=True)
    assert check.read_reference(path).measured == noisy


def test_blind_ratios_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    committed = check.Reference(SETTINGS, {}, check.TOLERANCES, _made_up(1.0, 0.0))
    measured = _made_up(1.0, 0.0)
    check.compare(measured, committed)
    printed = capsys.readouterr().out
    assert "0 of 2 ratios are blind" in printed
    assert "another machine" in printed
    noisy = replace(measured, controls={**measured.controls, "step": _ratio(1.2, 0.001, 3)})
    check.compare(noisy, committed)
    assert "1 of 2 ratios are blind" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "reference.json"
    assert check.main(["--reference", str(missing)]) == 2
    assert capsys.readouterr().err.strip() == f"error: there is no reference {missing}: write one with --update"
    check.write_reference(missing, check.Reference(SETTINGS, {}, check.TOLERANCES, _made_up(1.0, 0.0)))
    assert check.main(["--reference", str(missing)]) == 2
    assert "other settings" in capsys.readouterr().err
    missing.write_text(json.dumps({"settings": {}}))
    for flags in ([], ["--update"]):
        assert check.main(["--reference", str(missing), *flags]) == 2
        assert "is no reference of this script" in capsys.readouterr().err
    assert check.main(["--force"]) == 2
    assert "--force is without --update" in capsys.readouterr().err


def test_the_committed_reference_is_of_this_script() -> None:
    settings = {"step": asdict(check.STEP), "layer": asdict(check.LAYER)}
    reference = check.read_reference(check.REFERENCE)
    assert reference.settings == settings
    ratios, tolerances = reference.measured.ratios, reference.tolerances
    parts = ["step", *(f"layer {size}" for size in check.LAYER.sizes.split(","))]
    assert set(ratios) == {f"{part}/{method}" for part in parts for method in (*methods.OURS, *methods.DELTA)}
    assert set(tolerances) == {"step", "layer"}
