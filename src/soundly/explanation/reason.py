"""Sufficient reasons: which features of an input decide a prediction, with proof.

A set of features is a sufficient reason if keeping it keeps the prediction, whatever the others do within their box.
Freeing more can only break it: a proof for one set of free features proves every smaller one, a counterexample refutes
every larger one. A search frees as much as its bounds allow; what it returns has been proved by `verify`.

Reference: Wu et al., "VeriX", NeurIPS 2023; Bassan & Katz, "Towards Formal XAI", TACAS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Start
from soundly.bounds.shared import Shared
from soundly.errors import InvalidInput
from soundly.explanation.minimal import minimal
from soundly.explanation.question import Question, question
from soundly.graph.network import Network
from soundly.spec.claim import Claim
from soundly.spec.region import Box
from soundly.verification.problem import problem_of
from soundly.verification.root import SMALL
from soundly.verification.verdict import Verdict
from soundly.verification.verify import MARGIN, verify, verify_part

NUMBERS = 2**24
"""How many numbers the values of all candidates of a batch may take."""
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
        screen = Screen(about)
        found = minimal(screen, fixed, search=search, timeout=timeout)
    witnesses = {i: x.reshape(about.x.shape) for i, x in found.witnesses.items()}
    return Reason(
        found.verdict, found.claim, about.spread(~found.free).reshape(about.x.shape), ~found.free, found.minimal,
        found.verifier, witnesses, screen.tried, found.seconds,
    )  # fmt: skip


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

    @property
    def features(self) -> int:
        return self.about.features

    def claim(self, free: Tensor) -> Claim:
        """That these features [features] may move as they like."""
        return self.about.freed(~free)

    def decide(self, claim: Claim, timeout: float | None, attack: bool) -> Verdict:
        return verify_part(claim, self.problem, timeout=timeout, attack=attack)

    def violated(self, x: Tensor) -> Tensor:
        """Which features a counterexample moves: it refutes every set in which these are free."""
        return self.about.support(x)

    def near(self, free: Tensor) -> Tensor:
        """A point for each set [k, features], perhaps a counterexample."""
        return descend(self, *self.ends(free))

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
