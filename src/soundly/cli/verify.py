"""`soundly verify`: a specification is proved or refuted."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundly.cli.terminal import NO, UNKNOWN, YES, Verbs, finite, plain, positive, require_targets, status

ENTRIES = 6

if TYPE_CHECKING:
    from soundly.verification.verdict import Progress, Verdict


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "verify",
        help="prove or refute a specification",
        description="Decide whether a network meets a specification: a proof to re-check, or a counterexample.",
        epilog="example: soundly verify net.onnx robust.vnnlib --timeout 60 --certificate robust.cert",
    )
    parser.add_argument("model", metavar="MODEL", help="a network, .onnx or .onnx.gz")
    parser.add_argument("spec", metavar="SPEC", help="a specification, .vnnlib or .vnnlib.gz")
    parser.add_argument("--timeout", type=positive, metavar="S", help="seconds, reading the files included")
    parser.add_argument("--memory", type=positive, metavar="GiB", help="how much of it the process may take")
    parser.add_argument("--certificate", metavar="F", help="where a proof is written, for `soundly check`")
    parser.add_argument("--format", choices=("text", "json", "vnncomp"), default="text", help="default: text")
    parser.add_argument("--arithmetic", choices=("real", "float32"), default="real", help="what a proof covers")
    parser.add_argument("--no-attack", dest="attack", action="store_false", help="look for a proof alone")
    parser.add_argument("--journal", metavar="F", help="keeps the search, so that it can be taken up again")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    require_targets({"--certificate": arguments.certificate}, MODEL=arguments.model, SPEC=arguments.spec)
    from soundly.graph.load import load
    from soundly.spec.vnnlib import read_vnnlib
    from soundly.verification.verdict import Proved
    from soundly.verification.verify import verify

    claim = read_vnnlib(Path(arguments.spec), load(arguments.model))
    shown = not arguments.quiet and sys.stderr.isatty()
    verdict = verify(
        claim,
        model=arguments.model,
        timeout=None if arguments.timeout is None else max(arguments.timeout - (time.monotonic() - started), 1e-3),
        memory=None if arguments.memory is None else int(arguments.memory * 2**30),
        attack=arguments.attack,
        journal=arguments.journal,
        arithmetic=arguments.arithmetic,
        progress=_progress if shown else None,
    )
    if shown:
        status("")
    facts = {"model": arguments.model, "spec": arguments.spec, **facts_of(verdict), "certificate": None}
    if isinstance(verdict, Proved) and arguments.certificate:
        verdict.certificate.save(arguments.certificate)
        facts["certificate"] = arguments.certificate
    if arguments.format == "json":
        print(json.dumps(finite(facts), indent=2, sort_keys=True))
    else:
        for line in _competition(facts) if arguments.format == "vnncomp" else map(plain, _verdict_text(facts)):
            print(line)
    return {"proved": YES, "empty": YES, "refuted": NO, "unknown": UNKNOWN}[facts["verdict"]]


def facts_of(verdict: "Verdict") -> dict[str, Any]:
    """A verdict as plain values."""
    from soundly.verification.verdict import Empty, Proved, Refuted, Unknown

    effort = asdict(verdict.effort)
    match verdict:
        case Proved(certificate=certificate):
            return {"verdict": "proved", "arithmetic": certificate.header.get("arithmetic"), **effort}
        case Refuted(witness=x, outputs=y, violation=violation, replayed=replayed):
            point = {"witness": x.flatten().tolist(), "outputs": y.flatten().tolist()}
            return {"verdict": "refuted", "violation": violation, "replayed": replayed, **point, **effort}
        case Unknown(bound=bound, open=share, reason=reason):
            return {"verdict": "unknown", "bound": bound, "open": share, "reason": reason, **effort}
        case Empty():
            return {"verdict": "empty", **effort}


def _verdict_text(facts: dict[str, Any]) -> Iterator[str]:
    """The verdict, then what it rests on."""
    match facts["verdict"]:
        case "proved":
            yield f"proved        no counterexample exists, {facts['arithmetic']}"
        case "refuted":
            yield f"refuted       by a counterexample, replayed by {facts['replayed']}"
            yield f"  violation   {facts['violation']:.6g}"
            for name, title in (("witness", "inputs"), ("outputs", "outputs")):
                more = f", ... {len(facts[name])} in all" if len(facts[name]) > ENTRIES else ""
                yield f"  {title:<10}  {', '.join(f'{v:.6g}' for v in facts[name][:ENTRIES])}{more}"
        case "unknown":
            yield f"unknown       {facts['reason']}"
            yield f"  bound       {facts['bound']:.6g} at best, {facts['open']:.1%} of the search open"
        case "empty":
            yield "empty         the specification allows no input: nothing is claimed"
    parts = f"{facts['subproblems']} subproblem{'s' * (facts['subproblems'] != 1)}, {facts['seconds']:.2f} s"
    yield f"  effort      {parts}" if facts["verdict"] == "unknown" else f"  effort      {facts['settled']}, {parts}"
    if facts["certificate"]:
        yield f"  certificate {facts['certificate']}"


def _competition(facts: dict[str, Any]) -> Iterator[str]:
    """As VNN-COMP reads it: a word, and after `sat` the counterexample."""
    yield {"proved": "unsat", "empty": "unsat", "refuted": "sat", "unknown": "unknown"}[facts["verdict"]]
    if facts["verdict"] == "refuted":
        values = [f"({letter}_{i} {value!r})" for letter, side in (("X", "witness"), ("Y", "outputs"))
                  for i, value in enumerate(facts[side])]  # fmt: skip
        yield "(" + "\n".join(values) + ")"


def _progress(state: "Progress") -> None:
    status(
        f"{state.seconds:.0f} s  {state.subproblems} subproblems  {state.open_share:.1%} open  bound {state.bound:.4g}"
    )
