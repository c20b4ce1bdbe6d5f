"""Which batch script runs a config under Slurm, and has itself queued again when its time is over?"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.config import RunConfig
from launcher.emitting.job import job_name, ranks_per_node
from launcher.starting.command_line import check_remote_shell
from sparse_zero.errors import InputError

# What runs on every node, with the names of the folder to be made, of the shared extensions and of Triton's cache. The
# copy takes its place whole and at once, so that nodes with one common folder do not meet in it. A lock that was copied
# would never be released. What another user has put there, in /tmp, is not to be trusted.
_CACHE = """\
# Compiled extensions on the nodes' own disks.
# shellcheck disable=SC2016  # the other shell expands it
make_cache='
    mkdir -p -- "${1%/*}" && own=$(mktemp -d -- "$1.XXXXXXXX") || exit 1
    mkdir -- "$own/torch_extensions" "$own/triton" || exit 1
    [ ! -d "$2" ] || cp -R -p -- "$2/." "$own/torch_extensions" || exit 1
    [ ! -d "$3" ] || cp -R -p -- "$3/." "$own/triton" || exit 1
    find "$own" -name lock -type f -delete
    mv -T -- "$own" "$1" 2>/dev/null || rm -rf -- "$own"
    [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ]
'
on_every_node() {
    srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mem=0 \\
        --cpu-bind=none --input=none --quiet bash -c "$@"
}
cache=${TMPDIR:-/tmp}/sparse-zero-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
triton=${TRITON_CACHE_DIR:-$HOME/.triton/cache}
if on_every_node "$make_cache" bash "$cache" "${TORCH_EXTENSIONS_DIR:-}" "$triton"; then
    export TORCH_EXTENSIONS_DIR=$cache/torch_extensions TRITON_CACHE_DIR=$cache/triton
else
    echo "sparse-zero: $cache could not be made on every node: compiled extensions are used where they are" >&2
fi
"""
_REMOVE_CACHE = """\
# shellcheck disable=SC2016  # the other shell expands it
on_every_node 'rm -rf -- "$1" "$1".????????' bash "$cache" ||
    echo "sparse-zero: $cache could not be removed from every node" >&2
"""
# A signal interrupts wait, which then knows nothing of the launcher; the last wait does.
_RUN = """\
if [ -z "$asked" ]; then
    "${run[@]}" &
    launcher=$!
    [ -z "$asked" ] || kill -s "$asked" "$launcher"
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
    wait "$launcher"
    code=$?
else
    code=$((128 + $(kill -l "$asked")))
fi
"""


def slurm_script(config: RunConfig, config_path: Path, overrides: Sequence[str], folder: Path) -> str:
    """The text of a script for ``sbatch``.

    Args:
        config: the run, as the other arguments describe it.
        config_path: its YAML; the job reads it each time it starts.
        overrides: ``--section.key=value``.
        folder: where the job's relative paths begin.

    Raises:
        InputError: the config is for another launcher, says too little, or has what no line of Slurm's can hold.
    """
    if config.cluster.launcher != "slurm":
        raise InputError(
            f"cluster.launcher is {config.cluster.launcher}, and a Slurm job starts its ranks through srun: set it to "
            "slurm"
        )
    words = shlex.join(["sparse-zero", "launch", "--config", str(folder / config_path), *overrides])
    return script_of_job(config, words, folder, _options(config))


def slurm_array(config: RunConfig, words: str, folder: Path, name: str, tasks: str) -> str:
    """The text of a script for ``sbatch`` that runs several jobs of one shape, as tasks of an array.

    Args:
        config: of any of them; its sections ``cluster`` and ``batch`` are those of all.
        words: the command of a task, as a shell takes it.
        folder: where relative paths begin.
        name: of the array.
        tasks: their numbers, as ``--array`` has them.

    Raises:
        InputError: the config starts ranks on nodes that Slurm does not give, says too little, or has what no line of
            Slurm's can hold.
    """
    cluster = config.cluster
    if cluster.launcher != "slurm" and (cluster.names_nodes or cluster.num_nodes > 1):
        raise InputError(
            f"cluster.launcher is {cluster.launcher}, and a task of an array starts ranks on other nodes through srun: "
            "set it to slurm, or to local with num_nodes 1"
        )
    changed = replace(config, batch=replace(config.batch, name=name))
    options = [each if each[0] != "output" else ("output", "sparse-zero-%A_%a.out") for each in _options(changed)]
    return script_of_job(changed, words, folder, [("array", tasks), *options])


def script_of_job(config: RunConfig, words: str, folder: Path, options: Sequence[tuple[str, str | None]]) -> str:
    """The text of a script that runs a command in the job, and has the job queued again.

    Args:
        config: of the job.
        words: the command, as a shell takes it; it ends with 128 + signal where a signal ended it.
        folder: where relative paths begin.
        options: of sbatch.

    Raises:
        InputError: the folder cannot be passed to other nodes.
    """
    batch = config.batch
    check_remote_shell(python="", folder=str(folder), python_path="", package="")
    requeues = batch.slurm.max_requeues
    lines = [
        "#!/bin/bash",
        "# Written by `sparse-zero launch --emit slurm`; submit it with sbatch, whose own options come first.",
        *(f"#SBATCH --{name}{'' if value is None else '=' + value}" for name, value in options),
        "",
        "# A signal ends the run, which writes a checkpoint first.",
        "asked='' launcher=''",
        'pass_on() { asked=$1; [ -z "$launcher" ] || kill -s "$1" "$launcher" 2>/dev/null; }',
        "trap 'pass_on USR1' USR1",
        "trap 'pass_on TERM' TERM",
        "",
        f"cd -- {shlex.quote(str(folder))} || exit 2",
        *(["", "# --- batch.setup", *batch.setup, "# --- end of it", "set +eu"] if batch.setup else []),
        "",
    ]
    text = "\n".join(lines) + "\n"
    if batch.slurm.node_cache:
        text += f"{_CACHE}\n"
    text += f"run=({words})\n{_RUN}"
    if batch.slurm.node_cache:
        text += _REMOVE_CACHE
    if requeues:
        text += _requeue(requeues)
    return text + 'exit "$code"\n'


def _requeue(most: int) -> str:
    """What queues the job again where it was told that its time is over, and has ended for that reason."""
    return f"""\
# The end of the time is no end of the run: the job is queued again, and continues from its checkpoint.
if [ "$asked" = USR1 ] && [ "$code" -eq $((128 + $(kill -l USR1))) ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {most} ]; then
        echo "sparse-zero: not queued again after {most} times (batch.slurm.max_requeues); sbatch continues it" >&2
    else
        # One task of an array has the number of all of them.
        job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
        job=${{job:-$SLURM_JOB_ID}}
        # Said first: Slurm ends this script for the sake of it.
        echo "sparse-zero: job $job is queued again, to continue from its checkpoint" >&2
        scontrol requeue "$job"
    fi
fi
"""


def _options(config: RunConfig) -> list[tuple[str, str | None]]:
    """Names and values of sbatch's options, quoted."""
    cluster, batch, slurm = config.cluster, config.batch, config.batch.slurm
    ranks = ranks_per_node(config)
    tasks, cpus = ranks, batch.cpus_per_rank
    if cluster.launcher != "slurm":
        # One task starts all ranks of the node; left alone, Slurm would give it one core.
        tasks, cpus = 1, ranks * (cpus or 1)
    gpus = None
    if batch.gpus_per_rank:
        gpus = f"{batch.gpu_type}:{ranks}" if batch.gpu_type else str(ranks)
    limit = batch.time_limit_minutes
    if limit is not None and slurm.signal_seconds >= 60 * limit:
        raise InputError(
            f"batch.slurm.signal_seconds is {slurm.signal_seconds} and batch.time_limit_minutes is {limit}: the run "
            "would be told to end when it starts; lower the one or raise the other"
        )
    found: list[tuple[str, str, int | str | None]] = [
        ("job-name", "batch.name", job_name(config)),
        ("nodes", "", cluster.num_nodes),
        ("ntasks-per-node", "", tasks),
        ("gpus-per-node", "batch.gpu_type", gpus),
        ("cpus-per-task", "", cpus),
        ("mem", "", None if batch.memory_gib is None else f"{batch.memory_gib}G"),
        ("time", "", limit),
        ("partition", "batch.slurm.partition", slurm.partition),
        ("account", "batch.slurm.account", slurm.account),
        ("qos", "batch.slurm.qos", slurm.qos),
        ("constraint", "batch.slurm.constraint", slurm.constraint),
        ("signal", "", f"B:USR1@{slurm.signal_seconds}"),
        ("output", "", "sparse-zero-%j.out"),
        ("open-mode", "", "append"),
    ]
    options = [(name, _quoted(field, str(value))) for name, field, value in found if value is not None]
    return [*options, ("requeue" if slurm.max_requeues else "no-requeue", None)]


def _quoted(field: str, value: str) -> str:
    """A value as sbatch reads it from a script: in double quotes, where a backslash takes the meaning from a letter.

    Raises:
        InputError: it has a letter that no such line can hold.
    """
    if not value.isprintable():
        raise InputError(f"{field} is {value!r}: no line of a batch script can hold it; use letters that are printed")
    if value.isascii() and all(letter.isalnum() or letter in "-_.,:@%/+&|" for letter in value):
        return value
    for letter in '\\"#':
        value = value.replace(letter, "\\" + letter)
    return f'"{value}"'
