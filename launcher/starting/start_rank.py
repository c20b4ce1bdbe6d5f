"""The worker as `sparse-zero launch` starts it: ``start_rank.py FOLDER``, with what the guard of this node wrote there.

By hand, start ``launcher/train.py --config FILE`` instead.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# As a script, its own folder is the first of sys.path; the package is installed, or in PYTHONPATH.
from launcher.starting.node_guard import node_folder, rank_told
from launcher.starting.rank_logs import redirect


def main(argv: Sequence[str]) -> NoReturn:
    """Set the environment, then become ``launcher/train.py``: some of it is read when an interpreter starts.

    Args:
        argv: the record folder; ``--meet=ADDRESS:PORT``, where the launcher does not tell ranks where they meet;
            overrides ``--section.key=value`` of this start.
    """
    record, *overrides = argv
    folder = node_folder(record)
    rank = rank_told(os.environ)
    if rank.isdecimal():
        redirect(folder, rank)
    os.environ.update(json.loads(Path(folder, "environment.json").read_text(encoding="utf-8")))
    if overrides and overrides[0].startswith("--meet="):
        address, _, port = overrides.pop(0).removeprefix("--meet=").rpartition(":")
        os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": port, "SPARSE_ZERO_TOLD_ALL": "1"})
    script, config = Path(__file__).parents[1] / "train.py", folder / "config.yaml"
    worker = [str(script), "--config", str(config), "--exit_record", record, *overrides]
    os.execv(sys.executable, [sys.executable, "-u", *worker])


if __name__ == "__main__":
    main(sys.argv[1:])
