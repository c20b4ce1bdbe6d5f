"""Which batch script runs the points of a sweep as a Slurm array, one task each?

It is the script of a single run: with its options, its copies of compiled extensions, and queued again at the end of
its time.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.config import RunConfig
from launcher.emitting.slurm_script import slurm_array
from sparse_zero.errors import InputError


def array_of_points(
    points: Mapping[str, tuple[int, RunConfig]], sweep_folder: Path, folder: Path, at_once: int | None
) -> str:
    """The script for points that were listed.

    Args:
        points: number and config of each, by name.
        sweep_folder: of the sweep, an absolute path; a task reads nothing but what lies there.
        folder: that relative paths of the points' configs start at.
        at_once: how many tasks may run at a time; None: all.

    Raises:
        InputError: the points need other nodes than each other, or than a task of an array has; or none may run.
    """
    tasks = _array(sorted(index for index, _ in points.values()), at_once)
    (first, (_, config)), *others = points.items()
    for name, (_, other) in others:
        if (other.cluster, other.batch) != (config.cluster, config.batch):
            raise InputError(
                f"the points {first} and {name} of the sweep differ in cluster or batch, and tasks of an array are all "
                "given the same: choose points that are alike with --only or --points"
            )
    command = shlex.join(["sparse-zero", "sweep", "--folder", str(sweep_folder), "--point"])
    return slurm_array(
        config, f'{command} "$SLURM_ARRAY_TASK_ID"', folder, config.batch.name or "sparse-zero-sweep", tasks
    )


def _array(indices: Sequence[int], at_once: int | None = None) -> str:
    """What ``--array`` is for these points, of which at most ``at_once`` run at a time.

    Raises:
        InputError: none may run.
    """
    if at_once is not None and at_once < 1:
        raise InputError(f"--at-once is {at_once}: at least one task must be able to run")
    limit = "" if at_once is None else f"%{at_once}"
    return f"{_ranges(indices)}{limit}"


def _ranges(indices: Sequence[int]) -> str:
    """``0-3,7``: what Slurm reads, and ``--points``."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][-1:] = [index]
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
