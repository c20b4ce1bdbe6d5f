"""Which batch script runs the points of a sweep as a Slurm array, one task each?"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sparse_zero.errors import InputError


def array_lines(indices: Sequence[int], at_once: int | None = None) -> list[str]:
    """The ``#SBATCH`` lines of an array of these points, of which at most ``at_once`` run at a time.

    Raises:
        InputError: none may run.
    """
    if at_once is not None and at_once < 1:
        raise InputError(f"--at-once is {at_once}: at least one task must be able to run")
    limit = "" if at_once is None else f"%{at_once}"
    return [f"#SBATCH --array={_ranges(indices)}{limit}"]


def array_script(header: Sequence[str], command: Sequence[str], folder: Path) -> str:
    """The text of the script.

    Args:
        header: ``#SBATCH`` lines, those of :func:`array_lines` among them.
        command: what runs one point as an argument list, up to the point's number, which is added.
        folder: that relative paths of the config start at.
    """
    if any(not line.startswith("#SBATCH ") or not line.isprintable() for line in header):
        raise ValueError(f"a header of #SBATCH lines is needed, not {list(header)}")
    return "\n".join(
        [
            "#!/bin/bash",
            *header,
            "set -euo pipefail",
            # Of the submission, not of Slurm's copy of this script.
            f"cd -- {shlex.quote(str(folder))}",
            f'exec {shlex.join(command)} --point "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )


def _ranges(indices: Sequence[int]) -> str:
    """``0-3,7``: what Slurm reads, and ``--points``."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][-1:] = [index]
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
