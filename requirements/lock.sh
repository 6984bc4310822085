#!/usr/bin/env bash
# Resolve cpu.in afresh in a scratch environment and write cpu.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch"
pip() { "$scratch/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -qq --upgrade pip
pip install -qq --requirement requirements/cpu.in
pip install -qq --no-deps --requirement requirements/cpu-nodeps.in
# Required by xgrammar for its CUDA kernels; without a GPU vLLM only warns about it.
pip uninstall --quiet --yes triton
{
  echo "# Made by requirements/lock.sh from cpu.in and cpu-nodeps.in, for Python 3.11 and 3.12 on x86-64 Linux."
  # A build tag such as +cpu names an index, not a version.
  pip freeze --all --exclude pip | sed 's/+cpu$//'
} > requirements/cpu.lock
