"""What does backward compute of a small Llama whose lowest trained layer is given? Counted, not modelled."""

import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

import sparse_zero as sz
from models.collate import collate
from models.data import IGNORED, TokenizedSample
from models.loading import checkpoint_activations
from models.loss import response_nll
from sparse_zero.zero.config import Placement
from tests.flop_counting import flop_counter
from tests.models.tiny import tiny_llama

NUM_LAYERS = 5
_LENGTHS = (24, 17)


def sparse_llama(lowest: int, placement: Placement, *, checkpointing: bool) -> Any:
    """Of every layer from ``lowest`` on, blocks of q, k and v, rows of up and columns of down are trained."""
    model = tiny_llama(layers=NUM_LAYERS).train()
    families = {"block": "*.{q,k,v}_proj", "row": "*.up_proj", "column": "*.down_proj"}
    regions = tuple(
        sz.RegionConfig(
            kind=kind,  # type: ignore[arg-type]
            modules=(modules,),
            block_size=16 if kind == "block" else None,
            min_layer=lowest,
            per_matrix=2,
        )
        for kind, modules in families.items()
    )
    selection = sz.select(model, None, sz.SelectionConfig(regions=regions, score="random"))
    sz.sparsify(model, selection, placement)
    if checkpointing:
        checkpoint_activations(model)
    return model


def make_batch(batching: Literal["pad", "pack"]) -> dict[str, Tensor]:
    """Two samples, of which the second half is learned."""
    samples = [
        TokenizedSample(list(range(9, 9 + n)), [IGNORED] * (n // 2) + list(range(9 + n // 2, 9 + n))) for n in _LENGTHS
    ]
    return collate(samples, batching=batching, pad_token_id=3)


def backward_flops(model: Any, batch: dict[str, Tensor], backward: Callable[[Tensor], object]) -> int:
    """Floating-point operations of the matrix products from the loss down, what is recomputed among them."""
    loss = response_nll(model, batch)
    with flop_counter() as counter:
        backward(loss)
    return int(counter.get_total_flops())


def forward_flops() -> int:
    """Those of one decoder layer's linears for the packed batch."""
    layer = tiny_llama(layers=1).model.layers[0]
    entries = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    return 2 * sum(_LENGTHS) * entries


def checkpointed_inputs_alive(model: Any, batch: dict[str, Tensor]) -> list[bool]:
    """By layer, whether what went into it is still held when forward is over and backward is to come."""
    held: list[weakref.ref[Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: held.append(weakref.ref(args[0])))
        for layer in model.model.layers
    ]
    loss = response_nll(model, batch)
    found = [reference() is not None for reference in held]
    loss.backward()
    for handle in handles:
        handle.remove()
    return found
