"""Second-order cones by cutting planes: what a program of linear rows needs to know of them.

A cone asks that rows miss their bounds by no more than another row has to spare, in the Euclidean norm. The norm is
convex, so where a change of the weights violates the cone, one linear row excludes it and no change that the cone
allows. Such rows enter the same program as all others, for every norm, bound and retain set.

Reference: Kelley, "The Cutting-Plane Method for Solving Convex Programs", SIAM Journal 8, 1960.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """A row . d >= lower [n] that holds for every change d which its cone allows; `excess` is what d lacks of it."""

    row: Tensor
    lower: float
    excess: float


@dataclass(frozen=True, eq=False)
class SecondOrderCone:
    """|rows d - [lower, upper]| <= (1 - share) (radius . d + spare) - room, for a change d of the weights.

    Attributes:
        rows: [k, n]; lower, upper: [k].
        radius: [n].
        spare: the radius before the change.
        room: what rounding may add to the distance and take from the radius.
        share: the part of the radius that is given away, so that finitely many cuts are enough.
    """

    rows: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    spare: float
    room: float
    share: float = 1e-6

    def cut(self, delta: Tensor) -> Cut:
        """The supporting row at a change: the norm of what is missed is at least its product with any unit vector."""
        value = self.rows @ delta
        missed = value - value.clamp(self.lower, self.upper)
        distance = float(missed.norm())
        unit = missed / distance if distance > 0 else missed
        # unit . missed >= unit . (rows d - ends) on the sides that are missed now, and what is not missed counts 0.
        ends = float((unit * (value - missed)).sum())
        kept = 1 - self.share
        row = kept * self.radius - unit @ self.rows
        spare = float(self.radius @ delta) + self.spare
        return Cut(row, self.room - kept * self.spare - ends, distance - spare + self.room / 2)

    def first(self) -> Cut:
        """That the radius is not negative."""
        kept = 1 - self.share
        return Cut(kept * self.radius, self.room - kept * self.spare, math.inf)
