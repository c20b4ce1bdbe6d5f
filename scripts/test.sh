#!/usr/bin/env bash
# Is the project in order? Installs into .venv, then lint, format, types and tests, with the time of each.
#
#   bash scripts/test.sh                   # all but the slow tests
#   bash scripts/test.sh -m slow           # arguments go to pytest, which then runs one test at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh

# ninja and the console command are found here; the DeepSpeed operators are built once per user, not per run.
export PATH="$PWD/.venv/bin:$PATH"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sparse_zero/torch_extensions}"
mkdir -p "$TORCH_EXTENSIONS_DIR"

caches=()
# In CI nobody comes back to use the caches.
[ "${CI:-}" = true ] && caches=(-p no:cacheprovider)

phase() {
    local name="$1" start=$SECONDS
    shift
    printf '== %s\n' "$name"
    if "$@"; then
        printf '== %s: passed in %d s\n' "$name" "$((SECONDS - start))"
    else
        local code=$?
        printf '== %s: FAILED after %d s\n' "$name" "$((SECONDS - start))" >&2
        exit "$code"
    fi
}

# Two at a time: ranks of the tests wait for each other half of the time. A file's tests stay together.
[ "$#" -gt 0 ] || set -- -m "not slow" -n 2 --dist loadfile
phase lint python -m ruff check .
phase format python -m ruff format --check .
phase types python -m mypy
phase tests python -m pytest "${caches[@]}" "$@"
printf '== all passed in %d s\n' "$SECONDS"
