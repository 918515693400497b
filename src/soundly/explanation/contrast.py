"""Contrastive explanations: few features, or a short way, to another answer, shown by an input where it is given.

Each set of such features meets every sufficient reason: a reason that keeps none of them would leave the change free.
That no smaller set does it is not proved; that no shorter way does it is, up to a radius.

Reference: Ignatiev et al., "From Contrastive to Abductive Explanations and Back Again", AIxIA 2020.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.explanation.question import Question, question
from soundly.explanation.reason import Screen, descend
from soundly.graph.network import Network
from soundly.spec.claim import Claim, robust
from soundly.spec.region import Box, Norm
from soundly.verification.replay import replay
from soundly.verification.verdict import Proved, Refuted, Verdict
from soundly.verification.verify import verify


@dataclass(frozen=True, eq=False)
class Contrast:
    """A change of few features that changes the answer.

    Attributes:
        verdict: on the claim that nothing within the box changes the answer: `Refuted`, or there is no contrast.
        mask: bool, of the input's shape: the entries that change. Nowhere where there is no contrast.
        changed: bool [features].
        witness: the changed input, in the input's shape; x itself where there is no contrast.
        label: what the network answers there, by flat position.
        tried: how many sets of features were attacked. None of those with one feature less was broken by the attack,
            which is no proof that none can be.
    """

    verdict: Verdict
    mask: Tensor
    changed: Tensor
    witness: Tensor
    label: int
    tried: int

    @property
    def size(self) -> int:
        """How many features change."""
        return int(self.changed.sum())


def contrast(
    asked: Network | Claim,
    x: Tensor,
    *,
    eps: float | Tensor | None = None,
    box: Box | None = None,
    target: int | None = None,
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
    groups: Any = None,
    timeout: float | None = None,
) -> Contrast:
    """A small set of features whose change, within their box, changes the answer.

    Args:
        asked, x, eps, box, target, clip, groups: as in `certify_mask`.
        timeout: seconds for the first counterexample, in which everything may change.
    """
    about = question(asked, x, eps=eps, box=box, target=target, clip=clip, groups=groups)
    verdict = verify(about.claim, timeout=timeout)
    changed, witness, tried = torch.zeros(about.features, dtype=torch.bool), about.x, 0
    if isinstance(verdict, Refuted):
        changed, witness, tried = _Smaller(about, verdict.witness).run()
    mask = about.spread(changed).reshape(about.x.shape)
    label = int(about.claim.outputs(witness).argmax())
    return Contrast(verdict, mask, changed, witness, label, tried)


@dataclass(frozen=True, eq=False)
class Radius:
    """How far the nearest input with another answer is: at least `proved`, at most `found`.

    Attributes:
        proved: every input within this distance gets the answer: proved, by `verdict` on `claim`; 0 if nothing is.
        found: the distance of `witness`, in float64; infinite if none was found.
        witness: a changed input, in the input's shape.
        label: what the network answers there, by flat position.
    """

    proved: float
    found: float
    witness: Tensor | None
    label: int | None
    verdict: Proved | None
    claim: Claim | None


def radius(
    network: Network,
    x: Tensor,
    *,
    norm: Norm = "linf",
    target: int | None = None,
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
    within: float = 1.0,
    ratio: float = 1.05,
    timeout: float = 60.0,
) -> Radius:
    """The smallest change that changes the answer, from both sides: an input, and a proof that none is much nearer.

    Radii are bisected, each a question to `verify` that may take a quarter of the time. What it cannot decide is not
    proved.

    Args:
        norm: of the change: "linf", "l2" or "l1".
        target: the answer; the network's own at x if None.
        clip: the range of valid inputs, a box, or None for no limit.
        within: the largest radius that is of interest.
        ratio: how close `found` and `proved` shall be.
        timeout: seconds, about.
    """
    if not within > 0 or not ratio > 1 or not timeout > 0 or math.isinf(within):
        raise InvalidInput(f"within is {within}, timeout {timeout}: give positive numbers; ratio is {ratio}: above 1.")
    deadline, last = time.monotonic() + timeout, {"linf": math.inf, "l2": 2.0, "l1": 1.0}[norm]
    target = int(network(x).argmax()) if target is None else target
    known = Radius(0.0, math.inf, None, None, None, None)
    low, high, eps = 0.0, math.inf, within
    while high > ratio * low and low < within and eps > within / 1e9 and (left := deadline - time.monotonic()) > 0:
        claim = robust(network, x, eps=eps, label=target, norm=norm, clip=clip)
        verdict = verify(claim, timeout=min(left, timeout / 4))
        if isinstance(verdict, Proved):
            low = eps
            known = replace(known, proved=eps, verdict=verdict, claim=claim)
        else:
            high = eps
            if isinstance(verdict, Refuted):
                distance = float(torch.linalg.vector_norm((verdict.witness - x.double()).reshape(-1), last))
                assert distance >= low, "an input that was proved to keep the answer changes it"
                if distance < known.found:
                    label = int(verdict.outputs.argmax())
                    known = replace(known, found=distance, witness=verdict.witness, label=label)
                high = min(high, distance)
        eps = math.sqrt(low * high) if low else high / 16
    return known


class _Smaller:
    """Takes features back as long as an attack on the rest still finds a counterexample."""

    def __init__(self, about: Question, witness: Tensor) -> None:
        self.about, self.witness = about, witness
        self.screen = Screen(about)
        self.changed = about.support(witness)
        self.tried = 0

    def run(self) -> tuple[Tensor, Tensor, int]:
        block = max(1, int(self.changed.sum()) // 2)
        while block:
            # Those first that seem to matter least.
            inside = self.changed.nonzero().flatten()
            order = inside[self.screen.costs(self.changed)[inside].argsort()]
            candidates = [self._without(part) for part in order.split(block) if len(part) < len(inside)]
            if not (candidates and self._taken(torch.stack(candidates))):
                block //= 2
            else:
                block = min(block, max(1, int(self.changed.sum()) // 2))
        return self.changed, self.witness, self.tried

    def _without(self, features: Tensor) -> Tensor:
        left = self.changed.clone()
        left[features] = False
        return left

    def _taken(self, sets: Tensor) -> bool:
        """Goes on with the set whose attack goes deepest, if the network confirms its counterexample."""
        self.tried += len(sets)
        points = torch.cat([descend(self.screen, *self.screen.ends(part)) for part in sets.split(self.screen.batch)])
        rows, dtype = self.screen.problem.rows.to(self.screen.bounder.dtype), self.screen.bounder.dtype
        outputs = self.screen.bounder.program.evaluate(points.to(dtype))[-1]
        measure = rows.worst(rows.at(outputs, points.to(dtype))).amin(1)
        for i in measure.argsort()[:3].tolist():
            if float(measure[i]) > 0:
                return False
            found = replay(self.about.freed(~sets[i]), points[i])
            if found is not None:
                self.changed, self.witness = self.about.support(found.x), found.x.reshape(self.about.x.shape)
                return True
        return False
