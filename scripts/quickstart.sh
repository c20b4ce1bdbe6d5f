#!/usr/bin/env bash
# Does it work here? Fine-tunes a real 135M Llama on word problems and shows its answers before and after.
#
#   bash scripts/quickstart.sh                      # every GPU, or two CPU ranks; about ten minutes on two cores
#   bash scripts/quickstart.sh --training.steps=20 --output.folder=runs/short    # any setting may be changed
#
# Interrupt it at any time and start it again: the installation, the model, the data and the training continue
# where they were. The model goes to the user's cache, everything else to runs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sparse_zero/torch_extensions}"
mkdir -p "$TORCH_EXTENSIONS_DIR"
started=$SECONDS

say() { printf 'quickstart: %s\n' "$1"; }

say "get SmolLM2-135M-Instruct (once)"
model="$(python scripts/get_smollm2.py)"
data="runs/quickstart-data"
if [ ! -f "$data/train.json" ] || [ ! -f "$data/test.json" ]; then
    say "write 4,000 training and 200 test problems to $data"
    python scripts/make_word_problems.py --folder "$data"
fi

say "evaluate, select, train, evaluate again"
sparse-zero launch --config configs/runs/quickstart.yaml "--model.name_or_path=$model" "$@"

say "done in $((SECONDS - started)) s after installation"
