"""What is kept of the frozen layers at the bottom of a model, and where?"""

import math
from dataclasses import dataclass
from typing import Literal

from sparse_zero.errors import InputError

StoredDtype = Literal["compute", "bfloat16", "float8"]


@dataclass(frozen=True, kw_only=True)
class PrefixCacheConfig:
    """The hidden states that enter the lowest layer with trained values, kept from the first epoch for later ones."""

    # Where they lie; None: prefix_cache in the run folder, which all nodes may share. A folder in memory (/dev/shm) or
    # on a disk of each node is named here: a node then computes anew what only others have.
    folder: str | None = None
    # Bound of all ranks' files in the folder, in GiB; None: as much as the training data needs. What is beyond it is
    # computed in every epoch.
    max_gib: float | None = None
    # compute: as the model computes, which changes nothing but rounding. bfloat16: half of float32. float8: e4m3, with
    # one fp32 scale per token.
    dtype: StoredDtype = "compute"
    # Leave the files when the run is finished, for other runs on the same base, data and lowest trained layer. The
    # default leaves nothing of their size behind.
    keep: bool = False

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.strip():
            raise InputError("training.prefix_cache.folder is empty: name a folder, or leave it out")
        if self.max_gib is not None and not (math.isfinite(self.max_gib) and self.max_gib > 0):
            raise InputError(f"training.prefix_cache.max_gib is {self.max_gib}: it must be a positive number of GiB")

    @property
    def max_bytes(self) -> int | None:
        """The bound in bytes."""
        return None if self.max_gib is None else int(self.max_gib * 2**30)
