#!/bin/bash
# VNN-COMP: prepare_instance.sh v1 CATEGORY ONNX VNNLIB. Nothing is prepared and no category is treated differently;
# reading the files here keeps a cold disk out of the measured time. Exit code 0: run the instance.
set -euo pipefail
[ "${1:-}" = v1 ] && [ $# -eq 4 ] || { echo "usage: prepare_instance.sh v1 CATEGORY ONNX VNNLIB" >&2; exit 1; }
cat -- "$3" "$4" > /dev/null
