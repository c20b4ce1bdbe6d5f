"""Which samples does a rank see in a given step?

Everything is a function of the step number and of the arguments: nothing is stored between steps, so a
resumed run needs to know only how many steps were taken. The samples of a step do not depend on the world
size; only their distribution over the ranks does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparse_zero.errors import InputError


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step."""

    epoch: int  # counted from 0
    global_indices: tuple[int, ...]  # the global batch, in the order of the epoch; equal on all ranks
    micro_batches: tuple[tuple[int, ...], ...]  # this rank's; equally many on all ranks, some may be empty


class BatchSampler:
    """Deals out the samples of every step to the ranks.

    The global batch is cut into micro-batches, and micro-batch m goes to rank ``m % world_size``. Where that
    does not come out even, and in the smaller last batch of an epoch, the remaining micro-batches of a rank
    are empty.

    Args:
        num_samples: samples of the data set.
        global_batch_size: samples between two optimizer steps, over all ranks.
        micro_batch_size: samples of one forward pass on one rank.
        world_size: number of ranks.
        rank: this process, 0 <= rank < world_size.
        seed: of the order; together with the epoch it determines the permutation, on any platform and
            version.
        shuffle: a new order for every epoch; otherwise the order of the data.
        lengths: tokens of every sample. Given, each global batch is sorted by length (longest first) before
            it is cut, so that a micro-batch holds samples of like length.
        drop_last: leave out the last batch of an epoch if it is smaller than the others.
        num_cached: the samples before this one may be cheaper than the others: given, each global batch is cut so that
            a micro-batch holds samples of one sort, except for one at most.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        shuffle: bool,
        lengths: Sequence[int] | None = None,
        drop_last: bool = False,
        num_cached: int | None = None,
    ) -> None:
        positive = {
            "num_samples": num_samples,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "world_size": world_size,
        }
        for name, value in positive.items():
            if value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank}: it must lie in 0 to {world_size - 1}, below the world size")
        if seed < 0:
            raise InputError(f"seed is {seed}: it must not be negative")
        if lengths is not None and len(lengths) != num_samples:
            raise InputError(f"lengths has {len(lengths)} entries for {num_samples} samples: give one for each")
        if drop_last and num_samples < global_batch_size:
            raise InputError(
                f"global_batch_size is {global_batch_size}, more than the {num_samples} samples, and "
                "drop_last is set: no batch would remain; lower it or keep the last batch"
            )
        self._num_samples = num_samples
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._world_size = world_size
        self._rank = rank
        self._seed = seed
        self._shuffle = shuffle
        self._lengths = None if lengths is None else tuple(lengths)
        self._num_cached = num_samples if num_cached is None else num_cached
        # Optimizer steps of one pass over the data.
        whole, rest = divmod(num_samples, global_batch_size)
        self.steps_per_epoch: int = whole + (rest > 0 and not drop_last)
        # Forward passes of every rank in every step (gradient accumulation).
        self.micro_batches_per_step: int = -(-global_batch_size // (micro_batch_size * world_size))

    def step(self, step: int) -> StepPlan:
        """The plan of a step, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step is {step}: steps count from 0")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self._global_batch_size
        end = min(start + self._global_batch_size, self._num_samples)
        if self._shuffle:
            batch = tuple(_epoch_order(self._num_samples, self._seed, epoch)[start:end].tolist())
        else:
            batch = tuple(range(start, end))
        lengths = self._lengths
        dealt = batch if lengths is None else tuple(sorted(batch, key=lambda index: (-lengths[index], index)))
        dealt = tuple(sorted(dealt, key=lambda index: index >= self._num_cached))  # Within each sort as before.
        size = self._micro_batch_size
        mine = range(self._rank, self.micro_batches_per_step * self._world_size, self._world_size)
        return StepPlan(epoch, batch, tuple(dealt[m * size : (m + 1) * size] for m in mine))


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:  # [num_samples] int64
    """A permutation by sorting raw random words: numpy promises that stream, but not its own permutations."""
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
