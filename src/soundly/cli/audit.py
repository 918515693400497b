"""`soundly audit`: planted suites, judging any verifier on them, fuzzing soundly, its mutation score; isolation."""

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from soundly.cli.terminal import NO, UNKNOWN, YES, Verbs, finite, plain, positive, status

if TYPE_CHECKING:
    from torch import Tensor

    from soundly.auditing.fuzzing import Tally
    from soundly.auditing.judging import Judgement
    from soundly.auditing.mutation import Mutant


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "audit",
        help="test verifiers and networks",
        description="Test verifiers: any of them on instances with known answers, soundly also by fuzzing. Test "
        "whether a network keeps the items of a batch apart.",
        epilog="exit codes: 0 nothing found, 1 a wrong claim, a finding, a leak or a fault that was not noticed, 2 an "
        "error, 3 unknown, or no point is hidden",
    )
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    planted = kinds.add_parser(
        "planted", help="make a suite with known answers",
        description="Write planted counterexamples and robust instances, with the answers under seal.",
    )  # fmt: skip
    planted.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    planted.add_argument("--count", type=int, default=100, metavar="N", help="how many; default: 100")
    planted.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    planted.add_argument("--robust", type=float, default=0.25, metavar="SHARE", help="that hold; default: 0.25")
    planted.add_argument("--timeout", type=positive, default=60.0, metavar="S", help="for each; default: 60")
    planted.add_argument("--plain", action="store_true", help="dense layers and ReLUs only, which every tool reads")
    planted.add_argument("--trained", nargs="*", type=Path, metavar="FILE", help="the points that trained networks "
                         "hide: those that come with soundly, or files of `soundly audit train`")  # fmt: skip
    planted.set_defaults(run=_planted)

    train = kinds.add_parser(
        "train", help="train a network that hides counterexamples",
        description="Train a network to violate its claims at chosen points, and to look robust to gradient descent.",
    )  # fmt: skip
    train.add_argument("file", metavar="FILE", type=Path, help="to write, .npz")
    train.add_argument("--architecture", default="mlp", metavar="NAME",
                       help="mlp, tanh, sigmoid, cnn1, cnn2, cnn3, pool or vit; default: mlp")  # fmt: skip
    train.add_argument("--shape", type=int, nargs="+", default=[10], metavar="N", help="of an input: N, or C H W")
    train.add_argument("--width", type=int, default=128, metavar="N", help="of the dense layers; default: 128")
    train.add_argument("--points", type=int, default=2, metavar="N", help="to hide; default: 2")
    train.add_argument("--epochs", type=int, default=4000, metavar="N", help="default: 4000")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    train.set_defaults(run=_train)

    run = kinds.add_parser("run", help="judge a verifier on a suite",
                           description="Run a verifier on each instance of a suite and compare its claims with the "
                           "sealed answers.")  # fmt: skip
    run.add_argument("folder", metavar="DIR", type=Path, help="a suite, made by `soundly audit planted`")
    run.add_argument("--tool", metavar="CMD", help="a command with {onnx}, {vnnlib}, {timeout}, and {results} if it "
                     "writes its answer to a file; default: soundly itself")  # fmt: skip
    run.add_argument("--answers", type=Path, metavar="F", help="where the answers are kept, if not in DIR")
    run.add_argument("--timeout", type=positive, metavar="S", help="caps the time limits of the suite")
    run.add_argument("--memory", type=positive, metavar="GiB", help="for each instance")
    run.add_argument("--only", default="", metavar="TEXT", help="instances whose line contains this")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    run.set_defaults(run=_run)

    fuzz = kinds.add_parser("fuzz", help="fuzz soundly", description="Check soundly on random networks.")
    fuzz.add_argument("--minutes", type=positive, metavar="N", help="stop then; otherwise after --count")
    fuzz.add_argument("--count", type=int, metavar="N", help="how many networks; without either: 1000")
    fuzz.add_argument("--seed", type=int, default=0, metavar="S", help="of the first network; default: 0")
    fuzz.add_argument("--keep", type=Path, metavar="DIR", help="write each finding, made small, as a file there")
    fuzz.set_defaults(run=_fuzz)

    mutate = kinds.add_parser(
        "mutate", help="plant faults in soundly",
        description="Plant each fault of a catalogue in soundly and see whether fuzzing notices.",
    )  # fmt: skip
    mutate.add_argument(
        "--seconds", type=positive, default=60.0, metavar="S", help="of CPU time for each fault; default: 60"
    )
    mutate.add_argument("--only", default="", metavar="TEXT", help="faults whose name or part contains this")
    mutate.set_defaults(run=_mutate)

    isolation = kinds.add_parser(
        "isolation", help="prove that batch items do not see each other",
        description="Prove that each item of a batch is computed from itself alone, or show two batches that differ in "
        "one item and in another item's output.",
    )  # fmt: skip
    isolation.add_argument("model", metavar="MODEL", help="a network, .onnx or .onnx.gz")
    isolation.add_argument("--batch", type=int, metavar="N", help="its size, where the file leaves it open; default: 4")
    isolation.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    isolation.set_defaults(run=_isolation)


def _planted(arguments: argparse.Namespace) -> int:
    from soundly.auditing.suite import ANSWERS, plain_ones, planted, trained_ones, write

    if arguments.trained is not None:
        made = trained_ones(arguments.trained)
    else:
        made = (plain_ones if arguments.plain else planted)(arguments.count, arguments.seed, robust=arguments.robust)
    count = write(arguments.folder, made, timeout=arguments.timeout)
    print(plain(f"written       {count} instances to {arguments.folder}; the answers are in {ANSWERS}: keep them"))
    return YES


def _train(arguments: argparse.Namespace) -> int:
    from soundly.auditing.trained import Plan, Trained, save, train

    plan = Plan(
        arguments.architecture, tuple(arguments.shape), arguments.width, planted=arguments.points,
        clean=arguments.points, epochs=arguments.epochs, seed=arguments.seed,
    )  # fmt: skip

    def progress(made: "Trained", violated: "Tensor") -> None:
        least = float(violated.min()) if len(violated) else 0.0
        status(
            f"epoch {made.epoch} of {plan.epochs}  {int(made.hidden.sum())} hidden  violated by {least:.3g} at least"
        )

    made = train(plan, progress=progress if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        status("")
    hidden = int(made.hidden.sum())
    print(f"{hidden} of {plan.planted} points are hidden from every attack of the list, after {made.epoch} epochs")
    if not hidden:
        print("not written   train longer, or with another seed")
        return UNKNOWN
    save(made, arguments.file)
    print(plain(f"written       {arguments.file}"))
    return YES


def _run(arguments: argparse.Namespace) -> int:
    from soundly.auditing.judging import OWN, judge, table
    from soundly.auditing.suite import read_answers
    from soundly.verification.bench import read_instances

    answers = read_answers(arguments.folder, answers=arguments.answers)
    instances = read_instances(arguments.folder, timeout=arguments.timeout, only=arguments.only)
    done: list[Judgement] = []

    def progress(made: "Judgement") -> None:
        word = "WRONG" if made.wrong else made.claimed
        status(f"{len(done) + 1} of {len(instances)}  {word}  {plain(made.instance)}")

    shown = sys.stderr.isatty()
    memory = None if arguments.memory is None else int(arguments.memory * 2**30)
    for made in judge(arguments.tool or OWN, instances, answers, memory=memory, progress=progress if shown else None):
        done.append(made)
    if shown:
        status("")
    if arguments.json:
        print(json.dumps(finite([{**asdict(j), "wrong": j.wrong, "missed": j.missed} for j in done]), indent=2))
    else:
        for line in table(done):
            print(plain(line))
    return NO if any(j.wrong for j in done) else YES


def _fuzz(arguments: argparse.Namespace) -> int:
    from soundly.auditing.fuzzing import Tally, fuzz

    count = arguments.count or (None if arguments.minutes else 1000)
    seeds = itertools.count(arguments.seed) if count is None else range(arguments.seed, arguments.seed + count)
    tally, found = Tally(), 0
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)

    def progress(tally: "Tally") -> None:
        status(f"{tally.recipes} networks, {found} findings")

    shown = sys.stderr.isatty()
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    for finding in fuzz(iter(seeds), seconds=seconds, tally=tally, progress=progress if shown else None):
        found += 1
        print(plain(f"FOUND    seed {finding.seed}, {finding.oracle}: {finding.text}"), flush=True)
        calls = ", ".join(call.op for call in finding.recipe.calls)
        print(plain(f"         made small: {calls}"), flush=True)
        if arguments.keep:
            finding.recipe.save(arguments.keep / f"{finding.seed}-{finding.oracle}.json")
    if shown:
        status("")
    checks = ", ".join(f"{name} {n}" for name, n in tally.checks.items())
    print(f"{tally.recipes} networks, {found} findings; checks: {checks}; {sum(tally.refusals.values())} refused")
    return NO if found else YES


def _mutate(arguments: argparse.Namespace) -> int:
    from soundly.auditing.faults import FAULTS
    from soundly.auditing.mutation import line, mutate, score

    chosen = [f for f in FAULTS if arguments.only in f"{f.part} {f.name}"]
    done: list[Mutant] = []

    shown = sys.stderr.isatty()
    made = mutate(chosen, seconds=arguments.seconds)
    for fault in chosen:
        if shown:
            status(f"{len(done) + 1} of {len(chosen)}  {fault.name}")
        done.append(next(made))
        if shown:
            status("")
        print(line(done[-1]), flush=True)
    print(score(done))
    return NO if not all(m.found for m in done) else YES if done else UNKNOWN


def _isolation(arguments: argparse.Namespace) -> int:
    from soundly.auditing.isolation import Dependent, Independent, isolated
    from soundly.graph.load import load

    network = load(arguments.model)
    if arguments.batch or all(node.shape[:1] == (1,) for node in network.inputs):
        batch = arguments.batch or 4
        network = load(arguments.model, shapes={node.op.name: (batch, *node.shape[1:]) for node in network.inputs})  # type: ignore[attr-defined]
    verdict = isolated(network, model=arguments.model)
    word = {"Independent": "proved", "Dependent": "refuted", "Undecided": "unknown"}[type(verdict).__name__]
    if arguments.json:
        facts = {**vars(verdict), "verdict": word}
        facts |= {side: [v.tolist() for v in facts[side]] for side in ("first", "second") if side in facts}
        print(json.dumps(finite(facts), indent=2, sort_keys=True))
    else:
        print(plain(f"{word:<13} {verdict.claim}"))
        if isinstance(verdict, Independent):
            print(f"  operations  {verdict.operations}, of {network.inputs[0].shape[0]} items")
        elif isinstance(verdict, Dependent):
            place = f"output {verdict.output}, entry {list(verdict.entry)}"
            print(
                plain(f"  leak        {verdict.leak} changes {place}: {verdict.values[0]:.6g}, {verdict.values[1]:.6g}")
            )
            print(f"  replayed by {verdict.replayed}")
        else:
            print(
                plain(f"  leaks       {', '.join(verdict.leaks)} may reach other outputs; no pair of batches shows it")
            )
        if not isinstance(verdict, Independent):
            print(plain(f"  where       {', '.join(verdict.where)}"))
    return {"proved": YES, "refuted": NO, "unknown": UNKNOWN}[word]
