"""Does a run that computes its frozen lowest layers once train as one that computes them in every step?"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.spawn import run_program
from tests.launcher.test_train import rows, write_config

# 40 samples in global batches of 6: the last batch of an epoch has 4, and the third epoch ends early.
PER_EPOCH, STEPS = 7, 16
UPPER = [
    {"kind": "block", "modules": ["*.layers.{2,3}.self_attn.{q,k,v}_proj"], "block_size": 8},
    {"kind": "row", "modules": ["*.layers.3.mlp.up_proj"], "per_matrix": 2},
]


def write_run(base: Path, folder: Path, *, cache: dict[str, Any] | None, **changes: Any) -> Path:
    folder.mkdir()
    settings: dict[str, Any] = {
        "training__steps": STEPS,
        "training__validation_every": 5,
        "training__micro_batch_size": 1,
        "training__prefix_cache": cache,
        "selection__regions": UPPER,
        "selection__budget": {"fraction": 0.03},
        "checkpoint": {"every": 5, "keep": 10},
        "output": {"folder": str(folder / "run")},
    }
    return write_config(base, folder, **{**settings, **changes})


def start(config: Path, folder: Path, world_size: int = 1, code: int = 0) -> str:
    """Run the ranks, forked from a process that has imported everything; what they said."""
    return run_program("launcher.train", ["--config", str(config)], num_ranks=world_size, folder=folder, code=code)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)] + [row["loss"] for row in rows(folder, "validation")]


def counts(folder: Path) -> list[tuple[int, int, int]]:
    names = ("cached_samples", "computed_samples", "stored_samples")
    return [tuple(row[name] for name in names) for row in rows(folder)]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, padded": (1, {"data__batching": "pad", "training__micro_batch_size": 2}),
    "one process, packed, delta": (1, {"zero__placement": "delta", "training__micro_batch_size": 3}),
    "2 ranks, padded, recomputing": (
        2,
        {"data__batching": "pad", "training__gradient_checkpointing": True, "training__micro_batch_size": 2},
    ),
    "2 ranks, stage 3, packed": (2, {"zero__stage": 3}),
    "2 ranks, stage 3, padded, recomputing, delta": (
        2,
        {
            "zero__stage": 3,
            "data__batching": "pad",
            "zero__placement": "delta",
            "training__gradient_checkpointing": True,
            "training__micro_batch_size": 2,
        },
    ),
    "2 ranks, stage 0": (2, {"zero__stage": 0}),
    # The last global batch of an epoch leaves ranks without samples.
    "3 ranks, stage 1": (3, {"zero__stage": 1, "training__micro_batch_size": 2}),
}


FAST = ("one process, padded", "2 ranks, stage 3, packed")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_run_with_the_cache_has_the_losses_of_one_without(case, base, tmp_path):
    world_size, changes = CASES[case]
    caches: dict[str, dict[str, Any] | None] = {"plain": None, "cached": {}}
    for name, cache in caches.items():
        start(write_run(base, tmp_path / name, cache=cache, **changes), tmp_path / name, world_size)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    found = counts(tmp_path / "cached")
    # The first epoch computes and stores everything, the others nothing.
    assert found == [(0, 6, 6)] * 6 + [(0, 4, 4)] + ([(6, 0, 0)] * 6 + [(4, 0, 0)] + [(6, 0, 0)] * 2)
    run = tmp_path / "cached" / "run"
    told = json.loads((run / "summary.json").read_text())["prefix_cache"]
    assert told["layers"] == 2
    assert told["hit_share"] == 52 / 92
    tokens = told["bytes"] / (64 * 4)
    assert tokens == int(tokens) > 40 * 20
    assert not (run / "prefix_cache").exists()
    assert (run / "adapter").is_dir()
    assert "cached_samples" not in rows(tmp_path / "plain")[0]


@pytest.mark.slow
def test_a_bounded_cache_stores_the_first_samples_and_ranks_agree_at_stage_3(base, tmp_path):
    # About half of the samples: some micro-batches are known to one rank only, and both compute them.
    cache = {"max_gib": 300_000 / 2**30, "keep": True}
    for name, settings in {"plain": None, "cached": cache}.items():
        start(write_run(base, tmp_path / name, cache=settings, zero__stage=3), tmp_path / name, 2)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=2e-6)
    run = tmp_path / "cached" / "run"
    told = json.loads((run / "summary.json").read_text())["prefix_cache"]
    assert 250_000 < told["bytes"] <= 300_000
    found = counts(tmp_path / "cached")
    assert 10 < told["stored_samples"] == sum(stored for _, _, stored in found[:PER_EPOCH]) < 30
    second = found[PER_EPOCH : 2 * PER_EPOCH]
    assert [stored for _, _, stored in second] == [0] * PER_EPOCH
    assert all(cached + computed in (4, 6) for cached, computed, _ in second)
    # Some stored samples stand beside one that is not, at most one in a step.
    assert told["stored_samples"] - PER_EPOCH <= sum(cached for cached, _, _ in second) < told["stored_samples"]
    files = sorted((run / "prefix_cache").iterdir())
    assert [path.name for path in files] == [
        "meta.json", "rank-00000.bin", "rank-00000.done", "rank-00001.bin", "rank-00001.done",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kept(base, tmp_path_factory):
    """A run of one process that leaves its cache."""
    folder = tmp_path_factory.mktemp("kept") / "whole"
    said = start(write_run(base, folder, cache={"keep": True}), folder)
    return folder, said


def continued(base: Path, kept: Path, folder: Path, cache: dict[str, Any], **changes: Any) -> str:
    """The run from its checkpoint after step 10, in the middle of the second epoch, with ``cache``."""
    resume = str(kept / "run" / "checkpoints" / "step-000010")
    checkpoint = {"every": 5, "keep": 10, "resume": resume}
    said = start(write_run(base, folder, cache=cache, checkpoint=checkpoint, **changes), folder)
    assert [row["step"] for row in rows(folder)] == list(range(11, STEPS + 1))
    return said


@pytest.mark.slow
def test_a_start_in_the_middle_of_an_epoch_uses_what_is_there_and_stores_what_is_not(base, kept, tmp_path):
    folder, said = kept
    assert "frozen-prefix cache: 2 layers are computed once" in said
    wanted = [row["loss"] for row in rows(folder)][10:]
    cache = tmp_path / "cache"
    shutil.copytree(folder / "run" / "prefix_cache", cache)
    continued(base, folder, tmp_path / "with", {"folder": str(cache), "keep": True})
    assert [row["loss"] for row in rows(tmp_path / "with")] == pytest.approx(wanted, rel=1e-6)
    # The first micro-batch tells what the layers return.
    assert counts(tmp_path / "with") == [(5, 1, 0)] + [(6, 0, 0)] * 2 + [(4, 0, 0)] + [(6, 0, 0)] * 2
    # Half of the bits are taken away: those samples are stored again, the others read.
    done = cache / "rank-00000.done"
    done.write_bytes(bytes([0b10101010] * 5))
    continued(base, folder, tmp_path / "half", {"folder": str(cache), "keep": True})
    assert [row["loss"] for row in rows(tmp_path / "half")] == pytest.approx(wanted, rel=1e-6)
    found = counts(tmp_path / "half")
    assert found[0][2] + found[1][2] + found[2][2] + found[3][2] > 6
    assert all(cached + computed == (4 if step == 3 else 6) for step, (cached, computed, _) in enumerate(found))
    # Nothing is there.
    continued(base, folder, tmp_path / "without", {"folder": str(tmp_path / "new")})
    assert [row["loss"] for row in rows(tmp_path / "without")] == pytest.approx(wanted, rel=1e-6)
    assert counts(tmp_path / "without")[:4] == [(0, 6, 6)] * 3 + [(0, 4, 4)]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_full_disk_ends_storing_and_not_the_run(base, kept, tmp_path):
    folder, _ = kept
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(folder / "run" / "prefix_cache" / "meta.json", cache)
    (cache / "rank-00000.bin").symlink_to("/dev/full")
    said = continued(base, folder, tmp_path / "full", {"folder": str(cache)})
    assert said.count("takes no more of rank 0 (No space left on device)") == 1
    assert [row["loss"] for row in rows(tmp_path / "full")] == [row["loss"] for row in rows(folder)][10:]
    assert counts(tmp_path / "full") == [(0, 6, 0)] * 3 + [(0, 4, 0)] + [(0, 6, 0)] * 2


@pytest.mark.slow
def test_a_cache_of_something_else_is_thrown_away_by_name(base, kept, tmp_path):
    folder, _ = kept
    cache = tmp_path / "cache"
    shutil.copytree(folder / "run" / "prefix_cache", cache)
    said = continued(base, folder, tmp_path / "smaller", {"folder": str(cache), "dtype": "float8", "keep": True})
    assert "is of another dtype: it is thrown away" in said
    assert counts(tmp_path / "smaller")[0] == (0, 6, 6)
    assert json.loads((cache / "meta.json").read_text())["dtype"] == "float8"
    wanted = [row["loss"] for row in rows(folder)][10:]
    found = [row["loss"] for row in rows(tmp_path / "smaller")]
    # Rounded numbers are read from the third epoch on.
    assert found[:4] == pytest.approx(wanted[:4], rel=1e-6)
    assert found[4:] == pytest.approx(wanted[4:], rel=1e-2)
    assert found[4:] != pytest.approx(wanted[4:], rel=1e-6)
    (cache / "meta.json").write_text("{}")
    other = write_run(base, tmp_path / "other", cache={"folder": str(cache)})
    assert "meta.json is of something else" in start(other, tmp_path / "other", code=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"selection__regions": [{"kind": "row", "modules": ["*.up_proj"], "per_matrix": 1}]},
            "set selection.min_depth, to 0.75 for the upper",
        ),
        ({"training__steps": PER_EPOCH}, "the run has no second epoch"),
        (
            {"cache": {"max_gib": 1e-7}},
            "training.prefix_cache.max_gib is 1e-07, which has no room for the first sample",
        ),
    ],
)
def test_a_cache_of_no_use_stays_off_with_a_warning(changes, says, base, tmp_path):
    config = write_run(base, tmp_path / "off", **{"cache": {}, **changes})
    # Of an earlier start, say, which had one.
    left = tmp_path / "off" / "run" / "prefix_cache"
    left.mkdir(parents=True)
    (left / "meta.json").write_text(json.dumps({"format": "sparse_zero prefix cache 1"}))
    (left / "rank-00002.bin").write_bytes(b"states")
    said = start(config, tmp_path / "off")
    assert "warning: training.prefix_cache is off: " in said
    assert says in said
    assert "cached_samples" not in rows(tmp_path / "off")[0]
    assert not (tmp_path / "off" / "run" / "prefix_cache").exists()


@pytest.mark.slow
def test_another_family_at_bfloat16_of_the_cache(base, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base / "model", tmp_path / "model")
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {
        "model__name_or_path": str(tmp_path / "model"),
        "selection__regions": [{"kind": "row", "modules": ["*.layers.{2,3}.*query_key_value"], "per_matrix": 2}],
        "selection__budget": None,
    }
    caches: dict[str, dict[str, Any] | None] = {"plain": None, "cached": {}, "small": {"dtype": "bfloat16"}}
    for name, cache in caches.items():
        start(write_run(base, tmp_path / name, cache=cache, **settings), tmp_path / name)
    wanted, small = losses(tmp_path / "plain"), losses(tmp_path / "small")
    assert losses(tmp_path / "cached") == pytest.approx(wanted, rel=1e-6)
    assert small == pytest.approx(wanted, rel=1e-3)
    assert small != pytest.approx(wanted, rel=1e-6)
    sizes = [
        json.loads((tmp_path / name / "run" / "summary.json").read_text())["prefix_cache"]["bytes"]
        for name in ("cached", "small")
    ]
    assert sizes[0] == 2 * sizes[1]
