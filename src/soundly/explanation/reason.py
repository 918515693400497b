"""Sufficient reasons: which features of an input decide a prediction, with proof.

A set of features is a sufficient reason if keeping it keeps the prediction, whatever the others do within their box.
Freeing more can only break it: a proof for one set of free features proves every smaller one, a counterexample refutes
every larger one. A search frees as much as its bounds allow; what it returns has been proved by `verify`.

Reference: Wu et al., "VeriX", NeurIPS 2023; Bassan & Katz, "Towards Formal XAI", TACAS 2023.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Start
from soundly.bounds.shared import Shared
from soundly.errors import InvalidInput
from soundly.explanation.question import Question, question
from soundly.graph.network import Network
from soundly.spec.claim import Claim
from soundly.spec.region import Box
from soundly.verification.problem import problem_of
from soundly.verification.replay import replay
from soundly.verification.root import SMALL
from soundly.verification.verdict import Proved, Refuted, Verdict
from soundly.verification.verify import MARGIN, verify, verify_part

PREFIXES = 48
"""How many sets of growing size are bounded at once."""
WORTH = 0.05
"""Blocks are freed as long as one of them holds this share of what is left."""
NUMBERS = 2**24
"""How many numbers the values of all candidates of a batch may take."""
PATIENCE = 30.0
"""Seconds for the proof of a set that bounds say is sufficient."""
STEPS = 12
"""Of the descent towards counterexamples."""


def certify_mask(
    asked: Network | Claim,
    x: Tensor,
    mask: Any,
    *,
    eps: float | Tensor | None = None,
    box: Box | None = None,
    target: int | None = None,
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
    groups: Any = None,
    timeout: float | None = None,
    attack: bool = True,
) -> Verdict:
    """Decides whether a mask is a sufficient reason: the features it keeps decide, whatever the others do.

    Args:
        asked: a network, whose prediction at x must stay; or a claim, over the box in which everything may move.
        x: the input, of the network's input shape.
        mask: from anywhere; True keeps a feature. One entry per feature, or a shape that can be broadcast to x: a
            Grad-CAM's [H, W] for [1, C, H, W], tokens [T, 1] for [1, T, D]. Of scores `top_mask` makes one.
        eps: how far each entry may move, within `clip`; or
        box: where entries may move to.
        target: the output that must stay the largest; the largest at x if None.
        groups: the feature of each entry, 0 to n - 1, of a shape that can be broadcast to x: superpixels, pixels of
            several channels, tokens. Every entry is one if None.
        timeout, attack: as in `verify`.

    Returns:
        Proved: no input that agrees with x on the mask, and lies in the box, violates the claim; with a certificate.
        Refuted: with one that does. Unknown otherwise.
    """
    about = question(asked, x, eps=eps, box=box, target=target, clip=clip, groups=groups)
    return verify(about.freed(about.kept(mask)), timeout=timeout, attack=attack)


@dataclass(frozen=True, eq=False)
class Reason:
    """A set of features, and how far it is known to be sufficient and minimal.

    Attributes:
        verdict: whether the set is sufficient; `Proved` carries the certificate, of `claim`.
        claim: that the features which are not kept may move as they like.
        mask: bool, of the input's shape: the entries that are kept.
        kept: bool [features].
        minimal: whether each kept feature was tried: without it `verifier` did not prove the rest, or, in a search, no
            more than the rest.
        verifier: what was tried: linear bounds, or a search of so many seconds each.
        witnesses: by kept feature a counterexample that moves only it and what is free. Features with one are needed
            whatever the verifier. If all have one, no smaller part of this set is sufficient.
        tried: how many sets were bounded.
        seconds: of wall-clock time, the final proof included.
    """

    verdict: Verdict
    claim: Claim
    mask: Tensor
    kept: Tensor
    minimal: bool
    verifier: str
    witnesses: Mapping[int, Tensor]
    tried: int
    seconds: float

    @property
    def size(self) -> int:
        """How many features are kept."""
        return int(self.kept.sum())

    @property
    def necessary(self) -> Tensor:
        """bool [features]: kept, and with a counterexample to leaving it out."""
        found = torch.zeros_like(self.kept)
        found[list(self.witnesses)] = True
        return found


def explain(
    asked: Network | Claim,
    x: Tensor,
    *,
    eps: float | Tensor | None = None,
    box: Box | None = None,
    target: int | None = None,
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
    groups: Any = None,
    keep: Any = None,
    search: float = 0.0,
    timeout: float | None = None,
) -> Reason:
    """A minimal sufficient reason, with proof.

    Linear bounds of many candidates at once free blocks of features, then single ones, until none can be freed any
    more; with `search` a complete verifier goes on from there.

    Args:
        asked, x, eps, box, target, clip, groups: as in `certify_mask`.
        keep: a mask of features that stay kept. So a mask that fails is repaired: the reason is that mask, and a
            minimal set of features added to it.
        search: seconds of `verify` for each feature that linear bounds cannot free.
        timeout: seconds after which the search stops; the set found so far is still proved.

    Returns:
        A reason whose verdict is `Proved`. It is not where even all features kept are not sufficient: where the claim
        fails at x itself (`Refuted`), or is too close to tell (`Unknown`).
    """
    if not search >= 0 or (timeout is not None and not timeout > 0):
        raise InvalidInput(f"search is {search}, timeout {timeout}; give seconds.")
    about = question(asked, x, eps=eps, box=box, target=target, clip=clip, groups=groups)
    fixed = torch.zeros(about.features, dtype=torch.bool) if keep is None else about.kept(keep)
    with torch.no_grad():
        return _Search(about, fixed, search, timeout).reason()


class Screen:
    """Linear bounds of a claim over many boxes that differ in what is free.

    Attributes:
        margin: what a bound must exceed to count as a proof here; the checker has the last word.
        tried: how many boxes were bounded.
    """

    def __init__(self, about: Question) -> None:
        self.about = about
        self.problem = problem = problem_of(about.claim)
        bounder, self.margin = Bounder(problem.program.to(torch.float32)), MARGIN
        if bounder.cost <= SMALL:
            bounder, self.margin = Bounder(problem.program), 1e-9
        self.bounder, dtype = bounder, bounder.dtype
        self.x = about.x.reshape(-1).to(dtype)
        self.lower, self.upper = (torch.stack([v.reshape(-1)]).to(dtype) for v in (about.box.lower, about.box.upper))
        rows = problem.rows
        a = {len(bounder.steps) - 1: rows.y.to(dtype)}
        if rows.reads_inputs:
            a[0] = rows.x.to(dtype)
        self.start = Start(a, (rows.constant - problem.slack).to(dtype), torch.zeros(len(rows), dtype=torch.int64))
        self.whole = bounder.refresh(self.lower, self.upper)
        self.batch = max(1, NUMBERS // sum(step.size for step in bounder.steps))
        self.tried = 0
        self.refer(torch.ones(about.features, dtype=torch.bool), 0.5)

    def ends(self, free: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Boxes [k, entries] where some features [k, features] may move, by a share of how far they could."""
        moving = self.about.spread(free)
        low, high = (torch.lerp(self.x, end, share) for end in (self.lower, self.upper))
        return torch.where(moving, low, self.x), torch.where(moving, high, self.x)

    def refer(self, free: Tensor, share: float = 1.0) -> None:
        """Chooses the slopes of all bounds anew: those that are good where these features are free."""
        lower, upper = self.ends(free[None], share)
        self.shared = Shared(self.bounder, self.whole, lower[0], upper[0], self.start)

    def rows(self, free: Tensor) -> Tensor:
        """Lower bounds [k, rows] where these features [k, features] are free."""
        self.tried += len(free)
        return torch.cat([self.shared.least(*self.ends(part)) for part in free.split(self.batch)])

    def bounds(self, free: Tensor) -> Tensor:
        """[k]: by how much no counterexample exists; above `margin` none does."""
        return self.problem.rows.worst(self.rows(free)).amin(1)

    def costs(self, free: Tensor) -> Tensor:
        """[features]: which share of what the claim has to spare freeing a feature may take, to first order."""
        rows, a = self.rows(free[None])[0], self.shared.rows.a
        entries = torch.maximum(a * (self.x - self.lower), a * (self.x - self.upper))
        takes = torch.zeros(len(a), self.about.features, dtype=a.dtype).index_add_(1, self.about.member, entries)
        spare = (rows + (takes * free).sum(1)).clamp(min=1e-3)
        clause = self.problem.rows.clause
        best = torch.stack([
            (takes[clause == k] / spare[clause == k, None])[int(rows[clause == k].argmax())]
            for k in range(self.problem.rows.clauses)
        ]) if self.problem.rows.clauses < len(rows) else takes / spare[:, None]  # fmt: skip
        return best.amax(0)


@dataclass(eq=False)
class _Search:
    about: Question
    fixed: Tensor
    search: float
    timeout: float | None
    witnesses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.deadline = math.inf if self.timeout is None else self.begun + self.timeout
        self.free = torch.zeros_like(self.fixed)
        self.screen = Screen(self.about)
        self.minimal = False
        self.proof: tuple[Tensor, Verdict] | None = None

    def reason(self) -> Reason:
        self._blocks()
        self._singles()
        if self.search > 0 and self.minimal:
            self._complete()
        verdict, claim = self._proved()
        kept = ~self.free
        witnesses = {}
        for i in kept.nonzero().flatten().tolist():
            left = self.free.clone()
            left[i] = True
            found = next((x for moved, x in self.witnesses if not bool((moved & ~left).any())), None)
            if found is not None:
                witnesses[i] = found.reshape(self.about.x.shape)
        return Reason(
            verdict, claim, self.about.spread(kept).reshape(self.about.x.shape), kept,
            self.minimal and isinstance(verdict, Proved),
            f"verify, {self.search:g} s each" if self.search > 0 else "linear bounds",
            witnesses, self.screen.tried, time.monotonic() - self.begun,
        )  # fmt: skip

    @property
    def open(self) -> Tensor:
        """The features that may still be freed."""
        return (~self.free & ~self.fixed).nonzero().flatten()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    # ---------------------------------------------------------------- linear bounds

    def _blocks(self) -> None:
        """Frees as many of the cheapest features as bounds allow, and again with slopes that suit what is free."""
        tried = False
        while len(left := self.open) and not self.late:
            gained = self._prefix(left[self.screen.costs(self.free)[left].argsort()])
            if not gained and (tried or bool(self.free.any())):
                return
            tried = True
            self.screen.refer(self.free)
            if gained and gained < WORTH * len(left):
                return

    def _singles(self) -> None:
        """Frees what can be freed alone, those first that cost least, until with fresh slopes nothing can."""
        waiting, fresh = self.open, True
        while len(waiting) and not self.late:
            alone = self._with(waiting)
            bounds = self.screen.bounds(alone)
            proved = bounds > self.screen.margin
            waiting = waiting[proved][bounds[proved].argsort(descending=True)]
            if len(waiting):
                count = max(1, self._prefix(waiting))
                self.free = self.free.clone()
                self.free[waiting[:count]] = True
                waiting, fresh = waiting[count:], False
            if not len(waiting) and not fresh:
                self.screen.refer(self.free)
                waiting, fresh = self.open, True
        self.minimal = not self.late

    def _prefix(self, order: Tensor) -> int:
        """Frees the largest of some prefixes that bounds prove; how many features that are."""
        n = len(order)
        lengths = torch.linspace(n, 1, min(n, PREFIXES)).round().long()
        rank = torch.full_like(self.free, n, dtype=torch.int64)
        rank[order] = torch.arange(n)
        sets = self.free | (rank < lengths[:, None])
        proved = (self.screen.bounds(sets) > self.screen.margin).nonzero().flatten()
        if not len(proved):
            return 0
        self.free = sets[proved[0]]
        return int(lengths[proved[0]])

    def _with(self, features: Tensor) -> Tensor:
        """[k, features]: what is free, and one more."""
        sets = self.free.repeat(len(features), 1)
        sets[torch.arange(len(features)), features] = True
        return sets

    # ---------------------------------------------------------------- the complete verifier

    def _complete(self) -> None:
        """Tries each feature that is left by a search, unless a counterexample is known."""
        order = self.open
        bounds = self.screen.bounds(self._with(order))
        near = descend(self.screen, *self.screen.ends(self._with(order)))
        for i, point in zip(order.tolist(), near, strict=True):
            found = None if self._refuted(i) else replay(self._claim(i), point)
            if found is not None:
                self.witnesses.append((self.about.support(found.x), found.x))
        for i in order[bounds.argsort(descending=True)].tolist():
            if self._refuted(i):
                continue
            left = self.deadline - time.monotonic()
            if left <= 0:
                self.minimal = False
                return
            seconds = min(self.search, left)
            verdict = verify_part(self._claim(i), self.screen.problem, timeout=None if seconds == math.inf else seconds)
            if isinstance(verdict, Proved):
                self.free = self.free.clone()
                self.free[i] = True
                self.proof = self.free, verdict
            elif isinstance(verdict, Refuted):
                x = verdict.witness.reshape(-1)
                self.witnesses.append((self.about.support(x), x))

    def _claim(self, feature: int) -> Claim:
        free = self.free.clone()
        free[feature] = True
        return self.about.freed(~free)

    def _refuted(self, feature: int) -> bool:
        """Whether a known counterexample moves nothing but this feature and what is free."""
        free = self.free.clone()
        free[feature] = True
        return any(not bool((moved & ~free).any()) for moved, _ in self.witnesses)

    # ---------------------------------------------------------------- the proof

    def _proved(self) -> tuple[Verdict, Claim]:
        """The verdict on what is free; as long as it is not proved, ever more features are kept again."""
        back = 1
        while True:
            claim = self.about.freed(~self.free)
            if self.proof is not None and torch.equal(self.proof[0], self.free):
                return self.proof[1], claim
            verdict = verify_part(claim, self.screen.problem, attack=False, timeout=PATIENCE)
            if isinstance(verdict, Proved) or not bool(self.free.any()):
                return verdict, claim
            if isinstance(verdict, Refuted):
                x = verdict.witness.reshape(-1)
                self.witnesses.append((self.about.support(x), x))
            self.minimal = False
            freed = self.free.nonzero().flatten()
            self.free = self.free.clone()
            self.free[freed[self.screen.costs(self.free)[freed].argsort(descending=True)[:back]]] = False
            back *= 2


def descend(screen: Screen, lower: Tensor, upper: Tensor, steps: int = STEPS) -> Tensor:
    """Points [k, entries] of boxes where the claim is as near to failing as a signed descent gets, from the corners
    that the bounds find worst."""
    rows, program = screen.problem.rows.to(screen.bounder.dtype), screen.bounder.program
    a = screen.shared.rows.a
    least = screen.rows(torch.zeros(1, screen.about.features, dtype=torch.bool))[0]
    towards = a[int(least.argmin())]
    x = torch.where(towards > 0, lower, upper)
    best, value = x, x.new_full((len(x),), math.inf)
    for k in range(steps + 1):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            measure = rows.worst(rows.at(program.evaluate(point)[-1], point)).amin(1)
            slope = torch.zeros_like(x)
            if measure.requires_grad:  # not where the claim is about a function that is constant in pieces
                (slope,) = torch.autograd.grad(measure.sum(), point)
        better = measure.detach() < value
        best, value = torch.where(better[:, None], x, best), torch.where(better, measure.detach(), value)
        size = (upper - lower) * (0.5 / (1 + k))
        x = torch.minimum(torch.maximum(x - size * slope.sign(), lower), upper)
    return best.double()
