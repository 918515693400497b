"""Two networks for one job: how far apart they are, and whether they decide alike, for every input of a region.

Quantised against float, edited against original, pruned against whole. The question is put to the difference network,
whose bounds are of the size of what was changed; what is proved is proved of it by an ordinary certificate.

Reference: Paulsen, Wang, Wang, "ReluDiff: Differential Verification of Deep Neural Networks", ICSE 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from soundly.bounds.difference import difference, joined
from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.spec.claim import Claim, Property, Row, within
from soundly.spec.region import Ball, Box
from soundly.verification.estimate import ROOM, Limit, furthest, narrowed, scaled, unit_of
from soundly.verification.problem import problem_of
from soundly.verification.root import proved, root
from soundly.verification.verdict import Verdict
from soundly.verification.verify import verify


@dataclass(frozen=True, eq=False)
class Gap:
    """How far two networks are from each other on a region.

    Attributes:
        upper: no output differs by more, for any input of the region, if the verdict on `claim` is `Proved`.
        reached: the largest difference that an attack found, at `worst`; both networks in float64.
        worst: a point of the region.
    """

    upper: float
    reached: float
    worst: Tensor
    verdict: Verdict
    claim: Claim


def equal(net: Network, other: Network, region: Box | Ball, *, within: float | Tensor) -> Claim:
    """Every output of both networks is the same up to `within`, for every input of the region.

    Args:
        within: one number or a tensor of the output's shape, not negative. Rounding costs something: two networks that
            compute the same by other means are proved equal within a small number, never within 0.
    """
    limit = torch.as_tensor(within, dtype=torch.float64)
    if not bool((limit >= 0).all()):
        raise InvalidInput("within must not be negative, nor NaN.")
    return _bounded(difference(net, other, region), region, limit)


def same_argmax(net: Network, other: Network, region: Box | Ball, *, margin: float = 0.0) -> Claim:
    """Wherever one output of `net` exceeds all its others by `margin`, that output is the largest of `other`, too.

    Args:
        margin: not negative. With 0 both networks have to decide alike everywhere in the region, which is false as soon
            as a border between two classes crosses it and the networks do not agree on where; with more than twice a
            proved gap it is true.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise InvalidInput(f"margin is {margin}; give a finite number, not negative.")
    both = joined(net, other, region)
    n = sum(math.prod(node.shape) for node in net.outputs)
    if n < 2:
        raise InvalidInput(f"same_argmax compares outputs, but the networks have {n}.")

    def own(i: int, sign: int) -> dict[int, Fraction]:  # net is other plus difference
        return {i: Fraction(sign), n + i: Fraction(sign)}

    clauses = []
    for i in range(n):
        leads = [Row({**own(i, -1), **own(k, 1)}, {}, Fraction(margin)) for k in range(n) if k != i]
        for j in range(n):
            if i != j:
                loses = Row({i: Fraction(1), j: Fraction(-1)}, {}, Fraction(0))
                # What the clause's rows for i and j add up to: the difference alone, which is known best.
                both_rows = Row({n + i: Fraction(-1), n + j: Fraction(1)}, {}, Fraction(margin))
                clauses.append([*leads, loses, both_rows])
    inputs = sum(math.prod(node.shape) for node in net.inputs)
    rows = Property.of(clauses, outputs=2 * n, inputs=inputs)
    return Claim(both, region, rows, name=f"same largest output wherever it leads by {margin:g}")


def gap(net: Network, other: Network, region: Box | Ball, *, timeout: float | None = None, tighten: float = 0.0) -> Gap:
    """A proved bound on how far two networks are apart in any output, beside the largest difference that was found.

    Args:
        timeout: seconds for the proof.
        tighten: seconds in which searches may lower the bound.

    Raises:
        InvalidInput, MissingRule: as `difference`.
    """
    apart = difference(net, other, region)
    problem = problem_of(within(apart, region.box, 0.0, 0.0))
    bounds = root(problem, sums=False)
    limit = (1 + ROOM) * max(float((-bounds.bound).max()), 0.0) + 1e-12
    unit = unit_of(torch.tensor([limit]), torch.zeros(1))
    worst = furthest(problem, region, limit)

    def at_most(value: float) -> Claim:
        return scaled(_bounded(apart, region, torch.tensor(value)), unit)

    claim = at_most(limit)
    verdict = proved(claim, bounds, timeout=timeout) or verify(claim, timeout=timeout, attack=False)
    first = Limit(limit, _apart(net, other, worst), worst, verdict, claim)
    found = narrowed(at_most, first, tighten)
    return Gap(found.upper, _apart(net, other, found.worst), found.worst, found.verdict, found.claim)


def _bounded(apart: Network, region: Box | Ball, limit: Tensor) -> Claim:
    text = f"{float(limit):g}" if limit.numel() == 1 else "bounds of their own"
    return replace(within(apart, region, -limit, limit), name=f"{apart.name} within {text}")


def _apart(net: Network, other: Network, x: Tensor) -> float:
    """The largest difference of outputs at a point, by the networks themselves."""
    values = []
    for network in (net, other):
        wide = network.to(torch.float64).to("cpu")
        parts = x.reshape(-1).split([math.prod(node.shape) for node in wide.inputs])
        inputs = (part.reshape(node.shape) for part, node in zip(parts, wide.inputs, strict=True))
        with torch.no_grad():
            values.append(torch.cat([y.reshape(-1) for y in wide.evaluate(wide.outputs, *inputs)]))
    return float((values[0] - values[1]).abs().max())
