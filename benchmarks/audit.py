"""Figures of what `soundly.auditing` and `soundly.gap` say about networks.

    python benchmarks/audit.py equivalence    float against few bits: proved gaps, see audit_equivalence.py
    python benchmarks/audit.py mixing         mixtures certified by margins, see audit_mixing.py

All take --images and --json, which prints one JSON object as the last line. The data are scikit-learn's digits.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from audit_equivalence import equivalence
from audit_mixing import mixing

EXPERIMENTS: dict[str, Callable[[int], dict[str, Any]]] = {"equivalence": equivalence, "mixing": mixing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--images", type=int, default=10, help="how many test images; default: 10")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    report = EXPERIMENTS[arguments.experiment](arguments.images)
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
