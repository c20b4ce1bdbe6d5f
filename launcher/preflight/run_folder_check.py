"""Would the ranks refuse the run folder for what it holds, as this machine sees it?"""

from __future__ import annotations

from pathlib import Path

from launcher.preflight.findings import Finding
from launcher.preflight.wanted import Wanted
from launcher.run_folder import RunFolder, check_same_run, is_in_use
from sparse_zero.errors import InputError


def check_run_folder(wanted: Wanted) -> list[Finding]:
    """Another run in ``output.folder``, or one that goes on there.

    `launch` leaves this to its ranks: where each node has a command of its own, another one's may have the folder.

    Args:
        wanted: of the run.

    Returns:
        What the first node would say of it; nothing where all is well.
    """
    folder = wanted.config.output.folder
    what, remedy = "", ""
    try:
        if is_in_use(Path(folder)):
            what = f"output.folder {folder} is in use by another start of a run"
            remedy = "wait until it has ended, or name another folder"
        check_same_run(RunFolder(folder), wanted.config)
    except InputError as error:
        what, _, remedy = " ".join(str(error).split()).rpartition(": ")
    except OSError as error:
        what = f"what output.folder {folder} holds cannot be read: {error}"
        remedy = "give this user the right to read it, or name another folder"
    if not what:
        return []
    return [Finding(node=wanted.nodes[0].name, check="output", status="fail", what=what, remedy=remedy)]
