"""One strategy for every claim: look for a counterexample, bound the whole region, then split it.

Attack and proof take turns, each turn longer than the last, so that easy claims cost little either way. Nothing is
proved before the checker has replayed its certificate, and nothing refuted before the witness has been replayed through
the original model.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import with_rows
from soundly.bounds.frame import Frame, OutOfTime
from soundly.bounds.optimise import refine
from soundly.bounds.program import Program
from soundly.certificate.verification import replay as replay_proof
from soundly.errors import InvalidInput, MissingRule
from soundly.spec.claim import Claim
from soundly.verification.attack import Attack
from soundly.verification.decided import decided
from soundly.verification.dormant import Waking
from soundly.verification.float32 import with_float32
from soundly.verification.input_split import InputSplit
from soundly.verification.journal import Journal
from soundly.verification.lemmas import narrowed
from soundly.verification.necks import NeckSplit, neck_of
from soundly.verification.neuron_split import NeuronSplit, piecewise
from soundly.verification.problem import Arithmetic, Problem, problem_of
from soundly.verification.proof import Lemma, certificate, identity
from soundly.verification.replay import Replay, replay
from soundly.verification.root import REFINING, SMALL, TOGETHER, WORK
from soundly.verification.rows import Rows
from soundly.verification.verdict import Effort, Empty, Progress, Proved, Refuted, Unknown, Verdict

Search: TypeAlias = InputSplit | NeuronSplit

FEW, SOME = 6, 64
"""With at most FEW varying inputs only inputs are split, with more than SOME only neurons; between, both in turn. Where
rows decide neurons, both in turn with few, and only neurons otherwise."""
PATIENCE = 2e-7
"""Seconds of the first attack per product of the network, between 0.05 and 2."""
SHARE = 0.3
"""How much of the time may go into attacks."""
MARGIN = 1e-5
"""By how much searches in float32 want rows above their slack."""
BOXES, PARTS = 2048, 512
"""The most boxes, or subproblems of split neurons, that are bounded at once."""
ALL = 2**14
"""Grids of at most so many points are evaluated instead of searched."""


def verify(
    claim: Claim,
    *,
    model: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    memory: int | None = None,
    attack: bool = True,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    arithmetic: Arithmetic = "real",
) -> Verdict:
    """Decides whether a claim holds for every input of its region.

    Args:
        claim: about a network, or its gradient.
        model: the ONNX file that the network was loaded from: witnesses are replayed through it by onnxruntime. Without
            one the network itself confirms them.
        timeout: seconds; without one the search ends when it is done.
        memory: bytes that the process may use; the search stops there.
        attack: whether to look for counterexamples with gradients; without it only points that bounds suggest are
            tried.
        journal: a file that keeps the search, written every few seconds; with the same claim the search goes on from
            there.
        progress: called now and then.
        arithmetic: what a proof covers: "real", or "float32" as well: every evaluation in float32, at its numbers in
            the region, whatever the order of sums and with or without fused products (see docs/verification.md).

    Returns:
        Proved: for all real inputs of the region the network, in that arithmetic, satisfies the claim; its certificate
        was accepted by `soundly.check`. Refuted: with a witness. Unknown: with a reason. Empty: there is no input.
        Interrupting (Ctrl-C) returns what is known.

    Raises:
        InvalidInput: an argument is of the wrong type, or the journal is that of another claim; the network is not in
            float32, or how one of its operations is rounded is not known, where float32 is asked for.
    """
    if not isinstance(claim, Claim):
        raise InvalidInput(f"claim is a {type(claim).__name__}; give a Claim, as soundly.robust or read_vnnlib return.")
    if timeout is not None and not timeout > 0:
        raise InvalidInput(f"timeout is {timeout}; give seconds above 0, or None.")
    if arithmetic not in ("real", "float32"):
        raise InvalidInput(f'arithmetic is {arithmetic!r}; give "real" or "float32".')
    run = _Run(claim, model, timeout, memory, attack, journal, progress, arithmetic)
    with torch.no_grad():
        return run.verdict()


def verify_part(claim: Claim, whole: Problem, *, timeout: float | None = None, attack: bool = True) -> Verdict:
    """`verify` for claims that differ in their box alone.

    Args:
        claim: its region is a Box.
        whole: the problem of the same claim over a box that contains this one.
    """
    run = _Run(claim, None, timeout, None, attack, None, None, whole=whole)
    with torch.no_grad():
        return run.verdict()


class _Found(Exception):
    """A counterexample was confirmed."""

    def __init__(self, witness: Replay, settled: str) -> None:
        self.witness, self.settled = witness, settled


class _Stop(Exception):
    """A limit was met."""


@dataclass(eq=False)
class _Run:
    claim: Claim
    model: str | os.PathLike[str] | None
    timeout: float | None
    memory: int | None
    attacking: bool
    journal_path: str | os.PathLike[str] | None
    progress: Callable[[Progress], None] | None
    arithmetic: Arithmetic = "real"
    whole: Problem | None = None

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.deadline = math.inf if self.timeout is None else self.begun + self.timeout
        self.attacked = self.told = 0.0
        self.subproblems = 0
        self.bound, self.open = -math.inf, 1.0
        self.attacks: dict[int, Attack] = {}
        self.waking: dict[int, Waking] = {}
        self.tried: set[bytes] = set()
        self.problem: Problem | None = None
        self.journal = Journal(None, {})

    # ---------------------------------------------------------------- the outcome

    def verdict(self) -> Verdict:
        if self.claim.is_empty or not self.claim.property.clauses:
            return Empty(self._effort("empty region" if self.claim.is_empty else "no property"))
        try:
            try:
                problem = self.problem = self._problem()
            except MissingRule as error:
                self._attack_network()
                raise _Stop(f"no bounds for this network: {error}") from error
            if self.journal_path is not None:
                self.journal = Journal(self.journal_path, identity(problem))
            return self._decide(problem)
        except _Found as found:
            w = found.witness
            return Refuted(
                w.x.reshape(self.claim.region.shape), w.outputs, w.violation, w.by, self._effort(found.settled)
            )
        except (_Stop, OutOfTime, MemoryError) as stop:
            reason = str(stop) or "the time limit was reached; allow more with timeout"
            if isinstance(stop, MemoryError):
                reason = "out of memory"
        except KeyboardInterrupt:
            reason = "interrupted"
        self.journal.write(now=True)
        return Unknown(min(self.bound, 0.0), self.open, reason, self._effort("unknown"))

    def _problem(self) -> Problem:
        if self.whole is not None:
            return self._part(self.whole)
        problem = problem_of(self.claim, self.arithmetic)
        if self.arithmetic == "real":
            return problem
        try:
            problem = with_float32(problem, self.deadline)
        except TimeoutError as late:
            raise OutOfTime from late
        if not bool(torch.isfinite(problem.slack).all()):
            raise _Stop("what float32 rounds has no bound on this region: a value may overflow, or be undefined")
        return problem

    def _part(self, whole: Problem) -> Problem:
        """The whole's program, which holds on every box within."""
        box = self.claim.region.box
        lower, upper = (end.reshape(1, -1) for end in (box.lower, box.upper))
        if not bool((lower >= whole.lower).all() & (upper <= whole.upper).all()):
            raise InvalidInput("whole: the claim's box is not inside this problem's box.")
        return replace(whole, lower=lower, upper=upper)

    def _effort(self, settled: str) -> Effort:
        return Effort(time.monotonic() - self.begun, self.subproblems, settled)

    def _limits(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if self.memory is not None and _resident() > self.memory:
            raise _Stop("the memory limit was reached; allow more with memory")

    def _tell(self) -> None:
        self.journal.write()
        if self.progress is not None:
            self.progress(Progress(time.monotonic() - self.begun, self.subproblems, self.open, self.bound))

    # ---------------------------------------------------------------- counterexamples

    def _attack(self, case: int) -> Attack:
        if case not in self.attacks:
            problem = self.problem
            assert problem is not None
            first, last = problem.row_spans[case].tolist()
            clause = problem.rows.clause[first:last] - problem.spans[case, 0]
            rows = Rows(
                problem.rows.y[first:last], problem.rows.x[first:last], problem.rows.constant[first:last], clause
            )
            region = self.claim.region
            project = lowest = None
            if problem.grid is not None or problem.ball is not None:

                def project(x: Tensor) -> Tensor:
                    return region.project(x.double().reshape(-1, *region.shape)).reshape(len(x), -1)

                def lowest(a: Tensor) -> Tensor:
                    if problem.grid is not None:
                        return problem.grid.lowest(a)
                    assert problem.ball is not None
                    return problem.ball.lowest(a, problem.lower, problem.upper)

            self.attacks[case] = Attack(
                problem.program.to(torch.float32), rows, problem.lower[case], problem.upper[case], 0, project, lowest
            )
        return self.attacks[case]

    def _confirm(self, attack: Attack, settled: str) -> None:
        """Raises `_Found` if the attack's best point is a counterexample of the original model."""
        value, point = attack.best
        if value > 1e-6 * (1 + abs(value)) or point.numpy().tobytes() in self.tried:
            return
        self.tried.add(point.numpy().tobytes())
        witness = replay(self.claim, point, model=self.model)
        if witness is not None:
            raise _Found(witness, settled)

    def _try(self, case: int, seconds: float) -> None:
        """Attacks one case for some time; half of it is for dormant functions, once bounds say which could be awake."""
        if not self.attacking:
            return
        start = time.monotonic()
        attack = self._attack(case)
        end = min(start + seconds, self.deadline)
        grid = self.problem.grid if self.problem else None
        if grid is not None and grid.size <= ALL:
            if not self.attacked:  # nothing is left to be sought afterwards
                for points in grid.points():
                    attack.values(points.reshape(len(points), -1))
        else:
            with torch.enable_grad():
                if case in self.waking:
                    self.waking[case].run(min(start + seconds / 2, self.deadline))
                attack.search(end)
        self.attacked += time.monotonic() - start
        self._confirm(attack, "attack")

    def _offer(self, case: int, points: Tensor) -> None:
        """Evaluates points that a search found."""
        attack = self._attack(case)
        attack.values(points.double())
        self._confirm(attack, "the bounds' worst points")

    def _attack_network(self) -> None:
        """Where no program exists: random points, through the network itself."""
        for x in self.claim.region.samples(100):
            self._limits()
            if bool(torch.isfinite(self.claim.outputs(x)).all()) and not self.claim.holds_at(x):
                witness = replay(self.claim, x.reshape(-1), model=self.model)
                if witness is not None:
                    raise _Found(witness, "sampling")

    # ---------------------------------------------------------------- the strategy

    def _bounder(self, program: Program, *, together: bool = False) -> Bounder:
        assert self.problem is not None
        return Bounder(program, together=together, deadline=self.deadline, ball=self.problem.ball)

    def _decide(self, problem: Problem) -> Verdict:
        cases = len(problem.lower)
        vary = int((problem.upper > problem.lower).sum(1).max())
        if problem.grid is not None:
            vary = problem.grid.freedom
        # Points cannot be split: what decides them is the last digits.
        points = vary == 0 or problem.grid is not None
        program, margin = (problem.program, 0.0) if points else (problem.program.to(torch.float32), MARGIN)
        wide = self._bounder(program, together=True)
        for case in range(min(cases, 4)):
            self._try(case, min(max(0.05, wide.cost * PATIENCE), 2.0))
        settled: list[tuple[Search, list[int]]] = []

        def signs(case: int) -> bool:
            """Whether rows of the case settle signs, which only splits of neurons make use of."""
            return problem.grid is None and decided(problem, case) is not None

        few = vary <= FEW
        splittable = vary <= SOME or problem.grid is not None
        inputs = InputSplit(problem, wide, margin=margin) if splittable or cases > 1 else None
        if inputs is not None:
            self.journal.follow("inputs", inputs)
            whole = few and (cases > 1 or not signs(0))
            if whole or cases > 1:
                self._work_inputs(inputs, rounds=None if whole else 1)
            waiting = {case for parts in inputs.stack for case in parts.case.tolist()}
            settled.append((inputs, [t for t, case in enumerate(inputs.forest.case) if case not in waiting]))
            left = sorted(waiting)
        else:
            left = [0]
        for case in left:
            own = inputs
            if cases > 1:
                own = InputSplit(problem, wide, torch.tensor([case]), margin=margin)
                self.journal.follow(f"inputs {case}", own)
            by_inputs = splittable and not (own and own.stuck) and (few or not signs(case))
            search = self._case(problem, case, own if by_inputs else None)
            settled.append((search, list(range(len(search.forest.root)))))
        return self._prove(problem, settled)

    def _work_inputs(self, search: InputSplit, *, rounds: int | None = None, until: float = math.inf) -> None:
        """Steps until nothing waits, or for some rounds or until some time."""
        batch = 512 if rounds == 1 else 8
        count = 0
        while len(search):
            if (rounds is not None and count >= rounds) or time.monotonic() > until:
                return
            self._limits()
            if search.stuck:  # a box is too small to be split
                if search.problem.grid is not None:
                    raise _Stop("at a point of the grid the claim neither holds nor fails by a margin")
                return
            start = time.monotonic()
            before = search.subproblems
            case = int(search.stack[-1].case[0])
            points = search.step(len(search) if rounds == 1 else batch)
            self.subproblems += search.subproblems - before
            spent = time.monotonic() - start
            batch = int(max(1, min(BOXES, 2 * batch, batch * 0.5 / max(spent, 1e-3))))
            if len(points):
                self._offer(case, points)
            if search.margin > 0 and search.stack and bool((search.stack[-1].bound > -search.margin).any()):
                search.bounder = self._bounder(search.problem.program, together=True)
                search.margin = 0.0
            if time.monotonic() - self.told > 0.5:
                self.told = time.monotonic()
                self.bound, self.open = search.bound, search.open_share
                self._tell()
            self._interleave(case if len(search) else None, search)
            count += 1

    def _interleave(self, case: int | None, search: Search) -> None:
        """Attacks again once its share of the time has become small."""
        if case is not None and self.attacking:
            passed = time.monotonic() - self.begun
            if self.attacked < SHARE / 2 * passed:
                if case not in self.waking:
                    root = search.root if isinstance(search, NeuronSplit) else search.whole(case)
                    self.waking[case] = Waking(
                        self._attack(case), *([v[0] for v in e] for e in (root.lower, root.upper))
                    )
                self._try(case, SHARE * passed)

    def _case(self, problem: Problem, case: int, inputs: InputSplit | None) -> Search:
        """Settles one case by splitting neurons, or inputs, whichever is done first, with lemmas about a neck."""
        neurons: NeuronSplit | None = None
        neck: NeckSplit | None = None
        used: list[int] = []
        turn = 1.0
        while True:
            end = time.monotonic() + turn
            if neurons is None:
                neurons = self._rooted(problem, case)
                self.journal.follow(f"neurons {case} {used}", neurons)
                ends = neck_of(neurons.bounder, neurons.root) if neurons.decided is None else None
                if len(neurons.waiting) and ends is not None:
                    neck = NeckSplit(neurons, ends)
                    self.journal.follow(f"neck {case}", neck)
            if neck is not None and len(neck.done) > len(used):
                self.journal.forget(f"neurons {case} {used}")
                used = neck.done
                neurons = self._rooted(problem, case, neck.frame(used), neck.lemmas_of(used))
                self.journal.follow(f"neurons {case} {used}", neurons)
            seeking = neck is not None and len(neck.waiting) > 0
            self._work_neurons(neurons, end if inputs is not None or seeking else math.inf)
            if not len(neurons.waiting) and not neurons.stuck:
                return neurons
            over = not len(neurons.waiting)
            if inputs is not None and not inputs.stuck:
                self._work_inputs(inputs, until=math.inf if over else time.monotonic() + turn)
                if not len(inputs):
                    return inputs
            elif over:
                self.bound = neurons.bound
                raise _Stop("nothing is left to split: the claim neither holds nor fails by a margin")
            if neck is not None and seeking:
                if neck.fresh:
                    neck.begin(50)
                self._work_neurons(neck, time.monotonic() + 2 * turn, told=neurons)
            turn *= 2

    def _rooted(
        self, problem: Problem, case: int, before: Frame | None = None, lemmas: Sequence[Lemma] = ()
    ) -> NeuronSplit:
        """The search by neurons, begun with what lemmas said before."""
        first, last = problem.row_spans[case].tolist()
        every = problem.rows
        program = with_rows(
            problem.program, every.y[first:last], every.x[first:last] if every.reads_inputs else None,
            every.constant[first:last],
        )  # fmt: skip
        narrow, margin = self._bounder(program.to(torch.float32)), MARGIN
        if narrow.cost <= SMALL:
            narrow, margin = self._bounder(program), 1e-9
        box = problem.narrowed(problem.lower[case : case + 1], problem.upper[case : case + 1])
        lower, upper = (v.to(narrow.dtype) for v in box)
        root = whole = narrow.refresh(lower, upper, inherited=before)
        sure = decided(problem, case)
        if sure is not None:
            sure = replace(sure, whole=whole)
            root = sure.held(narrow)
        clauses = list(range(int(problem.spans[case, 1] - problem.spans[case, 0])))
        search = NeuronSplit(problem, narrow, case, root, clauses, margin=margin, lemmas=lemmas, decided=sure)
        search.begin(20)
        self.subproblems += search.subproblems
        self.bound = search.bound
        if len(search.waiting):
            known = narrowed(problem, narrow, program, whole, case)
            self.subproblems += known.subproblems
            if known.lemmas:
                lemmas = [*lemmas, *known.lemmas]
                root = known.frame
                if sure is not None:
                    sure = replace(sure, whole=root)
                    root = sure.held(narrow)
                search = NeuronSplit(problem, narrow, case, root, clauses, margin=margin, lemmas=lemmas, decided=sure)
                search.begin(20)
                self.subproblems += search.subproblems
                self.bound = search.bound
        rows = sum(int(narrow.loose(i, root).sum()) for i in range(len(narrow.steps)) if narrow.read[i])
        # Slopes of products and smooth functions are many: their choice is shared.
        together = not all(piecewise(narrow.steps[j]) for j, _ in narrow.free(root))
        rounds = TOGETHER if together else REFINING
        if len(search.waiting) and 8 * rounds * rows * narrow.cost < WORK:
            refined = refine(narrow, root, rounds=rounds, together=together)
            search = NeuronSplit(
                problem, narrow, case, root, clauses, margin=margin, refined=refined, lemmas=lemmas, decided=sure
            )
            search.begin(50)
            self.subproblems += search.subproblems
            self.bound = search.bound
        return search

    def _work_neurons(self, search: NeuronSplit, until: float, *, told: NeuronSplit | None = None) -> None:
        """Steps until nothing waits, or until some time; what is told is the bound of a search for the claim."""
        batch = 4
        while len(search.waiting):
            if time.monotonic() > until:
                return
            self._limits()
            start = time.monotonic()
            before = search.subproblems
            if search.due:
                search.squeeze(20)
                batch = 4
                continue
            points = search.step(batch, 10)
            self.subproblems += search.subproblems - before
            spent = time.monotonic() - start
            batch = int(max(1, min(PARTS, 2 * batch, batch * 0.7 / max(spent, 1e-3))))
            self.bound = (told or search).bound
            if len(points):
                self._offer(search.case, points)
            self._interleave(search.case if len(search.waiting) else None, told or search)
            self._tell()

    # ---------------------------------------------------------------- the proof

    def _prove(self, problem: Problem, settled: list[tuple[Search, list[int]]]) -> Verdict:
        """Replays the certificate, and splits again what it does not prove."""
        model = {}
        if self.model is not None:
            with open(self.model, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            model = {"file": os.path.basename(os.fspath(self.model)), "sha256": digest}
        owners = [(search, tree) for search, trees in settled for tree in trees]
        while True:
            proof = certificate(
                problem, [search.grown(trees) for search, trees in settled], claim=self.claim.name, model=model
            )
            self._limits()
            try:
                result = replay_proof(proof, deadline=self.deadline)
            except TimeoutError as late:
                raise OutOfTime from late
            if result.problems:
                raise _Stop(f"the certificate was not accepted: {result.problems[0]}")
            if not result.failed:
                if not (len(result.proven) and bool(result.proven.all())):
                    raise _Stop("the certificate was not accepted: it does not cover the claim")
                break
            for search in dict.fromkeys(search for search, _ in owners):
                mine = dict[int, tuple[Any, Any, Any]]()
                for t in {t for t, _ in result.failed if owners[t][0] is search}:
                    order = search.forest.order(owners[t][1])
                    mine |= {int(order[i]): left for (tree, i), left in result.remaining.items() if tree == t}
                if mine:
                    if not search.reopen(mine):
                        raise _Stop("the certificate was not accepted: a leaf is open that the search takes for proved")
                    if isinstance(search, InputSplit):
                        search.bounder = self._bounder(problem.program, together=True)
                        search.margin = 0.0
                        self._work_inputs(search)
                        refused = search.stuck
                    else:
                        self._work_neurons(search, math.inf)
                        refused = bool(search.stuck)
                    if refused:
                        self.bound = 0.0  # as the search sees it
                        raise _Stop("the claim holds too narrowly to be proved: rounding could change the answer")
        how = "input splitting" if isinstance(settled[-1][0], InputSplit) else "neuron splitting"
        if all(len(search.forest.order(tree)) == 1 for search, tree in owners):
            how = "root bound"
        return Proved(proof, self._effort(how))


def _resident() -> int:
    """Bytes of memory that this process uses; where /proc does not tell, the most it ever used."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
