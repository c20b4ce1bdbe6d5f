#!/bin/bash
# Written by `sparse-zero launch --emit slurm`; submit it with sbatch, whose own options come first.
#SBATCH --job-name=Llama_SMT
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=a100:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=900G
#SBATCH --time=1440
#SBATCH --partition=gpu
#SBATCH --account="team\#1"
#SBATCH --qos=long
#SBATCH --constraint="ib&[rack1|rack2]"
#SBATCH --signal=B:USR1@300
#SBATCH --output=sparse-zero-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

# A signal ends the run, which writes a checkpoint first.
asked='' launcher=''
pass_on() { asked=$1; [ -z "$launcher" ] || kill -s "$1" "$launcher" 2>/dev/null; }
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

cd -- /shared/project || exit 2

# --- batch.setup
module load cuda
. .venv/bin/activate
# --- end of it
set +eu

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
    srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mem=0 \
        --cpu-bind=none --input=none --quiet bash -c "$@"
}
cache=${TMPDIR:-/tmp}/sparse-zero-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
triton=${TRITON_CACHE_DIR:-$HOME/.triton/cache}
if on_every_node "$make_cache" bash "$cache" "${TORCH_EXTENSIONS_DIR:-}" "$triton"; then
    export TORCH_EXTENSIONS_DIR=$cache/torch_extensions TRITON_CACHE_DIR=$cache/triton
else
    echo "sparse-zero: $cache could not be made on every node: compiled extensions are used where they are" >&2
fi

run=(sparse-zero launch --config '/shared/project/runs and tests/a b'"'"'c"d$(touch hacked)`touch hacked`;touch hacked %h #x \ $(HOME) ${HOME}.yaml' --training.steps=3 '--output.folder=a b'"'"'c"d$(touch hacked)`touch hacked`;touch hacked %h #x \ $(HOME) ${HOME}')
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
# shellcheck disable=SC2016  # the other shell expands it
on_every_node 'rm -rf -- "$1" "$1".????????' bash "$cache" ||
    echo "sparse-zero: $cache could not be removed from every node" >&2
# The end of the time is no end of the run: the job is queued again, and continues from its checkpoint.
if [ "$asked" = USR1 ] && [ "$code" -eq $((128 + $(kill -l USR1))) ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 30 ]; then
        echo "sparse-zero: not queued again after 30 times (batch.slurm.max_requeues); sbatch continues it" >&2
    else
        # One task of an array has the number of all of them.
        job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        job=${job:-$SLURM_JOB_ID}
        # Said first: Slurm ends this script for the sake of it.
        echo "sparse-zero: job $job is queued again, to continue from its checkpoint" >&2
        scontrol requeue "$job"
    fi
fi
exit "$code"
