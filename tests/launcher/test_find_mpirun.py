"""Is the mpirun of the right MPI found, whichever comes first in PATH?"""

import os
import subprocess
from pathlib import Path

import pytest

from launcher.starting.find_mpirun import find_mpirun, mpirun_first
from sparse_zero.errors import InputError

OPEN_MPI, HYDRA = "mpirun (Open MPI) 4.1.4", "HYDRA build details:"


def put(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f'#!/bin/sh\necho "{says}"; echo "$0" "$@"\n')
    program.chmod(0o755)
    return program


def test_the_mpi_that_is_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "my programs"
    first = put(programs, "mpirun", OPEN_MPI)
    environ = {"PATH": f"{programs}:/usr/bin:/bin"}
    assert find_mpirun("openmpi", environ) == str(first)
    other = put(programs, "mpirun.mpich", HYDRA)
    assert find_mpirun("mpich", environ) == str(other)
    monkeypatch.setenv("PATH", environ["PATH"])
    with mpirun_first("mpich", tmp_path):
        done = subprocess.run(["mpirun", "-n", "a b"], capture_output=True, text=True, check=True)
        # Called by its own name: MPICH looks for its helpers beside it.
        assert done.stdout.splitlines() == [HYDRA, f"{other} -n a b"]
    assert os.environ["PATH"] == environ["PATH"]


def test_a_missing_mpi_is_named(tmp_path: Path) -> None:
    put(tmp_path, "mpirun", OPEN_MPI)
    # /bin/sh runs the script; no directory of the system's is searched.
    with pytest.raises(InputError, match=r"cluster\.launcher is mpich, and .*mpirun is another MPI's: install it"):
        find_mpirun("mpich", {"PATH": str(tmp_path)})
    with pytest.raises(InputError, match="there is no mpirun here"):
        find_mpirun("openmpi", {"PATH": str(tmp_path / "gone")})
