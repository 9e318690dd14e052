#!/usr/bin/env bash
# Test and measure the GPU backend on this machine: `scripts/gpu_check.sh --help`. Installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m scripts.gpu_check "$@"
