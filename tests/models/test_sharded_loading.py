"""Loading and saving in shards: each rank's own slice bit for bit, ties, renamed and converted weights, errors, memory."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.weight_files import stored_tensors, weight_files
from tests.distributed.spawn import run_ranks
from tests.models.tiny import tiny_llama, write_tiny_llama
from tests.models.tiny_families import FAMILIES
from tests.models.tiny_gguf import write_tiny_gguf

# Whose experts lie apart in their files, and in one parameter in memory.
STACKED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def save(model: Any, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Tied, and with sizes that neither 2 nor 3 divides."""
    write_tiny_llama(
        tmp_path / "llama", tie=True, hidden=52, heads=2, intermediate=161, vocab=389, layers=2, max_shard_size="99KB"
    )
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    return tmp_path / "llama"


def test_every_rank_reads_its_own_slice_only(llama: Path, tmp_path: Path) -> None:
    both = write_tiny_llama(tmp_path / "both", tie=True, layers=1)
    rewrite(both, lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()})
    different = write_tiny_llama(tmp_path / "different", tie=True, layers=1)
    rewrite(different, lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"] * 2})
    plain = write_tiny_llama(tmp_path / "plain", layers=1)
    rewrite(plain, lambda found: {**found, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    gpt2 = tmp_path / "without_prefix"
    FAMILIES["gpt2"].make().save_pretrained(gpt2)
    rewrite(gpt2, lambda found: {name.removeprefix("transformer."): tensor for name, tensor in found.items()})
    tied = {"name_or_path": str(llama)}
    given: dict[str, dict[str, Any]] = {
        "tied": {**tied, "max_file_bytes": 100_000},
        "bf16, offloaded": {**tied, "dtype": "bfloat16", "zero": {"offload_param": {"device": "cpu"}}},
        "both stored": {"name_or_path": str(both)},
        "both stored, different": {"name_or_path": str(different)},
        "old buffers": {"name_or_path": str(plain)},
        "without prefix": {"name_or_path": str(gpt2)},
    }
    given["mixtral"] = of_family("mixtral", tmp_path)
    if importlib.util.find_spec("gguf") is not None:
        (tmp_path / "gguf").mkdir()
        write_tiny_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_llama(layers=1))
        given["gguf"] = {"name_or_path": str(tmp_path / "gguf"), "gguf_file": "tiny.gguf"}
    found = run_ranks("tests.models.sharded_workers:cases", 3, folders=given, out=str(tmp_path / "out"))
    assert found["tied"]["files"] > 2
    check_said(found)


@pytest.mark.slow
def test_every_family_is_loaded_and_saved_in_shards(tmp_path: Path) -> None:
    given = {name: of_family(name, tmp_path) for name, family in FAMILIES.items() if not family.classifies}
    check_said(run_ranks("tests.models.sharded_workers:cases", 2, folders=given, out=str(tmp_path / "out")))


@pytest.mark.slow
def test_with_hpz_every_node_has_a_copy(llama: Path, tmp_path: Path) -> None:
    given = {"hpz": {"name_or_path": str(llama), "zero": {"zero_hpz_partition_size": 2}}}
    check_said(run_ranks("tests.models.sharded_workers:cases", 4, folders=given, out=str(tmp_path / "out")))


def of_family(name: str, folder: Path) -> dict[str, Any]:
    """A tiny model of it, as transformers saves it."""
    return {"name_or_path": save(FAMILIES[name].make(), folder / name), "attention": "eager"}


def check_said(found: dict[str, Any]) -> None:
    """Assert that a rank held the whole model where its files have another form, and nowhere else."""
    for case, entry in found.items():
        if case in STACKED:
            assert "weights apart that transformers stacks" in " ".join(entry["said"]), case
            assert "rank 0 holds the whole model" in " ".join(entry["said"]), case
            assert "saved in another form" in " ".join(entry["saving"]), case
        elif case == "gguf":
            assert "tiny.gguf is a GGUF file" in entry["said"][0]
        else:
            assert not entry["said"], case
            assert not entry["saving"], case


def test_what_cannot_be_loaded_fails_on_all_ranks_together(llama: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> str:
        folder = write_tiny_llama(tmp_path / name, layers=1)
        rewrite(folder, change)
        return str(folder)

    first = "model.layers.0.self_attn.q_proj.weight"
    cut = write_tiny_llama(tmp_path / "cut", layers=1)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-5])
    untied = tmp_path / "untied"
    shutil.copytree(llama, untied)
    settings = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    folders = {
        "untied": str(untied),
        "missing": broken("missing", lambda found: {name: each for name, each in found.items() if name != first}),
        "unexpected": broken("unexpected", lambda found: {**found, "model.layers.7.more": torch.ones(3)}),
        "mismatched": broken("mismatched", lambda found: {**found, first: found[first][:-1].clone()}),
        "cut": str(cut),
    }
    found = run_ranks("tests.models.sharded_workers:errors", 2, folders=folders, broken_on_last=str(llama))
    for case, said in {
        "untied": "has 1 missing weights (lm_head.weight)",
        "missing": f"has 1 missing weights ({first})",
        "unexpected": "has 1 unexpected weights (model.layers.7.more)",
        "mismatched": f"has 1 mismatched weights ({first})",
        "cut": "copy or download it again",
    }.items():
        assert [kind for kind, _ in found[case]] == ["InputError", "PeerError"]
        assert said in found[case][0][1]
    assert [kind for kind, _ in found["one rank"]] == ["PeerError", "InputError"]
    assert "it ends too early" in found["one rank"][1][1]


def test_a_tensor_is_where_the_header_says(tmp_path: Path) -> None:
    save(tiny_llama(layers=1), tmp_path / "model")
    found = stored_tensors(weight_files(tmp_path / "model"))
    wanted = load_file(tmp_path / "model" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, stored in found.items():
        content = stored.path.read_bytes()[stored.offset :]
        assert stored.shape == tuple(wanted[name].shape)
        assert torch.equal(torch.frombuffer(bytearray(content[: wanted[name].nbytes]), dtype=torch.float32),
                           wanted[name].flatten())  # fmt: skip


@pytest.mark.slow
def test_a_rank_holds_half_of_the_model_at_most(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", hidden=1024, intermediate=2816, layers=3, vocab=8000)
    write_tiny_llama(folder / "small")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 200e6
    for sharded in (True, False):
        found = run_ranks(
            "tests.models.sharded_workers:peaks", 2, folder=str(folder), out=str(tmp_path / "out"), sharded=sharded
        )
        for entry in found:
            if sharded:
                assert entry["loading"] < 0.65 * size
                assert entry["saving"] < 0.35 * size
            else:
                assert entry["loading"] > size
