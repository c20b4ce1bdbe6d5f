"""Is an exported adapter one that others can load, with a card that says what it is and nothing of this machine?"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from launcher.__main__ import main
from launcher.yaml_files import dump_yaml
from models.base_identity import base_identity
from models.loading import ModelConfig, load_model
from sparse_zero.checkpoint.adapter import read_adapter
from tests.launcher.test_bad_input import run_mapping
from tests.models.tiny import write_tiny_llama

TOKENS = torch.arange(3, 39).reshape(4, 9)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """A run in a folder with a telling name: its config file, its base and its adapter, whose selection names paths."""
    home = tmp_path / "secret-user"
    base = write_tiny_llama(home / "bases" / "tiny", layers=2)
    mapping = run_mapping()
    mapping["model"]["name_or_path"] = str(base)
    mapping["data"]["train"] = str(home / "data" / "sums.json")
    mapping["output"]["folder"] = str(home / "runs" / "mine")
    (home / "data").mkdir()
    (home / "data" / "sums.json").write_text("[]")
    file = home / "run.yaml"
    file.write_text(dump_yaml(mapping), encoding="utf-8")
    model = load_model(ModelConfig(name_or_path=str(base)))
    metadata = {
        "config": {
            "file": str(home / "x.safetensors"),
            "accumulator_folder": "secret-user/sums",
            "regions": ["*.q_proj"],
        },
        "num_parameters_model": model.num_parameters(),
        "base": {"name": "tiny", "sha256": "ab" * 32},
    }
    weights = {"model.layers.0.self_attn.q_proj.weight": sz.WeightSelection(shape=(64, 64), rows=[1, 5])}
    sz.sparsify(model, sz.Selection(weights, metadata))
    with torch.no_grad():
        next(iter(sz.trainable_parameters(model).values())).add_(0.1)
    sz.write_back(model)
    sz.save_adapter(model, home / "runs" / "mine" / "adapter", base=base_identity(base))
    with torch.no_grad():
        logits = model(TOKENS).logits
    return {"home": home, "base": base, "file": file, "logits": logits, "out": tmp_path / "out"}


def export(run: dict[str, Any], *arguments: str) -> int:
    return main(["export", "--config", str(run["file"]), "--as", "adapter", "--out", str(run["out"]), *arguments])


def test_the_folder_loads_three_ways_and_names_nothing_of_this_machine(run, capsys, monkeypatch):
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM

    pytest.importorskip("peft")
    (run["base"] / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n")
    assert export(run, "--base-model", "somebody/tiny") == 0
    assert capsys.readouterr().out == f"adapter to upload written to {run['out']}\n"
    assert sorted(path.name for path in run["out"].iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "selection.safetensors",
    ]
    for path in run["out"].iterdir():
        assert b"secret-user" not in path.read_bytes(), path.name
        assert str(Path.home()).encode() + b"/" not in path.read_bytes(), path.name
    assert read_adapter(run["out"]).selection.metadata["config"]["regions"] == ["*.q_proj"]
    assert json.loads((run["out"] / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/tiny"

    card = ModelCard.load(run["out"] / "README.md")
    assert card.data.to_dict() == {
        "base_model": "somebody/tiny",
        "base_model_relation": "adapter",
        "language": ["en"],
        "library_name": "sparse-zero",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-zero", "peft", "text-generation"],
    }
    for said in ("128, 0.0", "128 in rows, in 1 weights", "`sums.json` (local)", base_identity(run["base"]).sha256):
        assert said in card.text, said

    # Its lines run as they stand, but for the two names.
    blocks = re.findall(r"^```python\n(.*?)^```$", card.text, re.M | re.S)
    assert len(blocks) == 4
    first = re.sub(r"snapshot_download\(.*", repr(str(run["out"])), blocks[0]).replace(
        "somebody/tiny", str(run["base"])
    )
    monkeypatch.chdir(run["out"].parent)
    for block in blocks[1:3]:
        names: dict[str, Any] = {}
        exec(first + block, names)
        with torch.no_grad():
            assert torch.equal(names["model"](TOKENS).logits, run["logits"])
    exec(first + blocks[1] + blocks[3], {})
    merged = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        assert torch.equal(merged(TOKENS).logits, run["logits"])
    # Whoever edits the card, or adds a file, changes nothing of the adapter.
    (run["out"] / "README.md").write_text("# Mine\n")
    (run["out"] / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    read_adapter(run["out"])


def test_what_is_not_known_is_left_out_and_said(run, capsys):
    assert export(run, "--data.train=owner/sums:hard", "--data.format=hub") == 0
    assert "the base's name on the hub is not known: give --base-model" in capsys.readouterr().out
    text = (run["out"] / "README.md").read_text()
    assert "base_model:" not in text
    assert "license:" not in text
    assert "It was not found beside the base's files" in text
    assert "datasets:\n- owner/sums\n" in text
    assert "`owner/sums:hard`, split `train`" in text
    assert 'from_pretrained("folder of the base", dtype="float32")' in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base-model", "no/such/name"], "--base-model is 'no/such/name': give the base's name on the hub"),
        (["--as", "model", "--base-model", "a/b"], "--base-model is a/b, and a model is exported: add --as adapter"),
        (["--as", "table"], "invalid choice: 'table'"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(run, capsys, arguments, says):
    assert export(run, *arguments) == 2
    assert says in capsys.readouterr().err
    assert not run["out"].exists()


def test_the_adapter_of_another_base_is_refused(run, capsys, tmp_path):
    write_tiny_llama(tmp_path / "other", layers=2, seed=1)
    assert export(run, f"--model.name_or_path={tmp_path / 'other'}") == 2
    assert "was trained on the base tiny" in capsys.readouterr().err
    assert not run["out"].exists()
