"""Is a loss in chunks the loss, with the same gradients, whatever the head is, and does it hold as little as it should?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zero as sz
from models.chunked_loss import PLAIN_HEADS, LossChunkWarning, chunked_nll, warn_of_chunks, why_at_once
from models.data import IGNORED
from models.loss import response_nll
from sparse_zero.memory.simulation.recorder import MemoryRecorder
from tests.distributed.spawn import run_ranks
from tests.models.tiny_families import FAMILIES, SMALL, TinyFamily

MORE = ("olmo", "olmo2", "phi3", "smollm3", "stablelm", "qwen3_moe")


def batch_of(rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Padded rows with prompts of different lengths."""
    torch.manual_seed(4)
    tokens = torch.randint(3, SMALL["vocab_size"], (rows, length))
    labels = tokens.clone()
    for row in range(rows):
        labels[row, : 2 + 2 * row] = IGNORED
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def loss_and_gradients(model: Any, chunk: int | None, factor: float = 0.37) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = response_nll(model, batch_of(), chunk=chunk)
    (loss * factor).backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def check_equal(model: Any, chunk: int) -> None:
    expected, wanted = loss_and_gradients(model, None)
    loss, found = loss_and_gradients(model, chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=3e-6 * scale, msg=name)


def frozen_head(model: Any) -> Any:
    model.get_output_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", sorted(PLAIN_HEADS))
def test_every_family_that_is_taken_for_plain_is(kind: str) -> None:
    family = FAMILIES.get(kind) or TinyFamily(model_type=kind, matrices={}, vectors=(), changes={})
    model = frozen_head(family.make())
    assert why_at_once(model) is None
    check_equal(model, 4)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "opt"])
def test_a_family_that_changes_its_logits_is_computed_at_once(kind: str) -> None:
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {}
    model = frozen_head(TinyFamily(model_type=kind, matrices={}, vectors=(), changes=changes).make())
    assert "is not known" in str(why_at_once(model))
    warn_of_chunks(model, None)
    with pytest.warns(LossChunkWarning, match=r"^training\.loss_chunk is 4, .* is not known"):
        warn_of_chunks(model, 4)
    check_equal(model, 4)


def test_a_capped_family_would_fail_in_chunks_and_not_train_on_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.chunked_loss.PLAIN_HEADS", frozenset({"gemma2"}))
    with pytest.raises(TypeError):
        response_nll(frozen_head(FAMILIES["gemma2"].make()), batch_of(), chunk=4)


def sparse(placement: Any, name: str, regions: list[dict[str, Any]], family: str = "llama") -> Any:
    model = FAMILIES[family].make()
    chosen = [sz.RegionConfig(modules=(name,), **region) for region in regions]
    chosen.append(sz.RegionConfig(kind="row", modules=("*.q_proj",), per_matrix=2))
    selection = sz.select(model, None, sz.SelectionConfig(regions=tuple(chosen), score="random"))
    sz.sparsify(model, selection, placement)
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(0.05 * torch.randn_like(values))
    sz.write_back(model)
    return model


@pytest.mark.parametrize("placement", ["inplace", "delta"])
@pytest.mark.parametrize(
    "regions",
    [[{"kind": "block", "block_size": 8, "per_matrix": 3}], [{"kind": "row", "per_matrix": 3}, {"kind": "column", "per_matrix": 2}]],
    ids=["blocks", "rows and columns"],
)  # fmt: skip
def test_a_head_with_trained_values(placement: str, regions: list[dict[str, Any]]) -> None:
    model = sparse(placement, "lm_head", regions)
    assert why_at_once(model) is None
    check_equal(model, 5)


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_a_tied_head_in_chunks_unless_the_embedding_is_trained(placement: str) -> None:
    plain = frozen_head(FAMILIES["llama_tied"].make())
    assert why_at_once(plain) is None
    check_equal(plain, 4)
    model = sparse(placement, "*embed_tokens", [{"kind": "row", "per_matrix": 3}], "llama_tied")
    assert "whole parameter" in str(why_at_once(model))
    check_equal(model, 4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2), (torch.float16, 3e-3)]
)
def test_hidden_states_get_the_gradient_of_the_plain_loss(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(16, 50, bias=True).to(dtype)
    head.weight.requires_grad_(False)
    targets = torch.randint(50, (37,))
    targets[3:9] = IGNORED

    def reference() -> Tensor:
        logits = torch.nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double())
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    inputs = (hidden, head.bias)
    wanted = torch.autograd.grad(reference() * 0.3, inputs)
    found = torch.autograd.grad(chunked_nll(head, hidden, targets, chunk, [head.bias]) * 0.3, inputs)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()
    assert not found[0][3:9].any()


def test_small_gradients_survive_in_fp16() -> None:
    """A probability of 1e-8 is no number of fp16; its share of the gradient is."""
    hidden = torch.full((1, 1), 1.0, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0], [-16.5]], dtype=torch.float16)

    def logits_of(x: Tensor) -> Tensor:
        return x @ weight.t()

    nll = chunked_nll(logits_of, hidden, torch.zeros(1, dtype=torch.int64), 1, [])
    (gradient,) = torch.autograd.grad(nll * 2.0**12, [hidden])
    assert gradient.item() == pytest.approx(-16.5 * 6.82e-8 * 2**12, rel=0.15)


def test_without_labels_and_without_gradients() -> None:
    model = frozen_head(FAMILIES["llama"].make())
    batch = batch_of()
    with torch.no_grad():
        expected = response_nll(model, batch)
        torch.testing.assert_close(response_nll(model, batch, chunk=2), expected, rtol=1e-6, atol=0)
    batch["labels"].fill_(IGNORED)
    loss = response_nll(model, batch, chunk=1)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(each.grad.any() for each in model.parameters() if each.grad is not None)
    assert "forward" not in vars(model.lm_head)


def test_only_one_chunk_of_logits_lives() -> None:
    num, vocabulary, width, chunk = 64, 4096, 8, 8
    hidden = torch.randn(num, width, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    targets = torch.randint(vocabulary, (num,))
    with MemoryRecorder() as recorder:
        # What is there before is counted when it is first used.
        before = hidden.nbytes + head.weight.nbytes + targets.nbytes
        loss = chunked_nll(head, hidden, targets, chunk, [])
        kept, peak = recorder.live_bytes - before, recorder.peak_bytes - before
        loss.backward()
    assert peak < 8 * chunk * vocabulary * 1.02 + 2 * hidden.nbytes
    assert 0 < kept < hidden.nbytes + 64
    assert recorder.peak_bytes - before == peak


def test_ranks_of_zero_3_get_the_gradients_of_one_process() -> None:
    cases = run_ranks("tests.models.loss_workers:losses", 2)
    assert len(cases) == 8
    for name, (difference, loss_difference) in cases.items():
        assert difference < 2e-5, name
        assert loss_difference < 1e-6, name
