"""Do simulation and closed form agree on calibration, saving and offloading, on the device and on the host?"""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import parse_config
from launcher.plan.forecasting import forecast_run
from launcher.plan.simulation import simulate_run
from sparse_zero.memory.closed_form.forecast import Forecast
from sparse_zero.memory.closed_form.moments import Phase
from tests.distributed.test_simulation import in_child
from tests.launcher.phase_workers import calibration, mapping, training
from tests.models.tiny import tiny_llama

FULL = {"calibration_weights": "full"}
OFFLOADED = {"calibration_weights": "full", "full_calibration": {"stage": 3, "offload": True}}
DENSE = {"score": "mean_of_abs"}
SHORT = {"training": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16",
                      "gradient_checkpointing": True}}  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder without weights."""
    folder = tmp_path_factory.mktemp("shapes")
    tiny_llama(layers=4, hidden=256, intermediate=640, vocab=4000).config.save_pretrained(folder)
    return str(folder)


def forecast(run: dict[str, Any]) -> Forecast:
    return forecast_run(parse_config(run), 4)


def device_and_host(found: Forecast, phase: Phase) -> tuple[int, int]:
    return found.peak(phase).num_bytes(), found.peak(phase, "host").num_bytes("host")


@pytest.mark.parametrize(
    ("selection", "sections"),
    [
        ({}, SHORT),
        (DENSE, {}),
        ({**DENSE, "min_depth": 0.5}, SHORT),
        pytest.param(FULL, {}, marks=pytest.mark.slow),
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"zero": {"stage": 3}}, marks=pytest.mark.slow),
        pytest.param({**DENSE, "accumulate": "per_step"}, SHORT, marks=pytest.mark.slow),
        pytest.param({"regions": [{"kind": "row", "modules": ["*_proj"]}]}, {}, marks=pytest.mark.slow),
        pytest.param({"regions": [{"kind": "column", "modules": ["*.v_proj"]}]}, SHORT, marks=pytest.mark.slow),
        pytest.param({"score": "wanda"}, {}, marks=pytest.mark.slow),
        pytest.param({**FULL, "full_calibration": {"stage": 3}}, SHORT, marks=pytest.mark.slow),
        pytest.param(OFFLOADED, {}, marks=pytest.mark.slow),
    ],
)
def test_calibration_is_forecast_as_it_is_simulated(
    selection: dict[str, Any], sections: dict[str, Any], shapes: str, tmp_path: Path
) -> None:
    run = mapping(shapes, selection, **sections)
    found = in_child(calibration, tmp_path, **run)
    assert list(found) == ["load", "calibration"]
    simulated = found["calibration"]
    peak, host = device_and_host(forecast(run), "calibration")
    assert peak == pytest.approx(simulated["peak_bytes"], rel=0.05), (
        simulated["by_kind"], forecast(run).peak("calibration"),
    )  # fmt: skip
    if selection is DENSE:
        # An accumulator for each of q, k and v of 4 layers, in fp32; k of the first layer is scored before q.
        entries = 4 * (256 * 256 + 2 * 128 * 256)
        assert simulated["host_by_kind"]["optimizer"] == pytest.approx(4 * (entries - 128 * 256), rel=1e-3)
        # The closed form takes this rank to score the largest weight first.
        assert simulated["host_bytes"] <= host < 1.2 * simulated["host_bytes"]
    if selection is OFFLOADED:
        assert simulated["host_bytes"] > 4 * peak / 10


def test_depth_is_known_to_the_forecast(shapes: str) -> None:
    everything, upper, traded = (
        forecast(mapping(shapes, {**DENSE, **depth})) for depth in ({}, {"min_depth": 0.5}, {"depth_tradeoff": 2.0})
    )
    phase: Phase
    for phase in ("calibration", "forward"):
        assert device_and_host(upper, phase)[0] < device_and_host(everything, phase)[0]
    assert device_and_host(upper, "calibration")[1] < device_and_host(everything, "calibration")[1]
    # Real scores tell what a tradeoff leaves out: the forecast is of all layers.
    assert device_and_host(traded, "forward") == device_and_host(everything, "forward")


def test_offloaded_states_lie_on_the_host(shapes: str, tmp_path: Path) -> None:
    run = mapping(shapes, zero={"stage": 3, "offload_optimizer": "cpu", "offload_base": "cpu"})
    found = in_child(training, tmp_path, **run)
    phases, expected = found["phases"], forecast(run)
    for phase in ("forward", "backward", "step"):
        kinds, host = phases[phase]["by_kind"], phases[phase]["host_by_kind"]
        # All but what persists, the norms, is elsewhere; and there is this rank's quarter of it.
        assert kinds.get("weights", 0) < 0.01 * host["weights"]
        assert host["weights"] == pytest.approx(2 * found["parameters"] / 4, rel=0.01)
        assert host["optimizer"] >= 12 * found["trained"] / 4
        peak, on_host = device_and_host(expected, phase)
        # Next to nothing is left of a step on the device.
        assert peak == pytest.approx(phases[phase]["peak_bytes"], rel=0.05, abs=2**18)
        # Not simulated: the base's entries under the values, which are put aside before the recording.
        assert on_host - 2 * found["trained"] == pytest.approx(phases[phase]["host_bytes"], rel=0.05)
    saved = phases["save"]
    masters = saved["host_by_kind"]["optimizer"] - phases["step"]["host_by_kind"]["optimizer"]
    assert masters == pytest.approx(12 * found["trained"], rel=0.01)
    assert device_and_host(expected, "save")[0] == pytest.approx(saved["peak_bytes"], rel=0.05)
    # What the allocator needs for it lies between the tensors and all that it would take without a limit.
    assert found["peak_bytes"] <= found["needed_bytes"] < 2 * found["peak_bytes"] + 60 * 2**20
    table = json.loads((tmp_path / "found.json.timeline").read_text())
    most = max(sum(values) for values in zip(*table["bytes"].values(), strict=True))
    assert most == found["peak_bytes"]


@pytest.mark.slow
def test_a_run_that_calibrates_has_the_phase(shapes: str, tmp_path: Path) -> None:
    run = mapping(shapes)
    found = simulate_run(parse_config(run), 4)
    order = ["load", "calibration", "engine", "forward", "backward", "step", "save"]
    assert list(found["phases"]) == order
    # 4 samples instead of 2.
    assert found["peak_bytes"] == found["phases"]["calibration"]["peak_bytes"]
    assert forecast(run).phases() == order


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_an_offloaded_optimizer_lies_on_the_host(stage: int, shapes: str, tmp_path: Path) -> None:
    run = mapping(shapes, zero={"stage": stage, "offload_optimizer": "cpu"})
    found = in_child(training, tmp_path, **run)
    expected = forecast(run)
    for phase in ("forward", "backward", "step"):
        row = found["phases"][phase]
        assert row["host_by_kind"]["optimizer"] >= 12 * found["trained"] / 4
        assert device_and_host(expected, phase)[0] == pytest.approx(row["peak_bytes"], rel=0.05)
