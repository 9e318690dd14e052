#!/usr/bin/env bash
# Test and measure the GPU backend on this machine: `scripts/gpu_check.sh --help`. Installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
needed='from importlib.util import find_spec
names = "torch triton numpy safetensors tokenizers huggingface_hub jinja2 psutil rich"
print(*(name for name in names.split() if find_spec(name) is None))'
missing=$("$python" -c "$needed")
if [ -n "$missing" ]; then
  echo "$python has no $missing; name one that has: PYTHON=.venv/bin/python scripts/gpu_check.sh" >&2
  exit 1
fi
exec "$python" -m scripts.gpu_check "$@"
