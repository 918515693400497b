"""What the auditing part of soundly reaches, measured.

    python benchmarks/audit.py patterns     activation patterns as specifications, see benchmarks/audit_patterns.py

All take --quick for a shorter run, and --json to print one JSON object as their last line. Seconds are those of the
processor: on an idle machine, of the clock.
"""

from __future__ import annotations

import argparse
import importlib
import json

EXPERIMENTS = {"patterns": "audit_patterns"}
"""Each is a module beside this one with a function `run(*, quick)` that returns a dict for JSON."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="a shorter run")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    report = importlib.import_module(EXPERIMENTS[arguments.experiment]).run(quick=arguments.quick)
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
