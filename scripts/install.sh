#!/usr/bin/env bash
# How does .venv come to hold exactly the tested versions?
#
#   bash scripts/install.sh            # extras dev, plots, quant and tracking
#   bash scripts/install.sh plots      # only these extras (comma separated; "none" for no extras)
#
#   PYTHON=python3.12 bash scripts/install.sh    # another interpreter for a new .venv
#
# A second run with nothing changed returns at once. The stamp that says "complete" is written last, so an
# interrupted run is simply continued by the next one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-dev,plots,quant,tracking}"
target="."
[ "$extras" = none ] || target=".[$extras]"
venv=".venv"
stamp="$venv/.sparse-zero-installed"
python="${PYTHON:-python3}"

fail() { printf 'install: error: %s\n' "$1" >&2; exit 2; }
phase() { printf 'install: %s\n' "$1"; }

hash_of_inputs() {
    "$1" - "$extras" <<'PY'
import hashlib, os, pathlib, sys
parts = [sys.argv[1].encode(), os.getcwd().encode()]
parts += [pathlib.Path(name).read_bytes() for name in ("setup.py", "constraints.txt", "scripts/install.sh")]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] \
    && [ "$(cat "$stamp")" = "$(hash_of_inputs "$venv/bin/python")" ]; then
    exit 0
fi

command -v "${CXX:-g++}" >/dev/null 2>&1 \
    || fail "no C++ compiler: DeepSpeed builds its operators when first used; install g++ (Debian: apt install g++)"

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    command -v "$python" >/dev/null 2>&1 || fail "$python is not found: set PYTHON to a Python 3.11 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$("$python" --version 2>&1) is too old: set PYTHON to a Python 3.11 or newer"
    phase "make $venv with $("$python" --version 2>&1)"
    # --clear: what an interrupted attempt left is not built upon.
    "$python" -m venv --clear "$venv" || fail "no venv module for $python (Debian: apt install python3-venv)"
fi
python="$venv/bin/python"
rm -f "$stamp"
export PIP_DISABLE_PIP_VERSION_CHECK=1

constraints="$(mktemp)"
log="$(mktemp)"
trap 'rm -f "$constraints" "$log"' EXIT
cp constraints.txt "$constraints"

run_pip() {
    # Quiet when it works, everything when it does not.
    if ! "$python" -m pip install --quiet "$@" >"$log" 2>&1; then
        cat "$log" >&2
        fail "pip install failed (see above); start again to continue"
    fi
}

# torch comes first and by its exact version: asked for as a range, pip takes the newest wheel of the index,
# which brings gigabytes of GPU libraries also to machines that have a CPU build at hand. A torch that the
# environment already has is kept, whatever its version, and then not constrained.
if "$python" -c 'import torch' >/dev/null 2>&1; then
    phase "keep torch $("$python" -c 'import torch; print(torch.__version__)')"
    grep -v '^torch==' constraints.txt >"$constraints"
else
    torch="$(grep '^torch==' constraints.txt)"
    phase "install $torch"
    run_pip -c "$constraints" "$torch"
fi

phase "install $target and what it needs (a few minutes when nothing is cached)"
run_pip -c "$constraints" -e "$target"

hash_of_inputs "$python" >"$stamp.part"
mv "$stamp.part" "$stamp"
phase "complete"
