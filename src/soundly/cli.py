"""The command line: each verb is one function that adds its parser and one that runs; `VERBS` lists them.

Exit codes are the same for every verb: 0 accepted or proved, 1 refused or refuted, 2 an error (a bad file, a wrong
argument), 3 unknown. A verb imports what it needs itself, so `soundly --help` is quick and `soundly check` runs where
there is no torch.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from soundly.errors import SoundlyError

if TYPE_CHECKING:
    from soundly.certificate import CheckResult

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

YES, NO, ERROR = 0, 1, 2
SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Arguments come from the process if argv is None."""
    parser = argparse.ArgumentParser(
        prog="soundly",
        description="Guarantees about neural networks.",
        epilog="exit codes: 0 accepted or proved, 1 refused or refuted, 2 error, 3 unknown",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in VERBS:
        add(verbs)
    try:
        arguments = parser.parse_args(argv)
        code: int = arguments.run(arguments)
    except SystemExit as stop:  # how argparse ends after --help and after a wrong argument
        return stop.code if isinstance(stop.code, int) else YES
    except SoundlyError as error:
        print(f"soundly: {_plain(str(error))}", file=sys.stderr)
        return ERROR
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough; the flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    return code


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"soundly {version('soundly')}")
        except PackageNotFoundError:
            print("soundly, run from its source without being installed")
        parser.exit()


def _add_check(verbs: "Verbs") -> None:
    parser = verbs.add_parser(
        "check",
        help="re-check a certificate",
        description="Prove every row of a certificate again from its numbers alone.",
        epilog="example: soundly check edit.cert --model edited.safetensors",
    )
    parser.add_argument("file", metavar="FILE", help="a certificate")
    parser.add_argument("--model", metavar="M.safetensors", help="also compare this model's weights, bit by bit")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from soundly.certificate import check

    result = check(arguments.file, model=arguments.model)
    if arguments.format == "json":
        print(json.dumps(_finite({"file": arguments.file, **asdict(result)}), indent=2, sort_keys=True))
    else:
        encoding = sys.stdout.encoding or "utf-8"
        for line in _text(result, arguments.model):
            print(_plain(line).encode(encoding, "backslashreplace").decode(encoding))
    return YES if result.accepted else NO


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


def _plain(text: str) -> str:
    """Without what could move a terminal's cursor: names and paths come from strangers."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _finite(value: Any) -> Any:
    """JSON has no infinity; null stands for it."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


VERBS: tuple[Callable[["Verbs"], None], ...] = (_add_check,)
