"""Does a selection at Llama-2-7B keep from forward no more than the frozen model, and what it trains reads?

On tensors without data, without gradient checkpointing. ``-s`` shows the table of docs/speed/around_the_step.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparse_zero as sz
from models.families import module_map
from models.loss import nll_at
from models.peer_models import make_peer
from sparse_zero.memory.simulation.simulate import simulated
from sparse_zero.selection.config import RegionConfig, SelectionConfig
from tests.models.decoders import decoder

ROWS, LENGTH, LAYERS, WIDTH = 4, 512, 32, 4096
TOKENS, ELEMENT = ROWS * LENGTH, 2
LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": WIDTH,
    "intermediate_size": 11008,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QKV = ("*.{q,k,v}_proj",)
SELECTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"kind": "block", "block_size": 256, "per_matrix": 9},
    "rows": {"kind": "row", "per_matrix": 144},
    "columns": {"kind": "column", "per_matrix": 144},
}
GIB = 2**30


def kept_bytes(method: str) -> tuple[int, int]:
    """Of activations after forward; and bytes of the inputs that what is trained reads, for selections."""
    model = decoder("llama", **LLAMA_2_7B)
    own = 0
    if method in SELECTIONS:
        family = module_map(model)
        config = SelectionConfig(regions=(RegionConfig(modules=QKV, **SELECTIONS[method]),), score="random")
        selection = sz.select(model, None, config, module_map=family)
        own = sum(input_bytes(selection, layer) for layer in range(LAYERS))
        sz.sparsify(model, selection, module_map=family)
    elif method == "lora":
        make_peer(model, "lora", rank=16, targets=("q_proj", "k_proj", "v_proj"))
        model.to(torch.bfloat16)
    elif method == "frozen":
        model.requires_grad_(False)
        # The gradient of the first layer's input is formed, and of all others.
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    model.train()
    shape = (ROWS, LENGTH)
    with simulated(model) as recorder:
        before = recorder.live_bytes
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
        # Few logits: the layers are what is compared.
        loss = nll_at(model, batch, torch.arange(4))
        del batch
        kept = recorder.live_bytes - before
        del loss
    return kept, own


def input_bytes(selection: Any, layer: int) -> int:
    """Of the input of q, k and v: what of it each reads, or all of it once if that is less."""
    features = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        of = selection.weights[f"model.layers.{layer}.self_attn.{name}.weight"]
        entries = of.flat_indices(next(iter(of.kinds())))
        features += len(torch.unique(entries % WIDTH))
    return TOKENS * ELEMENT * min(features, WIDTH)


@pytest.mark.slow
# Of transformers, which PEFT asks.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_selections_keep_the_frozen_model_and_the_inputs_that_they_read() -> None:
    found = {method: kept_bytes(method) for method in ("frozen", *SELECTIONS, "lora", "full")}
    for method, (kept, own) in found.items():
        print(f"| {method} | {kept / GIB:.2f} | {own / GIB:.2f} |")
    floor = found["frozen"][0]
    for method in SELECTIONS:
        kept, own = found[method]
        # Positions of the values in the inputs are a few numbers for each layer.
        assert kept <= floor + own + LAYERS * 4096, method
        assert kept < found["lora"][0] < found["full"][0]
