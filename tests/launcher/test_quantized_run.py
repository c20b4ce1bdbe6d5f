"""Does a run on a base in 4 bits train, resume, evaluate and export as one on a dense base does?"""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from launcher.config import load_config
from launcher.exporting import load_merged
from models.loading import ModelConfig, load_model
from sparse_zero.checkpoint.adapter import read_adapter
from sparse_zero.layers.quantized import dense_parameter
from tests.launcher.test_train import rows, run, worker, write_config

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra quant)")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A finished run: its folder, and its config."""
    tmp_path = tmp_path_factory.mktemp("nf4")
    config = write_config(
        base,
        tmp_path,
        model__quantization="nf4",
        model__double_quantization=True,
        selection__score="squared",
        zero__placement="delta",
        training__steps=6,
        training__learning_rate=3e-3,
        training__validation_every=None,
        checkpoint__every=3,
        checkpoint__keep=2,
        output__report=False,
    )
    run(worker(config), tmp_path)
    return tmp_path, config


def test_a_run_on_nf4_trains_and_leaves_a_plain_model(trained, base):
    tmp_path, config = trained
    folder = tmp_path / "run"
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert json.loads((folder / "summary.json").read_text())["accuracy"]["num_problems"] == 10

    # Merged: the dense form of the codes everywhere, and the values added where they act.
    merged, adapter = load_file(folder / "merged" / "model.safetensors"), read_adapter(folder / "adapter")
    assert "quantization_config" not in json.loads((folder / "merged" / "config.json").read_text())
    quantized = load_model(ModelConfig(name_or_path=str(base / "model"), quantization="nf4", double_quantization=True))
    exact = load_file(base / "model" / "model.safetensors")
    assert merged.keys() == exact.keys()
    changed = set()
    for name, found in merged.items():
        expected = dense_parameter(quantized, name).clone()
        assert torch.equal(expected, exact[name]) == ("layers" not in name or "norm" in name)
        if name in adapter.selection.weights:
            regions = adapter.selection.weights[name]
            for kind in regions.kinds():
                at = regions.flat_indices(kind)
                expected.view(-1)[at] += adapter.values[f"{name.removesuffix('weight')}values_{kind}"]
                changed.add(name)
        assert torch.equal(found, expected), name
    assert changed == set(adapter.selection.weights)
    # The same from the adapter alone.
    again, _ = load_merged(load_config(config), folder / "adapter")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in again.state_dict().items() if name in merged)


@pytest.mark.slow
def test_a_run_on_nf4_goes_on_from_a_checkpoint(trained):
    tmp_path, config = trained
    folder = tmp_path / "run"
    losses = [row["loss"] for row in rows(tmp_path)]
    for gone in ("summary.json", "metrics.jsonl"):
        (folder / gone).unlink()
    last = max((folder / "checkpoints").iterdir(), key=lambda path: path.name)
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink()
    last.rmdir()
    run(worker(config, "--output.evaluate=false", "--output.merged=false"), tmp_path)
    assert [row["loss"] for row in rows(tmp_path)] == losses[3:]
