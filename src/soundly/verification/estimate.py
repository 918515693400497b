"""How large outputs get, where that is asked for and not given: points that come near a bound, searches that lower it.

A bound is found at the root (`root`), stated as a claim with a little room, and proved; between that and the largest
value that an attack finds, searches then halve the distance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.spec.claim import Claim
from soundly.spec.region import Ball, Box
from soundly.verification.attack import Attack
from soundly.verification.problem import Problem
from soundly.verification.verdict import Proved, Refuted, Verdict
from soundly.verification.verify import verify

ROOM = 1e-3
"""By how much claims are weaker than the bounds they come from, of how far the values move."""
CLOSE = 1.02
"""A limit is not sought below this many times what was reached."""


@dataclass(frozen=True, eq=False)
class Limit:
    """Nothing exceeds `upper`, if the verdict on `claim` is `Proved`; `reached` was attained, at `worst`."""

    upper: float
    reached: float
    worst: Tensor
    verdict: Verdict
    claim: Claim


def furthest(problem: Problem, region: Box | Ball, limit: float) -> Tensor:
    """A point of the region, float64 and of its shape, where a row is small; none is below -limit."""
    project = None
    if isinstance(region, Ball) and region.norm != "linf":

        def project(x: Tensor) -> Tensor:
            return region.project(x.double().reshape(-1, *region.shape)).reshape(len(x), -1)

    # Values beyond the limit: as there are none, the attack goes on to its end.
    rows = replace(problem.rows, constant=problem.rows.constant + (limit if math.isfinite(limit) else 1e9))
    attack = Attack(problem.program.to(torch.float32), rows, problem.lower[0], problem.upper[0], 0, project)
    attack.run(steps=40, restarts=16)
    return region.project(attack.best[1].reshape(region.shape), dtype=torch.float64)


def narrowed(claim: Callable[[float], Claim], found: Limit, seconds: float) -> Limit:
    """A lower limit, by searches halfway between limit and reached value, each proving one or finding the other.

    Args:
        claim: that no output exceeds a number, or its absolute value does not.
    """
    until = time.monotonic() + seconds
    while isinstance(found.verdict, Proved) and found.upper > CLOSE * found.reached:
        if (left := until - time.monotonic()) <= 0:
            break
        upper = (found.upper + found.reached) / 2
        closer = claim(upper)
        match verify(closer, timeout=left):
            case Proved() as outcome:
                found = replace(found, upper=upper, verdict=outcome, claim=closer)
            case Refuted(witness=point, outputs=values):
                found = replace(found, reached=float(values.abs().max()), worst=point)
            case _:
                break
    return found


def unit_of(moves: Tensor, values: Tensor) -> float:
    """A power of two that says how far values move, or their size where they do not."""
    finite = moves[torch.isfinite(moves)]
    size = max(finite.amax().item() if len(finite) else 0.0, 1e-6 * values.nan_to_num(0.0, 0.0, 0.0).abs().sum().item())
    return math.ldexp(1.0, math.frexp(size)[1]) if size > 0 else 1.0


def scaled(claim: Claim, unit: float) -> Claim:
    """The same claim with its rows in another unit, a power of two: a search stops at margins of size one."""
    rows = claim.property
    y = replace(rows.y, value=rows.y.value / unit)
    return replace(claim, property=replace(rows, y=y, b=rows.b / unit, exact=None))
