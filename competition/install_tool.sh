#!/bin/bash
# VNN-COMP: install_tool.sh v1. Installs soundly into a virtual environment of its own, .venv beside the repository's
# pyproject.toml.
set -euo pipefail
[ "${1:-}" = v1 ] || { echo "usage: install_tool.sh v1" >&2; exit 1; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
test -x "$root/.venv/bin/pip" || python3 -m venv "$root/.venv"
"$root/.venv/bin/pip" install --quiet "$root[onnx]"
"$root/.venv/bin/python" -m soundly --version
