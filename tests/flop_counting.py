"""How are the operations of matrix products counted, those that are added in place among them?"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _added(target: Any, first: tuple[int, int], second: tuple[int, int], *_: Any, **__: Any) -> int:
    """Of ``target.addmm_(first, second)``, from the shapes."""
    return 2 * first[0] * first[1] * second[1]


def flop_counter() -> FlopCounterMode:
    """torch's counter, which by itself passes over ``addmm_``."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added})
