"""Do the undocumented parts of transformers that models.compat uses still say what they are asked for?"""

import torch
from transformers import PreTrainedModel

from models import compat
from tests.models.tiny import tiny_llama
from tests.models.tiny_families import FAMILIES


def test_the_attributes_are_there() -> None:
    for name in (
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_get_dtype_plan",
    ):
        assert hasattr(PreTrainedModel, name), f"transformers has no {name} any more: see models/compat.py"


def test_names_of_a_checkpoint_become_the_models() -> None:
    model = tiny_llama(layers=1)
    own = list(model.state_dict())
    assert compat.transformers_names(model, own) == {name: name for name in own}
    # The prefix of the base model is added where a checkpoint has none, and strangers stay strangers.
    assert compat.transformers_names(model, ["norm.weight", "more"]) == {
        "norm.weight": "model.norm.weight",
        "more": "more",
    }
    _, unexpected = compat.ignored_names(model)
    assert any("inv_freq" in pattern for pattern in unexpected)
    assert not compat.keeps_float32(model, torch.bfloat16)


def test_weights_that_change_their_form_are_told() -> None:
    mixture = FAMILIES["mixtral"].make()
    described = {name: tensor.to("meta") for name, tensor in mixture.state_dict().items()}
    assert compat.saved_names(mixture, described) is None
    apart = [name.replace(".mlp.experts.gate_up_proj", ".block_sparse_moe.experts.0.w1.weight") for name in described]
    assert compat.transformers_names(mixture, apart) is None
    assert compat.transformers_names(mixture, described) == {name: name for name in described}
    llama = tiny_llama(layers=1)
    plain = {name: tensor.to("meta") for name, tensor in llama.state_dict().items()}
    assert compat.saved_names(llama, plain) == {name: name for name in plain}


def test_masks_are_decided_by_what_is_replaced() -> None:
    from transformers import masking_utils

    for name in ("is_tracing", "fast_all"):
        assert hasattr(masking_utils, name), "transformers decides otherwise now: see models/compat.py"
    before = masking_utils.is_tracing
    with compat.masks_of_fake_tensors():
        # Padding masks, and positions; not the embeddings.
        assert masking_utils.is_tracing(torch.ones(1, 2, dtype=torch.bool))
        assert masking_utils.is_tracing(torch.ones(1, 2, dtype=torch.int64))
        assert not masking_utils.is_tracing(torch.ones(1, 2))
    with compat.masks_of_fake_tensors(needed=False):
        assert not masking_utils.is_tracing(torch.ones(1, 2, dtype=torch.bool))
        assert masking_utils.fast_all(torch.zeros(1, 2, dtype=torch.bool, device="meta"))
    assert masking_utils.is_tracing is before
