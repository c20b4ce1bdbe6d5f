"""What does a rank say of the error that ends it, and which exit code does it give?"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.config import RunConfig
from launcher.faults import describe_disk_error, lost_a_rank
from launcher.memory.measuring import RunMemory
from launcher.memory.out_of_memory import explain, explain_kill, find_out_of_memory
from launcher.process_ranks import Ranks
from launcher.starting.control_groups import oom_kills
from launcher.stopping import EXIT_ERROR, EXIT_LOST, Stopped

# A rank that has lost another one ends this much later: the launcher then sees first the one that ended first, whose
# exit code tells more.
_AFTER_THE_FIRST_SECONDS = 3.0


def _tell(first: str, *others: str) -> None:
    """An error and what is known of it, in one piece."""
    lines = [f"sparse-zero: error: {first}", *(f"  {line}" for line in others)]
    print("\n".join(lines), file=sys.stderr, flush=True)


def tell_notes(error: BaseException) -> None:
    """Say what came on top of an error: a checkpoint that could not be written."""
    for note in getattr(error, "__notes__", ()):
        _tell(note)


def _of_killed(config: RunConfig, ranks: Ranks, memory: RunMemory | None) -> Sequence[str]:
    """Lines about a lost rank that the kernel has ended for want of memory; none where it was something else."""
    if memory is None or oom_kills(memory.oom_counter) <= memory.oom_kills_at_start:
        return ()
    first = "the kernel has ended a process of this node for want of memory meanwhile (its counter oom_kill has risen)"
    return (first, *explain_kill(config, ranks.world_size, memory))


def code_of(error: Exception, folder: Path, config: RunConfig, ranks: Ranks, memory: RunMemory | None) -> int | None:
    """Explain an error in a few lines and return its exit code; None for one that needs its traceback.

    Args:
        error: what ends this rank.
        folder: what is written into, for errors of the disk.
        config: of the run.
        ranks: this process's place.
        memory: what was found out about memory; None before anything was loaded.
    """
    failed = find_out_of_memory(error)
    if failed is not None and memory is not None:
        _tell(*explain(failed, config, ranks.rank, ranks.world_size, memory))
        return EXIT_ERROR
    explained = describe_disk_error(error, folder)
    if explained is not None:
        _tell(explained)
        return EXIT_ERROR
    if lost_a_rank(error):
        _tell(
            f"rank {ranks.rank} has lost the connection to another rank, which told why or was killed; "
            f"start again to continue from the last checkpoint ({' '.join(str(error).split())[:300]})",
            *_of_killed(config, ranks, memory),
        )
        with suppress(Stopped):  # The launcher ends the others of a rank that has ended.
            time.sleep(_AFTER_THE_FIRST_SECONDS)
        return EXIT_LOST
    return None
