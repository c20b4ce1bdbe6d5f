"""What do forward and backward hold beside the states: kept activations, logits, and what dies at once?"""

from __future__ import annotations

from sparse_zero.memory.decoder_shape import DecoderShape
from sparse_zero.memory.job import MemoryJob
from sparse_zero.memory.moments import Moment, Term
from sparse_zero.memory.trained import Trained


def activation_moments(shape: DecoderShape, job: MemoryJob, trained: Trained) -> list[Moment]:
    """The moments of forward and backward at which most may be held, without the states."""
    size, tokens, width = job.element_bytes, job.tokens, shape.hidden_size
    if job.gradient_checkpointing:
        kept = shape.num_layers * tokens * width * size
    else:
        # In and out of norms, q, k, v, attention's output, and three of the MLP's width.
        kept = shape.num_layers * tokens * size * (8 * width + 3 * shape.intermediate_size)
    logits = job.logit_rows * shape.vocab_size
    terms = (
        Term(name="kept activations", kind="activations", num_bytes=kept),
        Term(name="logits and loss", kind="logits", num_bytes=logits * (size + 4 + 4)),
    )
    gradient = Term(name="gradient of the logits", kind="temporaries", num_bytes=logits * (size + 4))
    return [
        Moment(phase="forward", name="loss", terms=terms),
        Moment(phase="backward", name="loss", terms=(*terms, gradient)),
    ]
