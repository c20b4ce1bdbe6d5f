"""Which mpirun belongs to the MPI that the config names?"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparse_zero.errors import InputError

# What `mpirun --version` says of itself; Debian's package.
_SAYS = {"openmpi": ("Open MPI", "OpenRTE", "PRRTE"), "mpich": ("HYDRA", "MPICH")}
_PACKAGES = {"openmpi": "openmpi-bin", "mpich": "mpich"}
_ASK_SECONDS = 20.0


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def find_mpirun(launcher: str, environ: Mapping[str, str]) -> str:
    """The path of the mpirun of ``launcher`` (openmpi, mpich): ``mpirun``, or where that is another's, Debian's name.

    Raises:
        InputError: there is none.
    """
    tried = []
    for name in ("mpirun", f"mpirun.{launcher}"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found is not None:
            if any(word in _version(found) for word in _SAYS[launcher]):
                return found
            tried.append(found)
    other = f"{tried[0]} is another MPI's" if tried else "there is no mpirun here"
    raise InputError(
        f"cluster.launcher is {launcher}, and {other}: install it (Debian: {_PACKAGES[launcher]}) or load its module "
        "on every node"
    )


@contextmanager
def mpirun_first(launcher: str, folder: Path) -> Iterator[None]:
    """Let ``mpirun`` be that of ``launcher`` while the block runs: DeepSpeed starts whichever comes first in PATH.

    Args:
        launcher: openmpi or mpich.
        folder: where a script may be written.

    Raises:
        InputError: there is none.
    """
    found, path = find_mpirun(launcher, os.environ), os.environ.get("PATH", "")
    # A link would not do: MPICH looks for its helpers beside the name that it was called by.
    script = folder / "mpirun"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(found)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
