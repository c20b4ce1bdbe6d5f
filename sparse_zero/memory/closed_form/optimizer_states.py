"""What does an optimizer keep for each entry, and what more while it takes a step?

Sources: ``torch.optim.AdamW`` (fused), ``deepspeed.ops.adam`` and ``deepspeed.ops.lion``, bitsandbytes 0.50
(``optim/optimizer.py``: ``Optimizer2State.init_state``), and :mod:`sparse_zero.zero.shaped_optimizers`. States have the
dtype of the masters, fp32, or are codes of 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparse_zero.memory.closed_form.partitions import Partition
from sparse_zero.selection.config import Kind
from sparse_zero.zero.optimizers import OptimizerName

# bitsandbytes: smaller tensors keep their states in fp32; so many codes share a constant; two tables of 256 numbers.
_MIN_8BIT_ENTRIES, _8BIT_GROUP, _8BIT_TABLES_BYTES = 4096, 256, 2 * 256 * 4


def moments_bytes(name: OptimizerName, kind: Kind, sizes: Sequence[int], *, on_host: bool = False) -> int:
    """What the optimizer keeps for tensors of one group.

    Args:
        name: of the optimizer.
        kind: of the group's regions.
        sizes: entries of each tensor that is stepped: one flat one at stages 1 to 3.
        on_host: whether a CPU takes the step, for which DeepSpeed's Lion makes a second state that it never reads.
    """
    entries = sum(sizes)
    if name in ("adamw", "deepspeed_adamw") or (name == "lion" and on_host):
        return 8 * entries
    if name == "adamw_8bit":
        large = [size for size in sizes if size >= _MIN_8BIT_ENTRIES]
        codes = sum(2 * (size + 4 * math.ceil(size / _8BIT_GROUP)) for size in large)
        return 8 * (entries - sum(large)) + codes + (_8BIT_TABLES_BYTES if large else 0)
    if name == "muon" and kind != "block":
        return 8 * entries
    # One state for each entry: Lion's and Muon's momentum, Adafactor's variance.
    return 4 * entries


def step_bytes(name: OptimizerName, kind: Kind, partition: Partition) -> int:
    """What lives at most while one group is stepped, beside its gradient and states.

    AdamW and Lion are one kernel each. Adafactor forms the update of the whole partition, and squares of one piece of
    it. Muon gathers the momenta of all of the group's blocks on every rank, and looks ahead by its own part; what it
    takes to orthogonalize the blocks of one weight is left out. The others' AdamW forms the square of the gradient, and
    the root of the mean square.
    """
    if name == "adafactor":
        return 4 * (partition.own + max(partition.own, partition.largest_piece))
    if name == "muon":
        return 4 * (partition.whole + partition.own) if kind == "block" else 8 * partition.own
    return 0
