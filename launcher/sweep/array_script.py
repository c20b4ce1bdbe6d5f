"""Which batch script runs the points of a sweep as a Slurm array, one task each?

Where the points' ranks start through Slurm, it is the script of a single run: with its options, its copies of compiled
extensions, and queued again at the end of its time. Else a task is one process of the job, and what it may take is for
sbatch's command line.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.config import RunConfig
from launcher.emitting.job import refuse_secrets, shell_words
from launcher.emitting.slurm_script import slurm_array
from sparse_zero.errors import InputError


def array_of_points(
    points: Mapping[str, tuple[int, RunConfig]], command: Sequence[str], folder: Path, at_once: int | None
) -> str:
    """The script for points that were listed.

    Args:
        points: number and config of each, by name.
        command: what runs a sweep's command with its config and overrides, such as ``sparse-zero sweep --config FILE``.
        folder: that relative paths of the config start at.
        at_once: how many tasks may run at a time; None: all.

    Raises:
        InputError: only some of the points start through Slurm, or on other nodes than others; or none may run.
    """
    tasks = _array(sorted(index for index, _ in points.values()), at_once)
    (first, (_, config)), *others = points.items()
    for name, (_, other) in others:
        if "slurm" in (config.cluster.launcher, other.cluster.launcher) and (
            (other.cluster, other.batch) != (config.cluster, config.batch)
        ):
            raise InputError(
                f"the points {first} and {name} of the sweep differ in cluster or batch, and tasks of an array are all "
                "given the same: choose points that are alike with --only or --points"
            )
    if config.cluster.launcher != "slurm":
        return array_script(["#SBATCH --job-name=sparse-zero-sweep", f"#SBATCH --array={tasks}"], command, folder)
    for _, each in points.values():
        refuse_secrets(each)
    words = f'{shell_words([*command, "--point"])} "$SLURM_ARRAY_TASK_ID"'
    return slurm_array(config, words, folder, config.batch.name or "sparse-zero-sweep", tasks)


def _array(indices: Sequence[int], at_once: int | None = None) -> str:
    """What ``--array`` is for these points, of which at most ``at_once`` run at a time.

    Raises:
        InputError: none may run.
    """
    if at_once is not None and at_once < 1:
        raise InputError(f"--at-once is {at_once}: at least one task must be able to run")
    limit = "" if at_once is None else f"%{at_once}"
    return f"{_ranges(indices)}{limit}"


def array_script(header: Sequence[str], command: Sequence[str], folder: Path) -> str:
    """The text of the script.

    Args:
        header: ``#SBATCH`` lines.
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
