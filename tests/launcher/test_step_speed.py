"""Are a step's operations per second those of its samples, and is the MFU a share of the right peak?"""

import pytest
import torch

import sparse_zero as sz
from launcher.device_peaks import peak_flops_per_second
from launcher.step_speed import StepSpeed, UnknownDeviceWarning, device_peak
from launcher.summary import format_flops
from models.families import module_map
from sparse_zero.flops import flop_shape, step_flops
from sparse_zero.layers.merge import remove_values
from sparse_zero.selection.regions import WeightSelection
from tests.models.tiny_families import FAMILIES


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16", False, 756.0),
        ("NVIDIA H100 NVL", "fp16", False, 835.5),
        ("NVIDIA GH200 480GB", "bf16", False, 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", True, 156.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", False, 19.5),
        ("NVIDIA A10", "bf16", False, 125.0),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125.0),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("AMD Instinct MI300X", "bf16", False, 1307.4),
        # No tensor cores for it; a slice of a device; others than those of the table.
        ("Tesla V100-SXM2-16GB", "bf16", False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", False, None),
        ("NVIDIA A10G", "bf16", False, None),
        ("", "bf16", False, None),
    ],
)
def test_peaks_go_by_the_whole_name(name: str, precision: str, tf32: bool, teraflops: float | None) -> None:
    found = peak_flops_per_second(name, precision, tf32=tf32)  # type: ignore[arg-type]
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_of_an_unknown_gpu_it_is_said_that_there_is_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_peak(torch.device("cpu"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
    with pytest.warns(UnknownDeviceWarning, match="NVIDIA A10G in bf16 is not known"):
        assert device_peak(torch.device("cuda", 0), "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    assert device_peak(torch.device("cuda", 0), "bf16") == 125e12


def test_a_step_counts_its_samples_and_what_is_trained() -> None:
    model = FAMILIES["llama"].make()
    family = module_map(model)
    weight = "model.layers.1.mlp.up_proj.weight"
    sz.sparsify(model, sz.Selection({weight: WeightSelection(shape=(48, 32), rows=[3])}), module_map=family)
    speed = StepSpeed(model, family, lengths=[10, 20, 30], response_tokens=[3, 4, 5], world_size=2, peak=1e9)
    done = step_flops(flop_shape(model), sample_lengths=[30, 10], num_head_positions=8).total
    found = speed.of_step([2, 0], 0.5)
    assert found == {"flops_per_second": pytest.approx(done), "mfu": pytest.approx(done / 1e9)}
    remove_values(model)
    weight = "model.layers.0.mlp.up_proj.weight"
    sz.sparsify(model, sz.Selection({weight: WeightSelection(shape=(48, 32), rows=[3])}), module_map=family)
    speed.look_at(model)
    assert speed.of_step([2, 0], 0.5)["flops_per_second"] > 1.2 * done
    speed = StepSpeed(model, family, lengths=[10], response_tokens=[3], world_size=1, peak=None)
    assert speed.of_step([0], 1.0).keys() == {"flops_per_second"}


def test_how_speeds_are_written() -> None:
    assert format_flops(None) == "–"
    assert format_flops(999.4) == "999 FLOP/s"
    assert format_flops(1.234e9) == "1.23 GFLOP/s"
    assert format_flops(45.67e12, 0.4567) == "45.7 TFLOP/s, 45.7 % MFU"
    assert format_flops(2.5e18) == "2500 PFLOP/s"
