"""`soundly check`: a certificate is checked again."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from soundly.cli.terminal import NO, SHOWN, YES, Verbs, finite, plain
from soundly.errors import InvalidInput

if TYPE_CHECKING:
    from soundly.certificate import CheckResult


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "check",
        help="re-check a certificate",
        description="Prove every row of a certificate again from its numbers alone.",
        epilog="example: soundly check edit.cert --model edited.safetensors",
    )
    parser.add_argument("file", metavar="FILE", help="a certificate")
    parser.add_argument(
        "--model", metavar="M", help="also compare this model's weights, bit by bit: a .safetensors file, or an .onnx "
        "file together with --spec or --constraints",
    )  # fmt: skip
    stated = parser.add_mutually_exclusive_group()
    stated.add_argument("--spec", metavar="S.vnnlib", help="also compare the specification that was verified")
    stated.add_argument("--constraints", metavar="C.json", help="also compare the constraints of the edit")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from soundly.certificate import check

    stated = arguments.spec or arguments.constraints
    if stated is not None or (arguments.model or "").endswith((".onnx", ".onnx.gz")):
        result = _compared(arguments.file, arguments.model, stated, arguments.constraints is not None)
    else:
        result = check(arguments.file, model=arguments.model)
    if arguments.format == "json":
        print(json.dumps(finite({"file": arguments.file, **asdict(result)}), indent=2, sort_keys=True))
    else:
        encoding = sys.stdout.encoding or "utf-8"
        for line in _text(result, arguments.model):
            print(plain(line).encode(encoding, "backslashreplace").decode(encoding))
    return YES if result.accepted else NO


def _compared(file: str, model: str | None, stated: str | None, edited: bool) -> "CheckResult":
    """Checks a certificate, and that it is about this model and this specification, or these constraints of an edit."""
    if model is None or stated is None:
        raise InvalidInput("check: --model M.onnx goes with --spec S.vnnlib or --constraints C.json: give both.")
    from dataclasses import replace

    from soundly.certificate import Certificate, check
    from soundly.graph.load import load

    certificate = Certificate.load(file)
    result, network = check(certificate), load(model)
    if edited:
        from soundly.editing.confirm import confirm
        from soundly.editing.statement import read_statement

        constraints = read_statement(stated, network).constraints
        different = confirm(certificate, network, constraints) if not result.problems else []
    else:
        from soundly.spec.vnnlib import read_vnnlib
        from soundly.verification.problem import problem_of
        from soundly.verification.proof import differences

        different = differences(certificate, problem_of(read_vnnlib(stated, network)))
    found = [f"this is not the claim of {stated} about {model}: {text}" for text in different[:3]]
    matches = not different and not result.problems
    return replace(
        result, accepted=result.accepted and matches, problems=(*result.problems, *found), model_matches=matches
    )


def _text(result: "CheckResult", model: str | None) -> Iterator[str]:
    """One line per claim, those not proven first, then the verdict."""
    claims = sorted(result.claims, key=lambda claim: claim.proven == claim.rows)
    name_width = max((min(len(claim.name), 48) for claim in claims[:SHOWN]), default=0)
    row_width = max((len(str(claim.rows)) for claim in claims[:SHOWN]), default=0)
    for claim in claims[:SHOWN]:
        word = "proved" if claim.proven == claim.rows else "not proved"
        rows = f"{claim.proven:>{row_width}} of {claim.rows:>{row_width}} rows"
        yield f"  {word:<10}  {claim.name:<{name_width}.48}  {rows}  slack {claim.worst_slack:.2g}"
    if hidden := claims[SHOWN:]:
        unproven = sum(claim.proven < claim.rows for claim in hidden)
        yield f"  and {len(hidden)} more claims, {f'{unproven} not proved' if unproven else 'all proved'}"
    for problem in result.problems:
        yield f"  problem     {problem}"
    if result.model_matches:
        yield f"  model       {model} holds exactly these weights"
    verdict = "accepted" if result.accepted else "refused"
    yield f"{verdict:<12}  {result.proven} of {result.rows} rows proved, {result.arithmetic}"
