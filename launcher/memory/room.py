"""How much memory may a rank take here, and what of it is no tensor?"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.plan.planned_run import Gpu
from launcher.starting.control_groups import group_limit
from sparse_zero.memory.measure import status_bytes

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one rank has."""

    num_bytes: int
    # In words: "of the GPU", "of address space (ulimit -v)".
    what: str
    # Of those, what is no tensor: libraries, interpreter, context.
    overhead_bytes: int

    @property
    def for_tensors(self) -> int:
        """Bytes that are left for tensors."""
        return max(0, self.num_bytes - self.overhead_bytes)


def held_bytes() -> dict[str, int]:
    """What this process holds now: ``address_space`` and ``resident`` bytes; 0 where the system does not tell."""
    return {"address_space": status_bytes("VmSize") or 0, "resident": status_bytes("VmRSS") or 0}


def room_of(device: torch.device, ranks_here: int, overhead: dict[str, int]) -> Room:
    """The tightest limit that holds for this rank.

    Args:
        device: of the rank.
        ranks_here: ranks of this node, among which its memory is shared on a CPU.
        overhead: what a process holds that is no tensor, as :func:`held_bytes` counts it.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Room(num_bytes=total, what="of the GPU", overhead_bytes=total - Gpu(gib=total / 2**30).usable_bytes)
    rooms = []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        what = "of address space (ulimit -v)"
        rooms.append(Room(num_bytes=limit, what=what, overhead_bytes=overhead["address_space"]))
    limit, total = group_limit(), status_bytes("MemTotal", _MEMINFO) or 0
    share = "" if ranks_here == 1 else f", a {ranks_here}th of it" if ranks_here > 3 else f", 1/{ranks_here} of it"
    if limit and (not total or limit < total):
        what = f"by the limit of the container or job{share}"
        rooms.append(Room(num_bytes=limit // ranks_here, what=what, overhead_bytes=overhead["resident"]))
    elif total:
        what = f"of the machine{share}"
        rooms.append(Room(num_bytes=total // ranks_here, what=what, overhead_bytes=overhead["resident"]))
    unknown = Room(num_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), what="of the machine",
                   overhead_bytes=0)  # fmt: skip
    return min(rooms, key=lambda room: room.for_tensors, default=unknown)
