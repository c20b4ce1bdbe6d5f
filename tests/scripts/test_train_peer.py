"""Is a peer trained as a run of ours is: the same data, batches, schedule, loss and engine, by PEFT's own adapters?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models.data import load_samples
from models.loading import load_model, load_tokenizer, pad_token_id
from models.mean_loss import mean_loss
from models.word_problems import write_word_problems
from scripts.accuracy.peer_config import PeerRunConfig, load_peer_config
from scripts.accuracy.peer_method import frequent_tokens
from scripts.accuracy.peer_plan import adapter_size, plan_peer, rank_within
from scripts.accuracy.train_peer import main
from sparse_zero.errors import InputError
from sparse_zero.module_map import default_module_map
from tests.distributed.peer_workers import rows_of, start_run
from tests.distributed.spawn import run_ranks
from tests.models.tiny import tiny_llama, write_tiny_llama
from tests.models.tiny_classifiers import write_base, write_records

WORKERS = "tests.distributed.peer_workers"
MODULES = ["*.self_attn.{q,k,v}_proj"]
# Entries of q, k and v in the two layers.
ALL_OF_MODULES = 2 * (64 * 64 + 2 * 64 * 32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tied head, and few word problems."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny_llama(folder / "model", tie=True, layers=2)
    write_word_problems(folder / "data", 40, 8, 6, seed=0)
    return folder


def write_config(base: Path, path: Path, **sections: Any) -> Path:
    """The YAML of a run into the folder ``run`` beside it."""
    config: dict[str, Any] = {
        "model": {"name_or_path": str(base / "model")},
        "data": {
            "train": str(base / "data" / "train.json"),
            "validation": str(base / "data" / "validation.json"),
            "template": "plain",
            "max_length": 160,
        },
        "training": {"steps": 6, "global_batch_size": 6, "micro_batch_size": 4, "learning_rate": 3e-3},
        "zero": {"stage": 2},
        "memory": {"measure": False},
        "output": {"folder": str(path.parent / "run")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**config, **sections}))
    return path


def peer_config(base: Path, path: Path, **peer: Any) -> Path:
    return write_config(base, path, peer=peer)


def train(config: Path, *overrides: str) -> dict[str, Any]:
    """Train a peer in a process of its own; its summary."""
    start_run("train_peer", config, *overrides)
    return json.loads((config.parent / "run" / "summary.json").read_text())


def test_full_fine_tuning_of_some_modules_is_a_run_that_selects_all_of_them(base: Path, tmp_path: Path) -> None:
    every_row = {"kind": "row", "modules": MODULES, "score": "random"}
    ours = write_config(
        base, tmp_path / "ours" / "run.yaml", selection={"regions": [every_row], "budget": {"fraction": 1.0}}
    )
    # Modules with a rate of their own are the same for both.
    own_rate = "--training.per_module=[{modules: ['model.layers.1'], learning_rate: 6.0e-3}]"
    start_run("train", ours, own_rate)
    theirs = peer_config(base, tmp_path / "theirs" / "run.yaml", method="full", modules=MODULES)
    summary = train(theirs, own_rate)
    assert summary["parameters"] == {"total": 110912, "trained": ALL_OF_MODULES, "retired": 0, "head": 0}
    assert summary["adapter_bytes"] == 4 * ALL_OF_MODULES
    assert summary.keys() == json.loads((tmp_path / "ours" / "run" / "summary.json").read_text()).keys()
    expected, found = rows_of(tmp_path / "ours" / "run"), rows_of(tmp_path / "theirs" / "run")
    assert len(expected) == len(found) == 6
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.3  # It learns: the steps are no small ones.
    for ours_row, theirs_row in zip(expected, found, strict=True):
        assert theirs_row.keys() == ours_row.keys()
        assert theirs_row["loss"] == pytest.approx(ours_row["loss"], rel=1e-6)
        assert theirs_row["gradient_norm"] == pytest.approx(ours_row["gradient_norm"], rel=1e-5)
        for name in ("step", "learning_rate", "response_tokens", "epoch"):
            assert theirs_row[name] == ours_row[name]
    assert len({row["response_tokens"] for row in found}) > 1  # So that another order would have been seen.


def test_lora_is_that_of_a_plain_loop_with_peft(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (extra: peft)")
    config = peer_config(base, tmp_path / "run.yaml", method="lora", modules=MODULES, rank=4)
    summary = train(config)
    assert summary["parameters"]["trained"] == 2 * 4 * (64 + 64 + 2 * (64 + 32))
    projections = ["q_proj", "k_proj", "v_proj"]
    plain = run_ranks(f"{WORKERS}:plain_lora", 1, config=str(config), rank=4, modules=projections)
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert losses == pytest.approx(plain, rel=2e-6)
    assert losses[0] - losses[-1] > 0.01
    files = {path.name: path.stat().st_size for path in (tmp_path / "run" / "adapter").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert summary["adapter_bytes"] == sum(files.values()) > 4 * summary["parameters"]["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_ranks_learn_what_one_does(base: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (extra: peft)")
    settings = {"method": "full"} if method == "full" else {"method": method, "modules": MODULES, "rank": 4}
    found = {}
    for num_ranks in (1, 2):
        config = peer_config(base, tmp_path / str(num_ranks) / "run.yaml", **settings)
        start_run("train_peer", config, num_ranks=num_ranks)
        found[num_ranks] = rows_of(config.parent / "run")
        assert json.loads((config.parent / "run" / "summary.json").read_text())["world_size"] == num_ranks
    for name in ("loss", "gradient_norm"):
        one, two = ([row[name] for row in found[num_ranks]] for num_ranks in (1, 2))
        assert two == pytest.approx(one, rel=1e-4), name
    assert one[0] != pytest.approx(one[-1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frozen", "full", "lora", "shira"])
def test_a_head_that_the_base_lacks_is_trained_whole(tmp_path: Path, method: str) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (extra: peft)")
    write_base(tmp_path / "base", "bert")
    write_records(tmp_path, "train", range(21))
    write_records(tmp_path, "dev", range(100, 111))
    peer: dict[str, Any] = {"method": method, "head": ["classifier.*"]}
    if method in ("lora", "shira"):
        peer |= {"modules": ["*.self.{query,value}"], "rank": 2}
    config = write_config(
        tmp_path,
        tmp_path / method / "run.yaml",
        model={"name_or_path": str(tmp_path / "base"), "task": "sequence_classification", "num_labels": 2},
        data={
            "train": str(tmp_path / "train.tsv"),
            "test": str(tmp_path / "dev.tsv"),
            "fields": {"text": "sentence", "label": "label"},
            "max_length": 48,
        },
        output={"folder": str(tmp_path / method / "run"), "evaluate": True, "merged": True},
        peer=peer,
    )
    summary = train(config)
    tuned = load_file(tmp_path / method / "run" / "merged" / "model.safetensors")
    # The base is a bare encoder.
    base = {f"bert.{name}": tensor for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()}
    base = {name: tensor for name, tensor in base.items() if name in tuned}
    assert len(base) == len(tuned) - 2
    head = {name: tensor for name, tensor in tuned.items() if name.startswith("classifier.")}
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    assert not head.keys() & base.keys()
    size = sum(tensor.numel() for tensor in head.values())
    assert summary["parameters"]["head"] == size
    fresh = load_model(load_peer_config(config).model, head_seed=0).state_dict()
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in head.items())
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, tuned[name])}
    matrices = {name for name in base if name.endswith((".self.query.weight", ".self.value.weight"))}
    assert changed >= matrices if method == "full" else changed == (set() if method == "frozen" else matrices)
    assert summary["accuracy"]["num_problems"] == 11


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "shira", "trainable_tokens"])
def test_the_adapters_of_every_method_learn_and_load_again(base: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (extra: peft)")
    modules = {} if method == "trainable_tokens" else {"modules": MODULES}
    summary = train(
        peer_config(base, tmp_path / "run.yaml", method=method, fraction=0.05, **modules), "--output.merged=true"
    )
    assert 0.04 * 110912 < summary["parameters"]["trained"] <= 0.05 * 110912
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert losses[0] - losses[-1] > 0.005
    found = run_ranks(f"{WORKERS}:reloaded", 1, folder=str(tmp_path / "run"), base=str(base / "model"))
    assert found["adapter"] < 1e-5 < 1e-3 < found["base"]


def test_a_frozen_model_is_evaluated_and_a_complete_run_is_left_as_it_is(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = peer_config(base, tmp_path / "run.yaml", method="frozen")
    mapping = yaml.safe_load(config.read_text())
    mapping["data"] |= {"test": str(base / "data" / "test.json"), "evaluation": {"max_new_tokens": 2}}
    mapping["output"]["evaluate"] = True
    config.write_text(yaml.safe_dump(mapping))
    summary = train(config)
    assert summary["parameters"] == {"total": 110912, "trained": 0, "retired": 0, "head": 0}
    assert (summary["steps"], summary["final_loss"], summary["adapter_bytes"]) == (0, None, 0)
    folder = tmp_path / "run"
    assert rows_of(folder) == []
    # Where the result is a loss, this is it.
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run = load_peer_config(config)
    model, tokenizer = load_model(run.model), load_tokenizer(run.model)
    samples = load_samples(run.data, tokenizer, "validation").texts
    found = mean_loss(model.eval(), samples, pad_token_id(tokenizer))
    assert (row["kind"], row["step"], row["response_tokens"]) == ("validation", 0, found.num_labels)
    assert row["loss"] == pytest.approx(found.loss, rel=1e-5)
    evaluations = [json.loads((folder / "evaluation" / f"{name}.json").read_text()) for name in ("base", "tuned")]
    assert evaluations[0] == evaluations[1]
    assert evaluations[0]["num_problems"] == 6
    # Its config is one that the same command reads.
    assert load_peer_config(folder / "config.yaml") == load_peer_config(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    start_run("train_peer", config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert main(["--config", str(config), "--peer.method=full"]) == 2
    assert "holds another run (peer.method was 'frozen' and is now 'full')" in capsys.readouterr().err


# --- what is planned ------------------------------------------------------------------------------------------


def plan(config: dict[str, Any], **model: Any) -> Any:
    built = tiny_llama(layers=2, **model)
    return plan_peer(parsed(peer=config).peer, built, default_module_map(built))


def parsed(**changes: Any) -> PeerRunConfig:
    """A config that holds, with sections changed, as read from YAML."""
    from launcher.config import parse_config

    mapping: dict[str, Any] = {
        "model": {"name_or_path": "model"},
        "data": {"train": "train.json"},
        "peer": {"method": "lora", "modules": MODULES, "rank": 4},
        "training": {"steps": 2},
        "zero": {},
        "output": {"folder": "out"},
    }
    return parse_config({**mapping, **changes}, "the config", PeerRunConfig)


def test_sizes_are_those_of_the_methods() -> None:
    shapes = [(64, 64), (32, 64)]
    assert adapter_size("lora", shapes).at(3) == adapter_size("rslora", shapes).at(3) == 3 * (128 + 96)
    assert adapter_size("dora", shapes).at(3) == 3 * (128 + 96) + 64 + 32
    shira = adapter_size("shira", shapes)
    assert (shira.at(3), shira.max_rank) == (3 * (128 + 96), 21)  # 22 * 96 are more than 32 * 64.
    assert adapter_size("trainable_tokens", [(384, 64)]).at(7) == 7 * 64


@pytest.mark.parametrize("method", ["lora", "dora", "shira"])
def test_the_rank_comes_nearest_from_below(method: Any) -> None:
    size = adapter_size(method, [(64, 64), (32, 64)])
    for fraction in (0.01, 0.023, 0.04):
        rank = rank_within(size, fraction, 100_000, "rank")
        assert size.at(rank) <= fraction * 100_000 < size.at(rank + 1)


def test_what_does_not_fit_is_told_with_what_would() -> None:
    size = adapter_size("shira", [(64, 64), (32, 64)])
    with pytest.raises(InputError, match=r"200 parameters, and the smallest rank of shira, 1, takes 224.* 0\.00224,"):
        rank_within(size, 0.002, 100_000, "rank of shira")
    assert rank_within(size, 0.00224, 100_000, "rank of shira") == 1
    with pytest.raises(InputError, match=r"largest rank of shira, 21, has 4,704: set it to at most 0\.047,"):
        rank_within(size, 0.06, 100_000, "rank of shira")


def test_patterns_name_weights_and_biases() -> None:
    found = plan({"method": "full", "modules": ["*.{q,o}_proj"], "head": ["lm_head.*"]}, attention_bias=True)
    names = {name.partition("self_attn.")[2] for name in found.parameters}
    assert names == {"q_proj.weight", "q_proj.bias", "o_proj.weight", "o_proj.bias"}
    assert (found.num_trained, found.num_head) == (2 * 2 * (64 * 64 + 64), 384 * 64)
    assert plan({"method": "full"}).num_trained == sum(each.numel() for each in tiny_llama(layers=2).parameters())
    # Of a tied embedding, also by the head's name.
    assert plan({"method": "full", "modules": ["lm_head"]}, tie=True).parameters == ("model.embed_tokens.weight",)


def test_tokens_are_the_most_frequent_ones() -> None:
    from models.data import TokenizedSample

    samples = [TokenizedSample([5, 2, 2, 7], []), TokenizedSample([7, 2, 4], [])]
    assert frequent_tokens(samples, 2, 9) == [2, 7]
    assert frequent_tokens(samples, 5, 9) == [0, 2, 4, 5, 7]  # 0 is the first that does not occur.


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ({"method": "lora", "modules": ["*.query"], "rank": 4}, r"peer\.modules pattern '\*\.query' matches no matrix"),
        ({"method": "full", "modules": ["*.query"]}, r"peer\.modules pattern '\*\.query' matches no module"),
        ({"method": "lora", "modules": ["*embed_tokens"], "rank": 4}, "model.embed_tokens, which is no untied linear"),
        ({"method": "shira", "modules": ["*.q_proj"], "rank": 33}, "peer.rank is 33, and the largest rank of shira is 32"),
        ({"method": "frozen", "head": ["score.*"]}, r"peer\.head pattern 'score\.\*' matches no parameter"),
        ({"method": "full", "head": ["*.q_proj.weight"]}, r"but not model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"method": "lora", "modules": ["lm_head"], "rank": 4, "head": ["lm_head.*"]}, "lm_head, which peer.head trains"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have_is_refused(peer: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(peer, attention_bias=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peer": {"method": "lora", "modules": MODULES}}, "peer has rank=None and fraction=None: lora needs exactly one"),
        ({"peer": {"method": "lora", "rank": 4}}, "peer.modules is missing"),
        ({"peer": {"method": "full", "rank": 4}}, "peer.rank is 4 with method full: leave it out"),
        ({"peer": {"method": "frozen", "modules": MODULES}}, "peer.modules is set with method frozen"),
        ({"peer": {"method": "lorra", "rank": 4}}, "peer.method is 'lorra'.*did you mean lora"),
        ({"peer": {"method": "lora", "modules": MODULES, "rank": 0}}, "peer.rank is 0"),
        ({"peer": {"method": "lora", "modules": MODULES, "fraction": 1.5}}, "peer.fraction is 1.5"),
        ({"peer": {"method": "shira", "modules": MODULES, "rank": 4, "alpha_over_rank": 1}}, "has no lora_alpha"),
        ({"zero": {"stage": 3}}, "zero.stage is 3: peers are trained at stage 1 or 2"),
        ({"checkpoint": {"every": 5}}, "checkpoint.every is set with a section peer.*trained anew"),
        ({"training": {"steps": 2, "per_kind": {"row": {"weight_decay": 0.1}}}}, "training.per_kind is set"),
        ({"output": {"folder": "out", "report": True}}, "output.report is set"),
    ],
)  # fmt: skip
def test_what_peers_have_not_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parsed(**changes)


def test_a_selection_and_a_peer_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selection = {"regions": [{"kind": "row", "modules": MODULES, "per_matrix": 1}]}
    config = write_config(base, tmp_path / "run.yaml", peer={"method": "full"}, selection=selection)
    assert main(["--config", str(config)]) == 2
    assert "has a section selection, and peers have a section peer in its place" in capsys.readouterr().err
    below = tmp_path / "below.yaml"
    below.write_text("extends: run.yaml\nselection: null\n")
    assert load_peer_config(below).peer.method == "full"
