"""Do padded and packed batches give a model the same samples?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.collate import collate, collate_pack, collate_pad, micro_batch, response_tokens
from models.data import IGNORED, TokenizedSample

VOCABULARY = 61


def make_sample(length: int, prompt_length: int = 0, seed: int = 0) -> TokenizedSample:
    ids = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedSample(ids, [IGNORED] * prompt_length + ids[prompt_length:])


def make_samples(lengths) -> list[TokenizedSample]:
    return [make_sample(length, length // 2, seed) for seed, length in enumerate(lengths)]


samples_of_any_length = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(make_samples)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def separate_logits(model, samples):
    return [model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0] for sample in samples]


@torch.no_grad()
def batch_logits(model, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits


def test_pad_places_tokens_masks_and_labels():
    batch = collate_pad([TokenizedSample([5, 6, 7], [IGNORED, 6, 7]), TokenizedSample([8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pack_restarts_positions_and_predicts_nothing_across_a_boundary():
    batch = collate_pack([TokenizedSample([5, 6, 7], [5, 6, 7]), TokenizedSample([8], [8]), make_sample(2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, *make_sample(2).input_ids]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, make_sample(2).labels[1]]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_chooses_by_name():
    samples = make_samples([3, 2])
    assert collate(samples, batching="pack", pad_token_id=0).keys() == collate_pack(samples).keys()
    assert torch.equal(
        collate(samples, batching="pad", pad_token_id=7)["input_ids"], collate_pad(samples, 7)["input_ids"]
    )


@settings(deadline=None, max_examples=50)
@given(samples=samples_of_any_length)
def test_response_tokens_is_what_shifted_labels_count(samples):
    expected = response_tokens(samples)
    assert expected == sum(response_tokens([sample]) for sample in samples)
    for batch in (collate_pad(samples, 0), collate_pack(samples)):
        assert int((batch["labels"][:, 1:] != IGNORED).sum()) == expected


LENGTHS = [[7], [1], [5, 3], [3, 5, 2], [1, 4], [4, 1], [1, 1], [1, 1, 1, 6], [2, 1, 1, 3, 1], [8, 8]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_logits_equal_those_of_separate_samples(model, lengths, batching):
    samples = make_samples(lengths)
    logits = batch_logits(model, collate(samples, batching=batching, pad_token_id=0))
    if batching == "pack":
        rows = list(logits[0].split(lengths))
    else:
        rows = [row[:length] for row, length in zip(logits, lengths, strict=True)]
    for row, expected in zip(rows, separate_logits(model, samples), strict=True):
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_summed_loss_and_gradient_equal_those_of_separate_samples(model, batching):
    samples = make_samples([6, 1, 3, 9])
    weight = model.model.layers[0].self_attn.q_proj.weight

    def loss_of(batch):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        targets = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")

    together = loss_of(collate(samples, batching=batching, pad_token_id=0))
    apart = sum(loss_of(collate_pad([sample], 0)) for sample in samples if len(sample.input_ids) > 1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    (gradient_together,) = torch.autograd.grad(together, weight)
    (gradient_apart,) = torch.autograd.grad(apart, weight)
    torch.testing.assert_close(gradient_together, gradient_apart, atol=1e-5, rtol=1e-4)


def test_empty_micro_batch_becomes_a_sample_without_loss():
    samples = make_samples([5, 3])
    assert micro_batch(samples, (1,)) == [samples[1]]
    (stand_in,) = micro_batch(samples, ())
    assert stand_in.input_ids == samples[0].input_ids[:2]
    assert response_tokens([stand_in]) == 0
    assert response_tokens(micro_batch(make_samples([1]), ())) == 0


@pytest.mark.parametrize("samples", [[], [TokenizedSample([], [])]], ids=["none", "without tokens"])
def test_nothing_to_collate_is_an_error(samples):
    for make in (collate_pack, lambda given: collate_pad(given, 0)):
        with pytest.raises(ValueError, match="at least one sample"):
            make(samples)
