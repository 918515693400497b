"""Edits of any layer, at points and on whole regions: propose, look for what is still wrong, prove.

Constraints on a region are first imposed at some of its points. The edited network is then sampled, and whatever
violates them joins the points; where sampling finds nothing the verifier decides, and its counterexample joins them
too. Where it can neither prove nor refute, rows are tightened. What is returned as proved has a certificate of the
whole claim.

References: Solar-Lezama et al., "Combinatorial Sketching for Finite Programs", ASPLOS 2006 (counterexample-guided
search); docs/editing.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from soundly.certificate.format import Certificate
from soundly.editing.acceptance import promise
from soundly.editing.candidate import Failure, Norm
from soundly.editing.constraints import Area, Bounded, Classified, Constraint, Normalised, Point, TopMask, points_of
from soundly.editing.evidence import unknowns
from soundly.editing.low_rank import LowRank
from soundly.editing.sequential import Goals, Move, Mover, Requirements, require
from soundly.graph.network import Network
from soundly.graph.node import Node
from soundly.spec.claim import Claim
from soundly.verification.verdict import Proved, Refuted
from soundly.verification.verify import verify

FIRST, SAMPLES, WORST = 24, 2000, 12
"""Points of a region at the start; how many are looked at in a proposal; how many of the wrong ones join."""
CAUTION = (1.0, 4.0, 16.0, 256.0)
TIGHTEN = 1e-4
"""The share of its size by which a row is tightened first when a region is not proved."""


Status = Literal["proved", "infeasible", "unproven", "limit"]


@dataclass(frozen=True, eq=False)
class Inner:
    """What became of an edit.

    Attributes:
        status, reason, conflict: as in `edit.Edit`.
        requirements: the rows that were asked for.
        values: the new parameters as stored, if proved.
        certificate: the proof.
        smallest: whether no smaller change is known to exist.
        points: how many points were constrained in the end.
        seconds: {"solve", "check"}.
    """

    status: Status
    requirements: Requirements
    reason: str = ""
    conflict: tuple[str, ...] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    certificate: Certificate | None = None
    smallest: bool = False
    points: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def edit_inside(
    network: Network,
    constraints: Sequence[Constraint],
    layers: Sequence[str],
    *,
    norm: Norm = "l2",
    bound: float | None = None,
    goals: Sequence[Constraint] = (),
    goal_weight: float = 1.0,
    start: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    extremes: Mapping[int, tuple[int, int]] | None = None,
    deadline: float = math.inf,
    progress: Callable[[str], None] | None = None,
) -> Inner:
    """Changes layers so that constraints hold at points and on regions; see `soundly.edit`.

    Args:
        goals: bounds with equal ends, to be met as well as possible.
        rank: the largest rank of the change of a matrix, with norm "l2", no bound and no start.
        start: values of parameters from which to look, by name; those of the network where there are none.
        extremes: as in `program.compile_program`.
        deadline: value of `time.perf_counter()`.
    """
    free = unknowns(network, layers)
    whole = require(network, constraints, free, extremes=extremes)
    promise(whole, {})  # what cannot be claimed is not looked for
    wished = Goals(require(network, goals, free), goal_weight) if goals else None
    seconds = {"solve": 0.0, "check": 0.0}
    wide = [c for c in constraints if _areas(c)]
    samples = {area: _first(area) for c in wide for area in _areas(c)}
    origin = whole.evidence.theta
    if bound is not None:  # rounding to the storage type adds to a change
        unit = torch.finfo(network.dtype).eps / 2
        bound = max(bound - unit * float(origin.abs().max() + bound), 1e-300)
    theta = origin if start is None else _flat(free, start, network)
    caution, tight, patience = 0, 0.0, 10.0
    within: LowRank | None = None
    while True:
        clock = time.perf_counter()
        asked = whole
        if wide:
            parts = [(i, p) for i, c in enumerate(constraints) for p in _instances(c, samples)]
            chosen = {k: extremes[i] for k, (i, _) in enumerate(parts) if extremes and i in extremes}
            asked = require(network, [part for _, part in parts], free, extremes=chosen)
        asked = asked.tightened(tight) if tight else asked
        mover = Mover(asked, network.dtype, norm, bound, deadline, wished, within)
        moved = mover(theta, CAUTION[caution])
        if rank is not None and within is None and isinstance(moved, Move):
            within = LowRank.around(free, moved.theta - origin, rank)
            moved = replace(mover, within=within)(theta, CAUTION[caution])
        seconds["solve"] += time.perf_counter() - clock
        if isinstance(moved, Failure):
            names = tuple(dict.fromkeys(asked.name_of(r) for r in moved.rows))
            return Inner(moved.status, whole, moved.reason, names, points=len(asked.points), seconds=seconds)
        theta = moved.theta
        values = _stored(free, theta, network)
        claim = promise(whole, values)
        clock = time.perf_counter()
        found = _violations(whole, claim, samples)
        if progress is not None:
            progress(f"{len(asked.points)} points, {found} more violate")
        if found == 0:
            left = deadline - time.perf_counter()
            # Of points a proof either works out or needs wider margins; on regions other points may be worth more.
            verdict = verify(claim, timeout=max(0.1, min(left, patience) if wide else left))
            seconds["check"] += time.perf_counter() - clock
            if isinstance(verdict, Proved):
                return Inner("proved", whole, values=values, certificate=verdict.certificate, smallest=moved.smallest
                             and not wide, points=len(asked.points), seconds=seconds)  # fmt: skip
            joined = isinstance(verdict, Refuted) and _join(verdict.witness, whole, samples)
            if not joined and not wide and caution + 1 == len(CAUTION):
                reason = getattr(verdict, "reason", f"the rounded weights violate it: {verdict}")
                return Inner("unproven", whole, f"weights exist, but the proof failed: {reason}", seconds=seconds)
            tight = 2 * tight or TIGHTEN
            if not joined:
                caution = min(caution + 1, len(CAUTION) - 1)
                patience *= 2
        else:
            seconds["check"] += time.perf_counter() - clock
        if time.perf_counter() > deadline:
            return Inner("limit", whole, "the time limit was reached before the claim was proved", seconds=seconds,
                         points=len(asked.points))  # fmt: skip


def _areas(c: Constraint) -> list[Area]:
    return [p for p in points_of(c) if isinstance(p, Area)]


def sampled(constraints: Sequence[Constraint]) -> list[Constraint]:
    """Constraints at points only: those on a region at some of its points."""
    samples = {area: _first(area) for c in constraints for area in _areas(c)}
    return [part for c in constraints for part in _instances(c, samples)]


def _first(area: Area) -> list[Tensor]:
    """Some points of a region: its middle, corners, random ones."""
    return [area.x, *area.region.corners(FIRST // 3), *area.region.samples(FIRST)]


def _instances(c: Constraint, samples: Mapping[Area, Sequence[Tensor]]) -> list[Constraint]:
    """The constraint at the samples of its regions, or as it is where it has none."""
    areas = _areas(c)
    return [_instance(c, area, x) for area in areas for x in samples[area]] if areas else [c]


def _instance(c: Constraint, area: Area, x: Tensor) -> Constraint:
    """The constraint at one point of its region."""
    point = Point(x, area.position, area.name)
    if isinstance(c, Classified):
        return replace(c, point=point)
    terms = tuple(
        replace(t, functional=replace(t.functional, point=point)) if t.functional.point is area else t  # type: ignore[type-var]
        for t in c.expression.terms
    )
    assert isinstance(c, Bounded | Normalised | TopMask)
    return replace(c, expression=replace(c.expression, terms=terms))


def _flat(free: Sequence[Node], values: Mapping[str, Tensor], network: Network) -> Tensor:
    return torch.cat(
        [values.get(n.op.name, network.values[n]).detach().double().reshape(-1) for n in free]  # type: ignore[attr-defined]
    )


def _stored(free: Sequence[Node], theta: Tensor, network: Network) -> dict[str, Tensor]:
    """theta as parameters, in the network's type."""
    parts = theta.split([math.prod(n.shape) for n in free])
    return {
        n.op.name: part.reshape(n.shape).to(network.values[n])  # type: ignore[attr-defined]
        for n, part in zip(free, parts, strict=True)
    }


def _violations(whole: Requirements, claim: Claim, samples: dict[Area, list[Tensor]]) -> int:
    """Looks for points of regions where rows fail; the worst join the samples."""
    count = 0
    assert isinstance(claim.network, Network)
    network = claim.network.to(torch.float64)
    for i, area in enumerate(whole.points):
        if not isinstance(area, Area):
            continue
        draw = torch.Generator().manual_seed(len(samples[area]))
        xs = torch.cat([area.region.samples(SAMPLES, generator=draw), area.region.corners(64, generator=draw)])
        with torch.no_grad():
            values = torch.vmap(network, chunk_size=256)(xs.reshape(-1, *network.input.shape))
        mine = whole.owner == i
        excess = whole.at_points(i, values)[:, mine].amax(1)
        wrong = (excess > 0).nonzero()[:, 0]
        wrong = wrong[excess[wrong].argsort(descending=True)]
        spread = wrong[WORST :: max(1, len(wrong) // WORST)]  # the worst often lie together
        for k in [*wrong[:WORST].tolist(), *spread.tolist()]:
            samples[area].append(xs[k])
            count += 1
    return count


def _join(witness: Tensor, whole: Requirements, samples: dict[Area, list[Tensor]]) -> bool:
    """Adds a counterexample to the samples of the regions that hold it."""
    joined = False
    for area in samples:
        x = witness.reshape(area.region.shape).double()
        if bool(area.region.contains(x)[()]) and not any(torch.equal(x, old) for old in samples[area]):
            samples[area].append(x)
            joined = True
    return joined
