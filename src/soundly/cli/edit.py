"""`soundly edit` and `soundly undo`: weights are changed so that constraints hold, and changed back."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from soundly.cli.terminal import (
    NO,
    SHOWN,
    UNKNOWN,
    YES,
    Verbs,
    finite,
    onnx_name,
    plain,
    positive,
    require_targets,
    status,
)
from soundly.errors import InvalidInput

if TYPE_CHECKING:
    from soundly.editing.edit import Edit


def add(verbs: Verbs) -> None:
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
        "-o", "--output", type=onnx_name, required=True, metavar="EDITED", help="where the edited network is written"
    )
    parser.add_argument("--layer", action="append", metavar="L", help="a layer to change; may be repeated")
    parser.add_argument("--norm", choices=("l2", "l1", "linf"), help="what 'little' means; default: l2")
    parser.add_argument("--bound", type=positive, metavar="B", help="no weight changes by more than this")
    parser.add_argument("--certificate", metavar="F", help="where the proof is written, for `soundly check`")
    parser.add_argument("--delta", metavar="F", help="where the changed entries are written, for `soundly undo`")
    parser.add_argument("--timeout", type=positive, metavar="S", help="seconds, reading the files included")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.set_defaults(run=_edit)


def _edit(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    files = {"-o": arguments.output, "--certificate": arguments.certificate, "--delta": arguments.delta}
    require_targets(files, MODEL=arguments.model, CONSTRAINTS=arguments.constraints)
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
        progress=status if shown else None,
        **stated.options,
    )
    if shown:
        status("")
    facts = {"model": arguments.model, "constraints": arguments.constraints, **_outcome(outcome)}
    facts |= {"output": None, "certificate": None, "delta": None, "changes": {}}
    if outcome.status == "proved":
        targets = {"certificate": arguments.certificate, "delta": arguments.delta}
        changes = deliver(original, network, outcome, arguments.output, **targets)
        facts |= {"output": arguments.output, "changes": {name: asdict(m) for name, m in changes.items()}, **targets}
    if arguments.format == "json":
        print(json.dumps(finite(facts), indent=2, sort_keys=True))
    else:
        for line in _edit_text(facts):
            print(plain(line))
    return {"proved": YES, "infeasible": NO, "unproven": UNKNOWN, "limit": UNKNOWN}[outcome.status]


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


def add_undo(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "undo",
        help="take an edit back, bit for bit",
        description="Write the network as it was before an edit, from the edited one and the delta file of the edit.",
        epilog="example: soundly undo edited.onnx edit.delta -o net.onnx",
    )
    parser.add_argument("model", metavar="EDITED", help="the edited network, .onnx or .onnx.gz")
    parser.add_argument("delta", metavar="DELTA", help="what `soundly edit --delta` wrote")
    parser.add_argument(
        "-o", "--output", type=onnx_name, required=True, metavar="ORIGINAL", help="where the network is written"
    )
    parser.set_defaults(run=_undo)


def _undo(arguments: argparse.Namespace) -> int:
    require_targets({"-o": arguments.output}, EDITED=arguments.model, DELTA=arguments.delta)
    from soundly.editing.delta import Delta
    from soundly.graph.onnx_file import read_file
    from soundly.graph.onnx_weights import write

    delta = Delta.load(arguments.delta)
    edited = read_file(arguments.model).data
    assert edited is not None
    original = delta.undone(edited)
    write(original, arguments.output)
    count = sum(len(change.index) for change in delta.changes.values())
    print(plain(f"undone        {count} weights as before, SHA-256 {delta.before}"))
    print(plain(f"  output      {arguments.output}"))
    return YES
