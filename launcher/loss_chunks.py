"""How many positions' logits exist at once while regions are scored?"""

from fnmatch import fnmatchcase

from launcher.config import RunConfig

# What families call an output head that is no embedding as well.
_HEADS = ("lm_head", "embed_out")


def calibration_chunk(config: RunConfig) -> int | None:
    """Positions, as ``training.loss_chunk``; None, all, where the head itself may be scored, by what it gives."""
    from sparse_zero.selection.candidates import expand_braces

    named = [pattern for region in config.selection.regions for pattern in region.modules]
    patterns = [each for pattern in named for each in expand_braces(pattern)]
    may_be_scored = any(fnmatchcase(head, pattern) for head in _HEADS for pattern in patterns)
    return None if may_be_scored else config.training.loss_chunk
