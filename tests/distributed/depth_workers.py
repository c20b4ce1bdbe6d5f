"""What the spawned ranks do in the tests of how deep backward goes: count its operations under an engine."""

from itertools import product

from tests.distributed.workers import make_engine
from tests.models.depth_cost import NUM_LAYERS, backward_flops, make_batch, sparse_llama


def flops_under_engines() -> list[dict[str, object]]:
    """Of stages and ways to train, the operations of backward, by the engine and by autograd alone."""
    report = []
    for stage, (placement, checkpointing, batching), lowest in product(
        (0, 1, 2, 3),
        (("inplace", False, "pack"), ("inplace", True, "pad"), ("delta", True, "pack")),
        (1, NUM_LAYERS - 1),
    ):
        batch = make_batch(batching)  # type: ignore[arg-type]
        plain = sparse_llama(lowest, placement, checkpointing=checkpointing)  # type: ignore[arg-type]
        expected = backward_flops(plain, batch, lambda loss: loss.backward())
        model = sparse_llama(lowest, placement, checkpointing=checkpointing)  # type: ignore[arg-type]
        engine = make_engine(model, stage, 1, 1)
        engine.train()
        found = backward_flops(engine, batch, engine.backward)
        engine.step()
        engine.destroy()
        case = f"stage {stage}, {placement}, checkpointing {checkpointing}, {batching}, from layer {lowest}"
        report.append({"case": case, "expected": expected, "found": found})
    return report
