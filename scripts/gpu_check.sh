#!/usr/bin/env bash
# Test and measure the GPU backend on this machine: `scripts/gpu_check.sh --help`. Installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
needed='import sys; from importlib.util import find_spec; sys.exit(not (find_spec("torch") and find_spec("triton")))'
if ! "$python" -c "$needed"; then
  echo "$python has no torch and Triton; name one that has: PYTHON=.venv/bin/python scripts/gpu_check.sh" >&2
  exit 1
fi
exec "$python" -m scripts.gpu_check "$@"
