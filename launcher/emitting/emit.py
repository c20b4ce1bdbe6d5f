"""Where does what is emitted for a batch system come from, and where does it go?"""

import argparse
from pathlib import Path

from launcher.config import parse_config, read_with_overrides, set_value
from launcher.config_checks import check_config
from launcher.deepspeed_config import deepspeed_config
from launcher.emitting.job import TOLD_AT_THE_START, ranks_per_node
from launcher.emitting.kubernetes import kubernetes_manifest
from launcher.emitting.skypilot import skypilot_task
from launcher.emitting.slurm_script import slurm_script
from launcher.run_folder import check_new_file
from sparse_zero.errors import InputError

SYSTEMS = ("slurm", "kubernetes", "skypilot")


def emit(args: argparse.Namespace) -> int:
    """Write what ``--emit`` asks for; nothing is started, and nothing else is written.

    Args:
        args: ``emit`` (the batch system), ``config``, ``overrides`` and ``out`` (None: standard output).

    Raises:
        InputError: something is there at ``out``, or the config does not hold or does not say enough.
    """
    if args.emit is None:
        raise InputError(f"--out is {args.out}, and nothing is emitted: add --emit, with one of {', '.join(SYSTEMS)}")
    out = None if args.out is None else Path(args.out)
    if out is not None:
        check_new_file(out)
    mapping = read_with_overrides(args.config, args.overrides)
    section = mapping.get("cluster")
    if args.emit != "slurm" and isinstance(section, dict) and section.get("launcher", "local") != "local":
        set_value(mapping, "cluster.master_address", TOLD_AT_THE_START, "--emit")
    config = parse_config(mapping, source=args.config)
    check_config(config)
    # Found here, a contradiction costs no time in a queue.
    deepspeed_config(config, config.cluster.num_nodes * ranks_per_node(config))
    if args.emit == "slurm":
        text = slurm_script(config, Path(args.config), args.overrides, Path.cwd())
    else:
        text = {"kubernetes": kubernetes_manifest, "skypilot": skypilot_task}[args.emit](config)
    if out is None:
        print(text, end="")
        return 0
    from sparse_zero.files import atomic_write_text  # heavy: torch

    atomic_write_text(out, text)
    return 0
