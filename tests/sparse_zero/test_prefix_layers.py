"""Is a forward pass that starts above the lowest layers the same as a whole one, in every family?"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from models.collate import collate
from models.data import TokenizedSample
from models.families import KNOWN_FAMILIES, can_pack
from sparse_zero.errors import InputError
from sparse_zero.prefix.cache import PrefixCache
from sparse_zero.prefix.layers import (
    PrefixLayers,
    from_tokens,
    layer_list,
    lowest_trained,
    random_setting,
    to_tokens,
)
from sparse_zero.prefix.store import SampleStore
from sparse_zero.selection.config import Kind
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES

LENGTHS = (5, 9, 7)
DECODERS = sorted(
    name for name, family in FAMILIES.items() if family.model_type in KNOWN_FAMILIES and not family.classifies
)


def make_batch(batching: str, order: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in LENGTHS]
    batch = collate([TokenizedSample(ids[index], ids[index]) for index in order], batching=batching, pad_token_id=0)  # type: ignore[arg-type]
    del batch["labels"]
    return batch


def logits_of(model, batch: dict[str, Tensor]) -> Tensor:
    """[tokens, V], without padding."""
    logits = model(**batch, use_cache=False).logits
    return logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits[0]


@pytest.mark.parametrize("name", DECODERS)
def test_known_families_go_on_from_stored_states(name):
    model = FAMILIES[name].make().train().requires_grad_(False)
    layers = PrefixLayers(model, 1)
    calls: list[int] = []
    below = model.get_submodule(layer_list(model))[0]
    next(below.children()).register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch("pad")
    assert not layers.can_skip
    with layers.captured() as found:
        whole = logits_of(model, batch)
    states = to_tokens(found[0], LENGTHS, is_packed=False)
    num_calls = len(calls)
    with layers.skipped(from_tokens(torch.cat(states), LENGTHS, 9)):
        # Padding has no stored states: experts get fewer rows of it, which may be added up in another order.
        torch.testing.assert_close(logits_of(model, batch), whole, rtol=1e-5, atol=1e-5)
    # In another order, in one row: what was stored padded serves packed micro-batches.
    packed = make_batch("pack", (2, 0, 1))
    with layers.skipped(from_tokens(torch.cat([states[2], states[0], states[1]]), (7, 5, 9), None)):
        skipped = logits_of(model, packed)
    assert len(calls) == num_calls
    # What is behind the block is as it was.
    again = logits_of(model, packed)
    if can_pack(model):
        torch.testing.assert_close(skipped, again, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(skipped, again, rtol=1e-2, atol=1e-2)
    assert torch.equal(logits_of(model, batch), whole)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.get_submodule(layer_list(model))[1]._forward_pre_hooks


def test_a_forward_that_something_else_has_put_there_comes_back():
    model = tiny_llama().requires_grad_(False)
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)
    placed, layers = model.model.layers[0].forward, PrefixLayers(model, 2)
    with layers.captured() as found:
        logits_of(model, make_batch("pad"))
    with pytest.raises(ZeroDivisionError), layers.skipped(found[0]):
        raise ZeroDivisionError
    assert model.model.layers[0].forward is placed
    assert "forward" not in vars(model.model.layers[1])


def test_states_of_what_is_trained_are_refused():
    model = tiny_llama().requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(InputError, match="enters layer 2 is no plain hidden state"), PrefixLayers(model, 2).captured():
        logits_of(model, make_batch("pad"))
    with PrefixLayers(model, 2).captured() as found, torch.no_grad():
        logits_of(model, make_batch("pad"))
    assert found[0].shape == (3, 9, 64)


def select(model: nn.Module, pattern: str, kind: Kind = "row") -> None:
    chosen: dict[str, Any] = {} if kind == "whole" else {"score": "random", "per_matrix": 1}
    region = sz.RegionConfig(kind=kind, modules=(pattern,), **chosen)
    sz.sparsify(model, sz.select(model, None, sz.SelectionConfig(regions=(region,))))


@pytest.mark.parametrize(
    ("tie", "pattern", "kind", "number", "name"),
    [
        (False, "*.layers.{2,3}.*.q_proj", "row", 2, "model.layers.2.self_attn.q_proj.values_row"),
        (False, "*.up_proj", "row", 0, "model.layers.0.mlp.up_proj.values_row"),
        (False, "*.embed_tokens", "row", 0, "model.embed_tokens.sparse_weight.values_row"),
        # It is the embedding, too.
        (True, "lm_head", "row", 0, "model.embed_tokens.sparse_weight.values_row"),
        (False, "lm_head", "row", 3, "lm_head.values_row"),
        (False, "model.norm*", "whole", 3, "model.norm.sparse_weight.values_whole"),
        (False, "*.layers.1.input_layernorm*", "whole", 1, "model.layers.1.input_layernorm.sparse_weight.values_whole"),
    ],
)
def test_the_lowest_trained_layer(tie, pattern, kind, number, name):
    model = tiny_llama(tie=tie)
    select(model, pattern, kind)
    assert lowest_trained(model) == (number, name)


def test_models_whose_layers_are_not_plain_are_refused():
    model = tiny_llama()
    model.more = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(InputError, match="2 lists of layers"):
        layer_list(model)
    with pytest.raises(InputError, match="no list of layers"):
        layer_list(nn.Linear(2, 2))


def test_what_is_random_in_training_is_found():
    model = tiny_llama()
    assert random_setting(model, 4) is None
    model.model.layers[2].self_attn.attention_dropout = 0.25
    assert random_setting(model, 2) is None
    assert random_setting(model, 3) == "model.layers.2.self_attn.attention_dropout = 0.25"
    gpt2 = FAMILIES["gpt2"].make(embd_pdrop=0.125)
    assert random_setting(gpt2, 1) == "transformer.drop.p = 0.125"


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_the_cache_computes_once_and_gives_the_same_gradients(batching, tmp_path):
    reference, model = tiny_llama(vocab=64), tiny_llama(vocab=64)
    for each in (reference, model):
        select(each, "*.layers.{2,3}.*.{q_proj,down_proj}")
        each.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    store = SampleStore(tmp_path, 0, LENGTHS, 64 * 4)
    cache = PrefixCache(
        PrefixLayers(model, 2), store, LENGTHS,
        stored="compute", compute=torch.float32, is_packed=batching == "pack", together=False,
    )  # fmt: skip
    ran: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    for indices, counts in (((1, 0), [0, 2, 2]), ((2,), [0, 1, 1]), ((2, 1, 0), [3, 0, 0]), ((), [0, 0, 0])):
        if counts[0]:
            store.sync()
            store.refresh()
            ran.clear()
        batch = make_batch(batching, indices or (0,))
        with cache.forward(indices, batch["input_ids"]):
            found = logits_of(model, batch)
        if counts[0]:
            assert not ran
        if indices:
            wanted = logits_of(reference, batch)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            found.square().sum().backward()
            wanted.square().sum().backward()
        assert found.isfinite().all()
        assert cache.take_counts() == counts
    assert not ran
    for (name, one), other in zip(
        sz.trainable_parameters(model).items(), sz.trainable_parameters(reference).values(), strict=True
    ):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
        assert bool(one.grad.any())
