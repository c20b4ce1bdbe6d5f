"""How large is the small Llama, and how is it pre-trained?"""

from dataclasses import dataclass

from sparse_zero.errors import InputError

# Width of the published blocks: every dimension is a multiple of it.
BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model: 11.5M parameters. Every width is a multiple of 256, so that no block is cut off at an edge.

    The head is tied to the embedding: an own one would be a tenth of all parameters, and in the few million tokens of
    half an hour would see each of its rows too seldom. Every layer has 4 blocks in each of q, k, v and o, and 8 in
    each of gate, up and down.
    """

    vocab: int = 2048
    hidden: int = 512
    intermediate: int = 1024
    layers: int = 4
    # As many for keys and values as for queries, as in Llama 2.
    heads: int = 8
    positions: int = 1024

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "intermediate"):
            if getattr(self, name) < BLOCK or getattr(self, name) % BLOCK:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be a multiple of {BLOCK}")
        for name in ("layers", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden % (2 * self.heads):
            raise InputError(f"--heads is {self.heads}: --hidden {self.hidden} must be a multiple of twice as many")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What decides the result, together with shape, text, seed and the number of steps."""

    # Samples of a step, and tokens of a sample. In so short a time the number of updates counts more than their noise.
    batch: int = 8
    length: int = 128
    # Highest rate, reached after the warm-up; a cosine brings it down to a tenth.
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    # Largest norm of the gradient.
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"--learning-rate is {self.learning_rate}: it must be above 0 and below 1")
