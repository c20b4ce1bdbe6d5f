"""Does backward stop at the lowest trained layer, whatever the placement, the batching and what is recomputed?"""

from itertools import pairwise

import pytest

from tests.models.depth_cost import (
    NUM_LAYERS,
    backward_flops,
    checkpointed_inputs_alive,
    forward_flops,
    make_batch,
    sparse_llama,
)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batching", ["pad", "pack"])
@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_every_layer_below_the_lowest_trained_one_saves_its_whole_backward(placement, batching, checkpointing):
    batch = make_batch(batching)
    flops = [
        backward_flops(
            sparse_llama(lowest, placement, checkpointing=checkpointing), batch, lambda loss: loss.backward()
        )
        for lowest in range(NUM_LAYERS)
    ]
    saved = [upper - lower for upper, lower in pairwise(flops)]
    # All layers are alike, so each saves the same: the input gradients of its linears, the values' gradients, and what
    # would be computed again for them.
    assert len(set(saved)) == 1
    # Nothing runs from the lowest trained layer down: its own share is less than what a further layer takes.
    head = 2 * 2 * batch["labels"].numel() * 64 * 384
    assert flops[-1] - head < saved[0]
    assert saved[0] > forward_flops() * (2 if checkpointing else 1)


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_frozen_lower_layers_keep_no_checkpoint(placement):
    model = sparse_llama(3, placement, checkpointing=True)
    assert checkpointed_inputs_alive(model, make_batch("pad")) == [False, False, False, True, True]
