"""Minimal patterns: which of a pattern's neurons a claim needs, found by the search that finds sufficient reasons.

A literal that is dropped enlarges the region of the pattern. The smallest pattern under which a claim is still proved
says which neurons decide it, and covers more inputs than the one that was mined.

Reference: Geng et al., "Learning Minimal Neural Specifications", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soundly.auditing.patterns import Pattern, follow, joined, joint, under
from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import with_rows
from soundly.bounds.frame import Frame, Split, Start
from soundly.bounds.optimise import first, raised
from soundly.errors import InvalidInput
from soundly.explanation.minimal import minimal
from soundly.spec.claim import Claim
from soundly.spec.region import Union
from soundly.verification.decided import behind
from soundly.verification.problem import problem_of
from soundly.verification.root import SMALL
from soundly.verification.verdict import Empty, Verdict
from soundly.verification.verify import MARGIN, verify

ROUNDS = 10
"""Of improving the slopes and multipliers of a bound."""
NUMBERS = 2**23
"""How many numbers the intervals of a batch may take."""
STEPS = 20
"""Of the descent towards counterexamples."""


@dataclass(frozen=True, eq=False)
class MinimalPattern:
    """What of a pattern a claim needs.

    Attributes:
        pattern: what is left of it.
        verdict: on the claim under what is left, with its certificate; `Empty` if nothing follows the whole pattern.
        claim: that claim.
        minimal: whether it is proved and each neuron that is left was tried: without it `verifier` did not prove it.
        verifier: what was tried: linear bounds, or a search of so many seconds each.
        witnesses: by neuron an input that follows all the others, and violates the claim.
        follower: an input that follows the whole pattern; None where none is known.
        seconds: of wall-clock time.
    """

    pattern: Pattern
    verdict: Verdict
    claim: Claim
    minimal: bool
    verifier: str
    witnesses: Mapping[int, Tensor]
    follower: Tensor | None
    seconds: float


def minimal_pattern(
    claim: Claim,
    pattern: Pattern,
    *,
    search: float = 0.0,
    samples: Tensor | None = None,
    timeout: float | None = None,
) -> MinimalPattern:
    """Drops neurons from a pattern as long as the claim stays proved under what is left.

    Args:
        claim: about the pattern's network, over a Box or a Ball.
        search: seconds of `verify` for each neuron that bounds cannot drop; with 0 only bounds are asked.
        samples: [k, *input], where to look for an input that follows.
        timeout: seconds after which the search stops; what is left then is still proved.
    """
    if isinstance(claim.region, Union):
        raise InvalidInput("claim: its region must be a Box or a Ball; ask about the boxes of a Union one by one.")
    if not search >= 0 or (timeout is not None and not timeout > 0):
        raise InvalidInput(f"search is {search}, timeout {timeout}; give seconds.")
    follower = follow(claim, pattern, samples=samples, timeout=timeout)
    whole = under(claim, pattern)
    if isinstance(follower, Empty):
        return MinimalPattern(pattern, follower, whole, False, "verify", {}, None, follower.effort.seconds)
    oracle = Literals(claim, pattern)
    with torch.no_grad():
        found = minimal(oracle, torch.zeros(oracle.features, dtype=torch.bool), search=search, timeout=timeout)
    witnesses = {int(oracle.neurons[i]): x.reshape(claim.region.shape) for i, x in found.witnesses.items()}
    return MinimalPattern(
        oracle.left(found.free), found.verdict, found.claim, found.minimal, found.verifier, witnesses, follower,
        found.seconds,
    )  # fmt: skip


class Literals:
    """The oracle of `soundly.explanation.minimal` whose members are the neurons that a pattern fixes.

    Attributes:
        neurons: [members], their positions in the pattern.
    """

    def __init__(self, claim: Claim, pattern: Pattern) -> None:
        self.asked, self.pattern = claim, pattern
        self.neurons = pattern.sign.nonzero()[:, 0]
        network, required = joint(claim, pattern)
        position, sign = torch.tensor(required, dtype=torch.int64).reshape(-1, 2).unbind(1)
        plain = joined(claim.property, [], sum(math.prod(node.shape) for node in network.outputs))
        self.network, self.whole = network, Claim(network, claim.region, plain)
        self.problem = problem = problem_of(self.whole)
        program = with_rows(problem.program, problem.rows.y, problem.rows.x if problem.rows.reads_inputs else None,
                            problem.rows.constant - problem.slack)  # fmt: skip
        self.step, self.entry, known = behind(problem.program, position)
        self.known, self.sign, self.position = known != 0, sign * known.sign(), position
        bounder, self.margin = Bounder(program.to(torch.float32), ball=problem.ball), MARGIN
        if bounder.cost <= SMALL:
            bounder, self.margin = Bounder(program, ball=problem.ball), 1e-9
        self.bounder = bounder
        box = problem.narrowed(problem.lower, problem.upper)
        self.root = bounder.refresh(*(end.to(bounder.dtype) for end in box))
        self.batch = max(1, NUMBERS // (len(problem.rows) * sum(step.size for step in bounder.steps)))

    @property
    def features(self) -> int:
        return len(self.neurons)

    def left(self, free: Tensor) -> Pattern:
        """The pattern without some members."""
        kept = torch.zeros(len(self.pattern.sign), dtype=torch.bool)
        kept[self.neurons[~free]] = True
        return self.pattern.keeping(kept)

    def claim(self, free: Tensor) -> Claim:
        return under(self.asked, self.left(free))

    def decide(self, claim: Claim, timeout: float | None, attack: bool) -> Verdict:
        return verify(claim, timeout=timeout, attack=attack)

    def refer(self, free: Tensor) -> None:
        """Nothing: the bounds of every set are found for itself."""

    @cached_property
    def _beyond(self) -> Tensor:
        """How far each member's value may have the wrong sign, of its interval."""
        beyond = torch.full((self.features,), math.inf, dtype=self.bounder.dtype)
        for i in self.step[self.known].unique().tolist():
            mine = self.known & (self.step == i)
            low, high = (v[i][0, self.entry[mine]] for v in (self.root.lower, self.root.upper))
            wrong = torch.where(self.sign[mine] > 0, -low, high).clamp(min=0)
            beyond[mine] = wrong / (high - low).clamp(min=1e-30)
        return beyond

    def costs(self, free: Tensor) -> Tensor:
        return self._beyond

    def bounds(self, free: Tensor) -> Tensor:
        return torch.cat([self._bounds(part) for part in free.split(self.batch)])

    def _bounds(self, free: Tensor) -> Tensor:
        """Of some sets: intervals under what is kept, then the rows with multipliers of these signs."""
        k, rows, dtype = len(free), self.problem.rows, self.bounder.dtype
        lower, upper = [v.repeat(k, 1) for v in self.root.lower], [v.repeat(k, 1) for v in self.root.upper]
        splits = {}
        for i in self.step[self.known].unique().tolist():
            mine = self.known & (self.step == i)
            sign = torch.zeros_like(lower[i])
            sign[:, self.entry[mine]] = torch.where(free[:, mine], 0, self.sign[mine]).to(dtype)
            lower[i] = torch.where(sign > 0, lower[i].clamp(min=0), lower[i])
            upper[i] = torch.where(sign < 0, upper[i].clamp(max=0), upper[i])
            zero = torch.zeros_like(sign)
            splits[i] = sign, zero
        empty = torch.stack([(low > high).any(1) for low, high in zip(lower, upper, strict=True)]).any(0)
        upper = [torch.maximum(*ends) for ends in zip(lower, upper, strict=True)]
        frame = self.bounder.refresh(lower[0], upper[0], inherited=Frame(lower, upper, empty))
        empty = empty | frame.infeasible
        each = torch.arange(k).repeat_interleave(len(rows))
        frame = frame.pick(each)
        held = {i: Split(sign[each], zero[each], zero[each]) for i, (sign, zero) in splits.items()}
        a = rows.y.to(dtype).repeat(k, 1)
        start = {len(self.problem.program.steps) - 1: a}
        if rows.reads_inputs:
            start[0] = rows.x.to(dtype).repeat(k, 1)
        begin = Start(start, (rows.constant - self.problem.slack).to(dtype).repeat(k))
        goal = torch.full_like(begin.d, self.margin)
        slopes = {side: v.expand(len(each), -1) for side, v in first(self.bounder, frame).items()}
        found = raised(self.bounder, frame, begin, slopes, rounds=ROUNDS, goal=goal, splits=held)
        best = rows.worst(found.bound.reshape(k, -1)).amin(1)
        return torch.where(empty, math.inf, best)

    def violated(self, x: Tensor) -> Tensor:
        """Evaluated as witnesses are: in the network's type, and in float64."""
        x, sign = x.reshape(self.asked.region.shape).double(), self.pattern.sign[self.neurons]
        found = torch.zeros(self.features, dtype=torch.bool)
        for dtype in {self.network.dtype, torch.float64}:
            found |= self.whole.outputs(x.to(dtype))[self.position] * sign < 0
        return found

    def near(self, free: Tensor) -> Tensor:
        """Points where claim and kept signs are as near to failing and holding as a signed descent gets."""
        rows, sign = self.problem.rows, self.pattern.sign[self.neurons].double()
        low, high = self.problem.lower, self.problem.upper
        x = ((low + high) / 2).repeat(len(free), 1)
        best, value = x, x.new_full((len(x),), math.inf)
        for k in range(STEPS + 1):
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                y = self._outputs(point)
                measure = rows.worst(rows.at(y, point)).amin(1)
                wrong = torch.where(free, -math.inf, -sign * y[:, self.position])
                measure = torch.maximum(measure, wrong.amax(1)) if self.features else measure
                (slope,) = torch.autograd.grad(measure.sum(), point)
            better = measure.detach() < value
            best, value = torch.where(better[:, None], x, best), torch.where(better, measure.detach(), value)
            x = torch.minimum(torch.maximum(x - (high - low) * (0.5 / (1 + k)) * slope.sign(), low), high)
        return best

    def _outputs(self, x: Tensor) -> Tensor:
        return self.problem.program.evaluate(x)[-1]
