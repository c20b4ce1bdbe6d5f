"""What does every batch system have to be told of a job, whichever it is?"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from launcher.config import RunConfig
from sparse_zero.errors import InputError

# Kubernetes and SkyPilot tell where ranks meet when they start a run; torchrun on several nodes is no config without.
TOLD_AT_THE_START = "told-at-the-start"
# Kubernetes and SkyPilot append to a name, and 63 letters are all that a host name may have.
_MOST_OF_NAME = 40


def ranks_per_node(config: RunConfig) -> int:
    """How many; nobody can count them on this machine.

    Raises:
        InputError: ``cluster.ranks_per_node`` is missing.
    """
    if config.cluster.ranks_per_node is None:
        raise InputError(
            "cluster.ranks_per_node is missing: what is emitted runs on other machines than this, whose GPUs cannot be "
            "counted here; set it, and cluster.num_nodes"
        )
    return config.cluster.ranks_per_node


def job_name(config: RunConfig) -> str:
    """``batch.name``, or the last part of the run folder."""
    return config.batch.name or PurePosixPath(config.output.folder).name or "sparse-zero"


def host_name(config: RunConfig) -> str:
    """The job's name in the letters that host names have, as Kubernetes and SkyPilot want it.

    Raises:
        InputError: ``batch.name`` has others; a run folder's are replaced.
    """
    name = job_name(config)
    if config.batch.name is None:
        # Kubernetes' services begin with a letter.
        letters = re.sub(r"[^a-z0-9]+", "-", name.lower())
        name = re.sub(r"^[^a-z]+", "", letters)[:_MOST_OF_NAME].strip("-") or "sparse-zero"
    if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{_MOST_OF_NAME - 2}}}[a-z0-9])?", name):
        raise InputError(
            f"batch.name is {name!r}: use lower case letters, digits and -, beginning with a letter, at most "
            f"{_MOST_OF_NAME} in all"
        )
    return name


def check_exported(config: RunConfig, told: Sequence[str], secrets: str, folders: Sequence[str]) -> None:
    """Refuse variables of this machine's environment, which other machines do not have.

    Args:
        config: the run.
        told: names of the variables that the batch system sets there.
        secrets: the setting that names them.
        folders: that are there.

    Raises:
        InputError: names the variable, or the file of them.
    """
    cluster = config.cluster
    missing = next((text for text in cluster.export if "=" not in text and text not in told), None)
    if missing is not None:
        raise InputError(
            f"cluster.export names {missing}, which is another thing on the machines of the batch system: write "
            f"{missing}=value, or, if it is a secret, name it in {secrets}"
        )
    if cluster.export_file is not None and not is_below(cluster.export_file, folders):
        raise InputError(
            f"cluster.export_file is {cluster.export_file}, which the machines of the batch system do not have: put "
            "it below a folder that is mounted there, or its lines into cluster.export"
        )


def is_below(path: str, folders: Sequence[str]) -> bool:
    """Whether a path lies in one of the folders, by their names alone: they are another machine's."""
    place = PurePosixPath(path)
    return ".." not in place.parts and any(place.is_relative_to(folder) for folder in folders)
