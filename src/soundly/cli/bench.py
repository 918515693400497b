"""`soundly bench`: a folder of instances, each in a process of its own."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from soundly.cli.terminal import NO, UNKNOWN, YES, Verbs, finite, plain, positive, status

if TYPE_CHECKING:
    from soundly.verification.bench import Outcome


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "bench",
        help="verify a folder of instances",
        description="Verify what DIR/instances.csv lists, each in a process of its own, and compare with its answers.",
        epilog="exit codes: 0 nothing wrong, 1 a wrong answer or a certificate not accepted, 2 error, 3 interrupted",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds instances.csv and what it names")
    parser.add_argument("--timeout", type=positive, metavar="S", help="caps the time limits in instances.csv")
    parser.add_argument("--memory", type=positive, metavar="GiB", help="for each instance")
    parser.add_argument("--only", default="", metavar="TEXT", help="instances whose line contains this")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at once; default: 1")
    parser.add_argument("--journal", type=Path, metavar="F", help="keep outcomes here; skip those it has")
    parser.add_argument("--certificates", type=Path, metavar="DIR", help="write proofs here, and re-check each")
    parser.add_argument("--no-attack", action="store_true", help="look for proofs alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    import signal

    from soundly.verification.bench import Summary, bench, read_instances, table

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no instance's process may outlive this
    instances = read_instances(arguments.folder, timeout=arguments.timeout, only=arguments.only)
    if arguments.certificates:
        arguments.certificates.mkdir(parents=True, exist_ok=True)
    done: list[Outcome] = []

    def progress(outcome: "Outcome") -> None:
        done.append(outcome)
        bar = "#" * (20 * len(done) // len(instances))
        status(f"[{bar:<20}] {len(done)} of {len(instances)}  {outcome.verdict}  {plain(outcome.name)}")

    shown = sys.stderr.isatty()
    outcomes = bench(
        instances,
        journal=arguments.journal,
        jobs=arguments.jobs,
        memory=None if arguments.memory is None else int(arguments.memory * 2**30),
        certificates=arguments.certificates,
        options=["--no-attack"] if arguments.no_attack else [],
        progress=progress if shown else None,
    )
    if shown:
        status("")
    summary = Summary.of(outcomes)
    if arguments.json:
        print(json.dumps(finite({"summary": asdict(summary), "outcomes": [asdict(o) for o in outcomes]}), indent=2))
    else:
        for line in table(outcomes):
            print(plain(line))
    if missing := len(instances) - len(outcomes):
        print(f"soundly: interrupted, {missing} instance{'s' * (missing > 1)} left", file=sys.stderr)
    return NO if summary.wrong else UNKNOWN if missing else YES
