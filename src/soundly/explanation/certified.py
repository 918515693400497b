"""What is certain about an attribution while its input moves: bounds on the map, its largest cells, how far it changes.

An attribution is a network, so each of these is a claim: a bound is found by optimised linear bounds, stated as a claim
with a little room, and proved by `verify`. Metrics of other tools sample; these hold for every input of the region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.elementwise import ABS, SQUARE
from soundly.graph.linear import Sum, reshape, subtract
from soundly.graph.network import Network
from soundly.graph.node import Constant
from soundly.graph.simplify import simplify
from soundly.spec.claim import Claim, Property, Row, within
from soundly.spec.region import Ball, Box
from soundly.verification.estimate import ROOM, Limit, furthest, narrowed, scaled, unit_of
from soundly.verification.problem import problem_of
from soundly.verification.root import Root, proved, root
from soundly.verification.verdict import Verdict
from soundly.verification.verify import verify

PAIRS = 2**16
"""The most comparisons of two cells."""


@dataclass(frozen=True, eq=False)
class MapBounds:
    """Bounds on an attribution over a region, of the map's shape; they hold if the verdict on `claim` is `Proved`."""

    lower: Tensor
    upper: Tensor
    verdict: Verdict
    claim: Claim


@dataclass(frozen=True, eq=False)
class TopK:
    """The cells that are certain to be among the k largest, by flat position, if the verdict on `claim` is `Proved`.

    Attributes:
        cells: the k largest at the point itself, largest first.
        certain: those of them that stay among the k largest for every input of the region. If there are none, nothing
            is claimed and the verdict is `Empty`.
    """

    cells: tuple[int, ...]
    certain: tuple[int, ...]
    verdict: Verdict
    claim: Claim


@dataclass(frozen=True, eq=False)
class Change:
    """How far an attribution moves within a region.

    Attributes:
        upper: no input of the region changes it by more, if the verdict on `claim` is `Proved`.
        reached: the largest change that an attack found, at `worst`.
        worst: a point of the region.
    """

    upper: float
    reached: float
    worst: Tensor
    verdict: Verdict
    claim: Claim


def certify_map(attribution: Network, region: Box | Ball, *, timeout: float | None = None) -> MapBounds:
    """Lower and upper maps: between them lies the attribution of every input of the region.

    Args:
        attribution: a network whose output is the map, as `soundly.gradcam` returns.
        timeout: seconds for the proof.
    """
    shape = attribution.output.shape
    found = root(problem_of(within(attribution, _box(region), 0.0, 0.0)))
    lower, low = found.bound.chunk(2)
    unit = unit_of(-low - lower, lower)
    lower, upper = (lower - ROOM * unit).reshape(shape), (ROOM * unit - low).reshape(shape)
    claim = scaled(within(attribution, region, lower, upper), unit)
    return MapBounds(lower, upper, _settled(claim, found, timeout), claim)


def certify_top_k(attribution: Network, x: Tensor, region: Box | Ball, k: int, *, timeout: float | None = None) -> TopK:
    """Which of the k largest cells of a map stay among the k largest for every input of the region.

    A cell does if at most k - 1 others are not proved to be smaller. Differences of two cells are bounded as such,
    which says more than bounds of either.
    """
    values = _value(attribution, x).reshape(-1)
    n = len(values)
    if not isinstance(k, int) or not 0 < k <= n or k * n > PAIRS:
        raise InvalidInput(f"k is {k!r} of {n} cells; give 1 to {n}, and at most {PAIRS} comparisons.")
    cells = values.argsort(descending=True, stable=True)[:k].tolist()
    pairs = [(p, q) for p in cells for q in range(n) if p != q]
    found = root(problem_of(_larger(attribution, _box(region), pairs))) if pairs else None
    bound = torch.empty(0) if found is None else found.bound
    unit = unit_of(values.max() - values.min() - bound, bound)
    larger = [i for i, b in enumerate(bound.tolist()) if b > ROOM * unit]
    certain = tuple(p for p in cells if sum(pairs[i][0] == p for i in larger) >= n - k)
    larger = [i for i in larger if pairs[i][0] in certain]
    claim = scaled(_larger(attribution, region, [pairs[i] for i in larger]), unit)
    claim = replace(claim, name=f"cells {list(certain)} among the {k} largest")
    return TopK(tuple(cells), certain, _settled(claim, found, timeout, larger), claim)


def certify_change(
    attribution: Network,
    x: Tensor,
    region: Box | Ball,
    *,
    norm: Literal["l1", "l2", "linf"] = "l1",
    relative: bool = True,
    timeout: float | None = None,
    tighten: float = 0.0,
) -> Change:
    """The most an attribution changes within a region: the worst case of what sensitivity metrics sample.

    Args:
        attribution: a network whose output is the map.
        x: the input whose map the others are compared with.
        norm: of the difference of two maps.
        relative: to the norm of the map at x. With norm "l2" this is captum's `sensitivity_max`, for all inputs and
            not for ten.
        timeout: seconds for the proof.
        tighten: seconds in which searches may lower the bound.
    """
    if norm not in ("l1", "l2", "linf"):
        raise InvalidInput(f'norm is {norm!r}; give "l1", "l2" or "linf".')
    base = _value(attribution, x)
    size = float(torch.linalg.vector_norm(base.double(), {"l1": 1, "l2": 2, "linf": math.inf}[norm]))
    if relative and size == 0:
        raise InvalidInput("relative: the map at x is zero, so no change is relative to it; relative=False.")
    square, unit = norm == "l2", size if relative else 1.0
    change = _change(attribution, base, norm)
    problem = problem_of(within(change, _box(region), None, 0.0))
    found = root(problem)
    limit = (1 + ROOM) * float((-found.bound).max())
    room = unit_of(torch.tensor([limit]), base)
    worst = furthest(problem, region, limit)
    reached = float(_value(change.to(torch.float64), worst.reshape(change.input.shape)).max())

    def at_most(value: float) -> Claim:
        return scaled(within(change, region, None, value), room)

    claim = at_most(limit)
    verdict: Verdict | None = proved(claim, found, timeout=timeout)
    if verdict is None:
        if found.jointly:
            limit = (1 + ROOM) * float((-root(problem, sums=False).bound).max())
            claim = at_most(limit)
        verdict = verify(claim, timeout=timeout, attack=False)
    final = narrowed(at_most, Limit(limit, reached, worst, verdict, claim), tighten)

    def measured(v: float) -> float:
        return (math.sqrt(max(v, 0.0)) if square else v) / unit

    return Change(
        measured(final.upper), measured(final.reached), final.worst.reshape(x.shape), final.verdict, final.claim
    )


# -- networks and claims


def _change(attribution: Network, base: Tensor, norm: str) -> Network:
    """|map - base| cell by cell for linf, its sum for l1, the sum of its squares for l2."""
    fixed = Constant("map at x", attribution.output.shape)()
    moved = subtract(attribution.output, fixed)
    size = SQUARE(moved) if norm == "l2" else ABS(moved)
    flat = reshape(size, (math.prod(size.shape),))
    result = flat if norm == "linf" else reshape(Sum((0,))(flat), (1,))
    values = {**attribution.values, fixed: base.to(attribution.dtype)}
    return simplify(
        replace(attribution, outputs=(result,), values=values, name=f"change of {attribution.name}")
    )  # fmt: skip


def _larger(network: Network, region: Box | Ball, pairs: Sequence[tuple[int, int]]) -> Claim:
    """The first cell of each pair exceeds the second."""
    rows = [[Row({p: Fraction(1), q: Fraction(-1)}, {}, Fraction(0))] for p, q in pairs]
    sizes = math.prod(network.output.shape), math.prod(network.input.shape)
    return Claim(network, region, Property.of(rows, outputs=sizes[0], inputs=sizes[1]), name="cells in order")


def _value(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        value: Tensor = network(x.detach().to(device=network.device, dtype=network.dtype)).cpu()
    return value


def _box(region: Box | Ball) -> Box:
    if not isinstance(region, (Box, Ball)) or region.is_empty:
        raise InvalidInput("region must be a Box or a Ball that holds a point.")
    return region.box


# -- bounds


def _settled(claim: Claim, found: Root | None, timeout: float | None, rows: Sequence[int] | None = None) -> Verdict:
    """By the bounds that the claim was made from; where they do not do, by a search."""
    verdict = None if found is None or not claim.property.clauses else proved(claim, found, rows, timeout=timeout)
    return verdict or verify(claim, timeout=timeout, attack=False)
