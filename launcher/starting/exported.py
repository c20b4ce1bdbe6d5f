"""What is a line of ``cluster.export``: the name of a variable, and perhaps its value?"""

import re

from launcher.process_ranks import OF_ONE_RANK
from sparse_zero.credentials import is_secret
from sparse_zero.errors import InputError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Those of a rank, of where ranks meet, and of a whole job.
_OF_LAUNCHERS = re.compile(
    rf"{OF_ONE_RANK.pattern}|MASTER_(ADDR|PORT)|CUDA_VISIBLE_DEVICES|(OMPI_COMM_WORLD|PMI|PMIX|SLURM|TORCHELASTIC)_.*"
)


def name_and_value(text: str, source: str) -> tuple[str, str | None]:
    """Both of ``NAME=value``; of ``NAME`` alone no value.

    Args:
        text: the line.
        source: where it stands, for errors.

    Raises:
        InputError: it is no such line, or names what launchers set.
    """
    name, equals, value = text.partition("=")
    if not _NAME.fullmatch(name):
        # What stands behind the name is not told: it may be a secret.
        raise InputError(f"{source} has {name!r}{' with a value' if equals else ''}: write NAME, or NAME=value")
    if _OF_LAUNCHERS.fullmatch(name):
        raise InputError(f"{source} has {name}, which launchers set for each rank: take it out")
    if "\0" in value:
        raise InputError(f"{source} has {name} with a NUL character: no environment can hold it")
    return name, value if equals else None


def check_exported_lines(lines: tuple[str, ...]) -> None:
    """Refuse lines of ``cluster.export`` that are none, and secrets: the config is saved with the run.

    Raises:
        InputError: names the variable, not its value.
    """
    for text in lines:
        name, value = name_and_value(text, "cluster.export")
        if value and is_secret(name, value):
            raise InputError(
                f"cluster.export has {name} with its value, a secret, and the config is saved with the run: write "
                f"{name} alone, which takes it from the environment, or use cluster.export_file"
            )
