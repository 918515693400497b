"""The command line: each verb is one function that adds its parser and one that runs; `VERBS` lists them.

Exit codes are the same for every verb: 0 accepted or proved (or nothing was claimed), 1 refused, refuted or infeasible,
2 an error (a bad file, a wrong argument, a fault of soundly's own), 3 unknown. A verb imports what it needs itself, so
`soundly --help` is quick and `soundly check` runs where there is no torch.
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundly.errors import InvalidInput, SoundlyError

if TYPE_CHECKING:
    from soundly.certificate import CheckResult
    from soundly.editing.edit import Edit
    from soundly.verification.bench import Outcome
    from soundly.verification.verdict import Progress, Verdict

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

YES, NO, ERROR, UNKNOWN = 0, 1, 2, 3
SHOWN = 20
ENTRIES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Arguments come from the process if argv is None."""
    # Small matrices are slower with several threads, and much slower on a busy machine. Read when numpy starts.
    for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    parser = argparse.ArgumentParser(
        prog="soundly",
        description="Guarantees about neural networks.",
        epilog="exit codes: 0 accepted or proved, 1 refused, refuted or infeasible, 2 error, 3 unknown",
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
    except OSError as error:
        print(f"soundly: {_plain(str(error))}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("soundly: interrupted", file=sys.stderr)
        return ERROR
    except Exception:  # Python itself would exit with 1, which means refuted
        traceback.print_exc()
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
        print(json.dumps(_finite({"file": arguments.file, **asdict(result)}), indent=2, sort_keys=True))
    else:
        encoding = sys.stdout.encoding or "utf-8"
        for line in _text(result, arguments.model):
            print(_plain(line).encode(encoding, "backslashreplace").decode(encoding))
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


def _add_verify(verbs: "Verbs") -> None:
    parser = verbs.add_parser(
        "verify",
        help="prove or refute a specification",
        description="Decide whether a network meets a specification: a proof to re-check, or a counterexample.",
        epilog="example: soundly verify net.onnx robust.vnnlib --timeout 60 --certificate robust.cert",
    )
    parser.add_argument("model", metavar="MODEL", help="a network, .onnx or .onnx.gz")
    parser.add_argument("spec", metavar="SPEC", help="a specification, .vnnlib or .vnnlib.gz")
    parser.add_argument("--timeout", type=_positive, metavar="S", help="seconds, reading the files included")
    parser.add_argument("--memory", type=_positive, metavar="GiB", help="how much of it the process may take")
    parser.add_argument("--certificate", metavar="F", help="where a proof is written, for `soundly check`")
    parser.add_argument("--format", choices=("text", "json", "vnncomp"), default="text", help="default: text")
    parser.add_argument("--no-attack", dest="attack", action="store_false", help="look for a proof alone")
    parser.add_argument("--journal", metavar="F", help="keeps the search, so that it can be taken up again")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    _require_targets({"--certificate": arguments.certificate}, MODEL=arguments.model, SPEC=arguments.spec)
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
        progress=_progress if shown else None,
    )
    if shown:
        _status("")
    facts = {"model": arguments.model, "spec": arguments.spec, **_facts(verdict), "certificate": None}
    if isinstance(verdict, Proved) and arguments.certificate:
        verdict.certificate.save(arguments.certificate)
        facts["certificate"] = arguments.certificate
    if arguments.format == "json":
        print(json.dumps(_finite(facts), indent=2, sort_keys=True))
    else:
        for line in _competition(facts) if arguments.format == "vnncomp" else map(_plain, _verdict_text(facts)):
            print(line)
    return {"proved": YES, "empty": YES, "refuted": NO, "unknown": UNKNOWN}[facts["verdict"]]


def _facts(verdict: "Verdict") -> dict[str, Any]:
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
    _status(
        f"{state.seconds:.0f} s  {state.subproblems} subproblems  {state.open_share:.1%} open  bound {state.bound:.4g}"
    )


def _status(text: str) -> None:
    """One line of the terminal, written over again and again."""
    print(f"\r{text:<78.78}" + "\r" * (not text), end="", file=sys.stderr, flush=True)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _add_edit(verbs: "Verbs") -> None:
    parser = verbs.add_parser(
        "edit",
        help="change weights so that constraints hold, with proof",
        description="Change a network's weights as little as possible so that constraints hold, with proof.",
        epilog="exit codes: 0 edited and proved, 1 infeasible, 2 error, 3 not proved or out of time; "
        "example: soundly edit net.onnx constraints.json -o edited.onnx --layer fc --certificate edit.cert",
    )
    parser.add_argument("model", metavar="MODEL", help="a network, .onnx or .onnx.gz")
    parser.add_argument("constraints", metavar="CONSTRAINTS", help="what must hold, .json (docs/editing.md)")
    parser.add_argument(
        "-o", "--output", type=_onnx, required=True, metavar="EDITED", help="where the edited network is written"
    )
    parser.add_argument("--layer", action="append", metavar="L", help="a layer to change; may be repeated")
    parser.add_argument("--norm", choices=("l2", "l1", "linf"), help="what 'little' means; default: l2")
    parser.add_argument("--bound", type=_positive, metavar="B", help="no weight changes by more than this")
    parser.add_argument("--certificate", metavar="F", help="where the proof is written, for `soundly check`")
    parser.add_argument("--delta", metavar="F", help="where the changed entries are written, for `soundly undo`")
    parser.add_argument("--timeout", type=_positive, metavar="S", help="seconds, reading the files included")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.set_defaults(run=_edit)


def _edit(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    files = {"-o": arguments.output, "--certificate": arguments.certificate, "--delta": arguments.delta}
    _require_targets(files, MODEL=arguments.model, CONSTRAINTS=arguments.constraints)
    from soundly.editing.deliver import deliver
    from soundly.editing.edit import edit
    from soundly.editing.statement import read_statement
    from soundly.graph.load import load
    from soundly.graph.onnx_file import read_file

    network = load(arguments.model)
    original = read_file(arguments.model).data
    assert original is not None
    stated = read_statement(arguments.constraints, network)
    layers = tuple(arguments.layer or stated.layer or ())
    if not layers:
        known = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in network.parameters)
        raise InvalidInput(f"--layer: say which layer to change, here or in the file; there are {', '.join(known)}.")
    shown = not arguments.quiet and sys.stderr.isatty()
    outcome = edit(
        network,
        stated.constraints,
        layer=layers[0] if len(layers) == 1 else layers,
        norm=arguments.norm or stated.norm or "l2",
        bound=arguments.bound or stated.bound,
        goals=stated.goals,
        time_limit=None if arguments.timeout is None else max(arguments.timeout - (time.monotonic() - started), 1e-3),
        progress=_status if shown else None,
        **stated.options,
    )
    if shown:
        _status("")
    facts = {"model": arguments.model, "constraints": arguments.constraints, **_outcome(outcome)}
    facts |= {"output": None, "certificate": None, "delta": None, "changes": {}}
    if outcome.status == "proved":
        targets = {"certificate": arguments.certificate, "delta": arguments.delta}
        changes = deliver(original, network, outcome, arguments.output, **targets)
        facts |= {"output": arguments.output, "changes": {name: asdict(m) for name, m in changes.items()}, **targets}
    if arguments.format == "json":
        print(json.dumps(_finite(facts), indent=2, sort_keys=True))
    else:
        for line in _edit_text(facts):
            print(_plain(line))
    return {"proved": YES, "infeasible": NO, "unproven": UNKNOWN, "limit": UNKNOWN}[outcome.status]


def _require_targets(targets: dict[str, str | None], **sources: str) -> None:
    """Every file can be written, and none of them over another one."""
    taken = {Path(path).absolute(): name for name, path in sources.items()}
    for name, path in targets.items():
        if path is None:
            continue
        target = Path(path).absolute()
        if not target.parent.is_dir():
            raise InvalidInput(f"{name}: {target.parent} is no folder; make it first.")
        same = [other for known, other in taken.items() if known == target or _is_same(known, target)]
        if same:
            raise InvalidInput(f"{name}: {path} is {same[0]} too; give each its own file.")
        taken[target] = name


def _is_same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _outcome(outcome: "Edit") -> dict[str, Any]:
    """An edit as plain values."""
    return {
        "status": outcome.status, "reason": outcome.reason, "conflict": list(outcome.conflict),
        "rows": outcome.rows, "rows_before": outcome.rows_before, "proven": outcome.proven,
        "smallest": outcome.smallest, "seconds": dict(outcome.seconds),
        "arithmetic": None if outcome.check is None else outcome.check.arithmetic,
        "claims": [{"name": name, "held_before": held}
                   for name, held in zip(outcome.claims, outcome.held_before, strict=True)],
    }  # fmt: skip


def _edit_text(facts: dict[str, Any]) -> Iterator[str]:
    """The status, then what it rests on."""
    rows = f"{facts['rows']} row{'s' * (facts['rows'] != 1)}, {facts['rows_before']} held before"
    if facts["status"] == "proved":
        yield f"proved        {rows}, all hold now, {facts['arithmetic']}"
        width = max((min(len(name), 48) for name in facts["changes"]), default=0)
        for name, change in facts["changes"].items():
            share = f"{change['relative']:.3g} of their norm" if math.isfinite(change["relative"]) else "all were 0"
            count = f"{change['changed']} of {change['of']} weights"
            yield f"  changed     {name:<{width}.48}  {count}, {share}, at most {change['largest']:.3g}"
        if not facts["changes"]:
            yield "  changed     nothing: every constraint held before"
        elif not facts["smallest"]:
            yield "  note        a smaller change may exist"
    else:
        yield f"{facts['status']:<12}  {facts['reason']}"
        for row in facts["conflict"][:SHOWN]:
            yield f"  conflict    {row}"
        if hidden := facts["conflict"][SHOWN:]:
            yield f"  and {len(hidden)} more rows"
        yield f"  rows        {rows}"
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in facts["seconds"].items() if seconds)
    yield f"  effort      {parts}"
    for name in ("output", "certificate", "delta"):
        if facts[name]:
            yield f"  {name:<11} {facts[name]}"


def _add_undo(verbs: "Verbs") -> None:
    parser = verbs.add_parser(
        "undo",
        help="take an edit back, bit for bit",
        description="Write the network as it was before an edit, from the edited one and the delta file of the edit.",
        epilog="example: soundly undo edited.onnx edit.delta -o net.onnx",
    )
    parser.add_argument("model", metavar="EDITED", help="the edited network, .onnx or .onnx.gz")
    parser.add_argument("delta", metavar="DELTA", help="what `soundly edit --delta` wrote")
    parser.add_argument(
        "-o", "--output", type=_onnx, required=True, metavar="ORIGINAL", help="where the network is written"
    )
    parser.set_defaults(run=_undo)


def _undo(arguments: argparse.Namespace) -> int:
    _require_targets({"-o": arguments.output}, EDITED=arguments.model, DELTA=arguments.delta)
    from soundly.editing.delta import Delta
    from soundly.graph.onnx_file import read_file
    from soundly.graph.onnx_weights import write

    delta = Delta.load(arguments.delta)
    edited = read_file(arguments.model).data
    assert edited is not None
    original = delta.undone(edited)
    write(original, arguments.output)
    count = sum(len(change.index) for change in delta.changes.values())
    print(_plain(f"undone        {count} weights as before, SHA-256 {delta.before}"))
    print(_plain(f"  output      {arguments.output}"))
    return YES


def _onnx(text: str) -> str:
    if not text.endswith((".onnx", ".onnx.gz")):
        raise argparse.ArgumentTypeError(f"{text} must end in .onnx or .onnx.gz, the format that is written")
    return text


def _add_bench(verbs: "Verbs") -> None:
    parser = verbs.add_parser(
        "bench",
        help="verify a folder of instances",
        description="Verify what DIR/instances.csv lists, each in a process of its own, and compare with its answers.",
        epilog="exit codes: 0 nothing wrong, 1 a wrong answer or a certificate not accepted, 2 error, 3 interrupted",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds instances.csv and what it names")
    parser.add_argument("--timeout", type=_positive, metavar="S", help="caps the time limits in instances.csv")
    parser.add_argument("--memory", type=_positive, metavar="GiB", help="for each instance")
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
        _status(f"[{bar:<20}] {len(done)} of {len(instances)}  {outcome.verdict}  {_plain(outcome.name)}")

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
        _status("")
    summary = Summary.of(outcomes)
    if arguments.json:
        print(json.dumps(_finite({"summary": asdict(summary), "outcomes": [asdict(o) for o in outcomes]}), indent=2))
    else:
        for line in table(outcomes):
            print(_plain(line))
    if missing := len(instances) - len(outcomes):
        print(f"soundly: interrupted, {missing} instance{'s' * (missing > 1)} left", file=sys.stderr)
    return NO if summary.wrong else UNKNOWN if missing else YES


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


VERBS: tuple[Callable[["Verbs"], None], ...] = (_add_verify, _add_edit, _add_undo, _add_check, _add_bench)
