#!/bin/bash
# VNN-COMP: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS_FILE TIMEOUT. Writes unsat, sat and a counterexample, unknown,
# or error. The results file appears once the answer is complete; PYTHON names another interpreter that has soundly.
set -uo pipefail
[ "${1:-}" = v1 ] && [ $# -eq 6 ] || {
    echo "usage: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS_FILE TIMEOUT" >&2; exit 1
}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rm -f -- "$5"
"${PYTHON:-$root/.venv/bin/python}" -m soundly verify "$3" "$4" --timeout "$6" --format vnncomp --quiet > "$5.partial"
code=$?
answer=$(head -n 1 -- "$5.partial")
case "$code $answer" in  # an answer counts only if the exit code agrees: a crash says nothing
    "0 unsat" | "1 sat" | "3 unknown") ;;
    *) echo error > "$5.partial" ;;
esac
mv -- "$5.partial" "$5"
