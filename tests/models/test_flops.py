"""Does the count of a step's operations agree with what torch counts while real models run?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparse_zero as sz
from models.families import KNOWN_FAMILIES, module_map
from models.loading import checkpoint_activations
from models.loss import nll_at
from sparse_zero.flops import FlopShape, flop_shape, step_flops
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.zero.config import Placement
from tests.flop_counting import flop_counter
from tests.models.tiny_families import EXPERTS, FAMILIES, TinyFamily

LENGTH, ROWS = 32, 2
# Torch counts no grouped products of experts, so that these run one by one. Of all others: Llama 4 multiplies zeros
# with the experts that a token does not meet, and DBRX has all experts in one matrix.
WITH_EXPERTS = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
NOT_COMPARED = ("dbrx", "llama4_text")


def tiny(kind: str, **changes: Any) -> Any:
    bare = TinyFamily(model_type=kind, matrices={}, vectors=(), changes={**EXPERTS, "num_experts": 4})
    experts = {"experts_implementation": "eager"} if kind in WITH_EXPERTS else {}
    return FAMILIES.get(kind, bare).make(**changes, **experts)


def counted(model: Any, *, positions: int | None = None, backward: bool = True) -> int:
    """What torch counts in a step over rows without padding; logits at so many positions of each row, or all."""
    ids = torch.randint(3, 48, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with flop_counter() as counter:
        if positions is None:
            loss = model(input_ids=ids).logits.sum()
        else:
            loss = nll_at(model, {"input_ids": ids, "labels": ids}, torch.arange(LENGTH - 1 - positions, LENGTH - 1))
        if backward:
            loss.backward()
    return int(counter.get_total_flops())


def of_rows(shape: FlopShape, positions: int = LENGTH, **options: Any) -> Any:
    return step_flops(shape, sample_lengths=[LENGTH] * ROWS, num_head_positions=ROWS * positions, **options)


def select(model: nn.Module, parts: dict[str, dict[str, Any]], layers: range) -> sz.Selection:
    chosen = {}
    for layer in layers:
        for name, regions in parts.items():
            weight = f"model.layers.{layer}.{name}.weight"
            side_out, side_in = model.get_parameter(weight).shape
            chosen[weight] = WeightSelection(shape=(side_out, side_in), block_size=8, **regions)
    return sz.Selection(chosen)


@pytest.mark.parametrize("kind", sorted(KNOWN_FAMILIES.difference(NOT_COMPARED)))
def test_families_trained_whole_and_not_at_all(kind: str) -> None:
    model = tiny(kind)
    family = module_map(model)
    positions = 1 if FAMILIES.get(kind) is not None and FAMILIES[kind].classifies else LENGTH
    full = of_rows(flop_shape(model, family), positions)
    # One token of each row goes through a pooler, and through the head that classifies.
    assert full.total == pytest.approx(counted(model), rel=0.01)
    model.requires_grad_(False)
    frozen = of_rows(flop_shape(model, family), positions)
    assert frozen.total == pytest.approx(counted(model, backward=False), rel=0.01)
    assert frozen.input_gradients == frozen.values_gradients == 0


BLOCKS = {"blocks": torch.tensor([[0, 0], [1, 2], [1, 3]])}
SELECTIONS: dict[str, tuple[dict[str, dict[str, Any]], range]] = {
    "blocks": ({f"self_attn.{name}_proj": BLOCKS for name in "qkv"}, range(4)),
    "rows": ({f"self_attn.{name}_proj": {"rows": [0, 5]} for name in "qkv"}, range(4)),
    "columns": ({"mlp.gate_proj": {"columns": [1, 9, 11]}, "mlp.up_proj": {"columns": [4]}}, range(4)),
    "upper half": ({f"self_attn.{name}_proj": BLOCKS for name in "qkv"}, range(2, 4)),
    "last linears": ({"mlp.down_proj": {"rows": [1], "columns": [2]}}, range(2, 4)),
    "top": ({"self_attn.o_proj": {"blocks": torch.tensor([[0, 1]])}}, range(3, 4)),
}


@pytest.mark.parametrize("placement", ["inplace", "delta"])
@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_selected_parts(name: str, placement: Placement) -> None:
    model = tiny("llama", num_hidden_layers=4)
    dense = flop_shape(model)
    parts, layers = SELECTIONS[name]
    selection = select(model, parts, layers)
    sz.sparsify(model, selection, placement=placement)
    shape = flop_shape(model)
    steps = of_rows(shape, 5)
    assert steps.total == pytest.approx(counted(model, positions=5), rel=0.01)
    # The same from the selection alone, before the model is sparse.
    numbers = {weight: chosen.num_parameters for weight, chosen in selection.weights.items()}
    assert dense.with_values(numbers, is_delta=placement == "delta") == shape
    assert steps.recomputed == 0


def test_gradient_checkpointing_runs_the_layers_of_backward_again() -> None:
    model = tiny("llama", num_hidden_layers=4)
    parts, layers = SELECTIONS["upper half"]
    sz.sparsify(model, select(model, parts, layers))
    plain = counted(model, positions=5)
    model.train()
    checkpoint_activations(model)
    steps = of_rows(flop_shape(model), 5, gradient_checkpointing=True)
    again = counted(model, positions=5) - plain
    # Of each layer torch leaves out the last linear, whose output nobody reads.
    last = 2 * 2 * ROWS * LENGTH * 32 * 48
    assert again == pytest.approx(steps.recomputed - last, rel=0.01)
    assert steps.total == pytest.approx(plain, rel=0.01)


def test_layers_that_are_not_run() -> None:
    model = tiny("llama", num_hidden_layers=4)
    parts, layers = SELECTIONS["upper half"]
    sz.sparsify(model, select(model, parts, layers))
    shape = flop_shape(model)
    whole, upper = of_rows(shape), of_rows(shape, first_layer=2)
    assert whole.forward == 2 * upper.forward
    assert (whole.input_gradients, whole.head) == (upper.input_gradients, upper.head)
    with pytest.raises(ValueError, match="first_layer is 3"):
        of_rows(shape, first_layer=3)
    model.get_parameter("model.layers.2.input_layernorm.weight").requires_grad_()
    norm = flop_shape(model)
    assert of_rows(norm, first_layer=2).forward == upper.forward
    with pytest.raises(ValueError, match="first_layer is 3"):
        of_rows(norm, first_layer=3)


def test_windows_and_samples() -> None:
    config = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    shape = flop_shape(tiny("gemma3_text", **config).requires_grad_(False))
    assert shape.windows == {0: 16}
    apart = step_flops(shape, sample_lengths=[40, 8], num_head_positions=1)
    together = step_flops(shape, sample_lengths=[48], num_head_positions=1)
    # 4 operations for each pair and each of the 32 features of all heads.
    pairs = 48 * 16 + 48 * 48 - (40 * 16 + 8 * 8) - (40 * 40 + 8 * 8)
    assert together.forward - apart.forward == 4 * 32 * pairs


def test_full_training_is_six_operations_for_each_parameter_and_token() -> None:
    model = tiny("llama")
    matrices = sum(each.numel() for name, each in model.named_parameters() if each.ndim == 2 and "embed" not in name)
    attention = 12 * 2 * 32 * LENGTH
    assert of_rows(flop_shape(model)).total == ROWS * LENGTH * (6 * matrices + attention)


def test_what_is_trained_decides_where_backward_ends() -> None:
    """An embedding, a norm of a layer, the last norm, the head."""
    model = tiny("llama", num_hidden_layers=4).requires_grad_(False)
    found = {}
    for name in ("model.embed_tokens", "model.layers.2.input_layernorm", "model.norm", "lm_head"):
        parameter = model.get_parameter(f"{name}.weight").requires_grad_()
        found[name] = of_rows(flop_shape(model))
        assert found[name].total == pytest.approx(counted(model), rel=0.01), name
        parameter.requires_grad_(False)
    assert found["lm_head"].input_gradients == found["model.norm"].input_gradients == 0
    assert found["model.embed_tokens"].input_gradients == 2 * found["model.layers.2.input_layernorm"].input_gradients


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_trained_in_one_layer(name: str) -> None:
    """Backward ends at the experts, whichever matrix of theirs is trained."""
    model = tiny("mixtral").requires_grad_(False)
    model.get_parameter(f"model.layers.1.mlp.experts.{name}").requires_grad_()
    assert of_rows(flop_shape(model)).total == pytest.approx(counted(model), rel=0.01)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.9\.mlp\.up_proj\.weight' is no matrix"):
        flop_shape(tiny("llama")).with_values({"model.layers.9.mlp.up_proj.weight": 3})
