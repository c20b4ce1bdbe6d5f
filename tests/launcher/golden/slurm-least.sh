#!/bin/bash
# Written by `sparse-zero launch --emit slurm`; submit it with sbatch, whose own options come first.
#SBATCH --job-name=Llama_SMT
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --signal=B:USR1@300
#SBATCH --output=sparse-zero-%j.out
#SBATCH --open-mode=append
#SBATCH --no-requeue

# A signal ends the run, which writes a checkpoint first.
asked='' launcher=''
pass_on() { asked=$1; [ -z "$launcher" ] || kill -s "$1" "$launcher" 2>/dev/null; }
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

cd -- /shared/project || exit 2

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
exit "$code"
