"""How much of VNN-COMP soundly decides here, and whether any answer is wrong.

SOUNDLY_VNNCOMP names a directory with one folder per benchmark, each with an instances.csv (see `soundly bench`).
Each instance runs in a process of its own with one thread; the figures are CPU seconds of the whole process. With
--no-attack only the instances with a known counterexample run, and nothing may be proved.

    SOUNDLY_VNNCOMP=dir python benchmarks/vnncomp.py [--folders acasxu safenlp] [--timeout 60] [--journals dir] [--json]
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from soundly.errors import SoundlyError
from soundly.verification.bench import Outcome, Summary, bench, lines, read_instances, table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="instances whose line contains this")
    parser.add_argument("--timeout", type=float, metavar="S", help="caps the instances' own limits")
    parser.add_argument("--memory", type=float, metavar="GiB", help="for each instance")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--journals", type=Path, metavar="DIR", help="one journal per folder; what it has is skipped")
    parser.add_argument("--certificates", type=Path, metavar="DIR", help="write proofs here, and re-check each")
    parser.add_argument("--no-attack", action="store_true", help="known counterexamples only: no proof may be found")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    root = os.environ.get("SOUNDLY_VNNCOMP")
    if not root or not Path(root).is_dir():
        parser.error("SOUNDLY_VNNCOMP names no directory; set it to one with a folder per benchmark.")
    for folder in (args.journals, args.certificates):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no instance's process may outlive this one
    every: list[Outcome] = []
    result = {}
    for name in args.folders or sorted(path.parent.name for path in Path(root).glob("*/instances.csv")):
        try:
            instances = read_instances(Path(root) / name, timeout=args.timeout)
        except SoundlyError as problem:
            parser.error(str(problem))
        instances = [i for i in instances if args.only in i.name and (i.expected == "sat" or not args.no_attack)]
        if not instances:
            continue
        outcomes = bench(
            instances,
            journal=args.journals / f"{name}.jsonl" if args.journals else None,
            jobs=args.jobs,
            memory=None if args.memory is None else int(args.memory * 2**30),
            certificates=args.certificates,
            options=["--no-attack"] if args.no_attack else [],
        )
        print(f"\n{name}", *table(outcomes), sep="\n", flush=True)
        every += outcomes
        result[name] = {"summary": asdict(Summary.of(outcomes)), "outcomes": [asdict(o) for o in outcomes]}
        if len(outcomes) < len(instances):
            print("interrupted")
            break
    print("\nall folders", *lines(Summary.of(every)), sep="\n")
    if args.json:
        print(json.dumps({"total": asdict(Summary.of(every)), "folders": result}))
    return 1 if Summary.of(every).wrong else 0


if __name__ == "__main__":
    sys.exit(main())
