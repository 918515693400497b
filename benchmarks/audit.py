"""Audits that are measured, one module each: python benchmarks/audit.py NAME [--json] ...

    availability    training that makes a certifier abstain, and the proof that no patch does, on digits

Each is `benchmarks/audit_NAME.py` with a function `run(arguments)`, and says in its docstring what it takes.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

EXPERIMENTS = sorted(path.stem.removeprefix("audit_") for path in Path(__file__).parent.glob("audit_*.py"))


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in EXPERIMENTS:
        print(f"give one of: {', '.join(EXPERIMENTS)}", file=sys.stderr)
        return 2
    result: int = importlib.import_module(f"audit_{arguments[0]}").run(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
