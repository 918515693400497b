"""What passes over a batch of subproblems take and give: intervals, rows, splits, relaxations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from soundly.bounds.ball import Ball
from soundly.bounds.products import Factor, Planes
from soundly.bounds.relaxation import Lines


@dataclass(eq=False)
class Frame:
    """Intervals of every step for a batch of subproblems.

    Attributes:
        lower, upper: per step [batch, n]; the first is the box of inputs.
        infeasible: [batch], where an interval is empty: the subproblem holds no point.
        known: the default relaxations of every function and product, where they were computed.
        factors: of the last products, where these are bounded together.
    """

    lower: list[Tensor]
    upper: list[Tensor]
    infeasible: Tensor
    known: dict[int, Lines | Planes] = field(default_factory=dict)
    factors: dict[int, tuple[Factor, Factor]] | None = None

    def __len__(self) -> int:
        return len(self.infeasible)

    def pick(self, index: Tensor) -> Frame:
        """Some of the subproblems."""
        return Frame([v[index] for v in self.lower], [v[index] for v in self.upper], self.infeasible[index])


@dataclass(frozen=True, eq=False)
class Start:
    """Rows to bound: <a[step], value of step> summed over steps, plus d; each belongs to a subproblem.

    Attributes:
        a: coefficients [rows, n] of some steps.
        d: [rows].
        owner: [rows], the position of the subproblem; None if row i belongs to subproblem i.
    """

    a: dict[int, Tensor]
    d: Tensor
    owner: Tensor | None = None

    def part(self, index: Tensor | slice) -> Start:
        owner = torch.arange(len(self.d), device=self.d.device) if self.owner is None else self.owner
        return Start({step: a[index] for step, a in self.a.items()}, self.d[index], owner[index])


@dataclass(eq=False)
class Split:
    """Halves of inner values chosen by a search, of one step: sign (v - at) >= 0 where sign is not 0.

    Attributes:
        sign: [batch, n], +1, -1 or 0.
        at: [batch, n].
        multiplier: [batch, n], not negative; of the constraint, in rows of this subproblem.
    """

    sign: Tensor
    at: Tensor
    multiplier: Tensor


@dataclass(eq=False)
class Pass:
    """What one backward pass found: the rows are at least <a, x> + d on boxes and, if there is one, the ball.

    Attributes:
        a: [rows, inputs].
        d: [rows].
        kept: coefficients [rows, n] of the functions' values on the way, where asked for.
        left: coefficients [rows, n] of steps where the pass ended.
        ball: the ball in which all inputs lie.
    """

    a: Tensor
    d: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    left: dict[int, Tensor] = field(default_factory=dict)
    ball: Ball | None = None

    def least(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Lower bounds [rows] over boxes [rows, inputs] (or one)."""
        if self.ball is None:
            value = self.d + (self.a.clamp(min=0) * lower + self.a.clamp(max=0) * upper).sum(-1)
        else:
            value = self.d + self.ball.least(self.a, lower, upper)
        return value.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def lowest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Points [rows, inputs] of boxes where the rows' planes are least."""
        return torch.where(self.a > 0, lower, upper) if self.ball is None else self.ball.lowest(self.a, lower, upper)


Relaxations: TypeAlias = Mapping[int, Lines | Planes]
"""By step: lines of a function, planes of a product."""

Side: TypeAlias = tuple[int, int]
"""A step, and 0 for its relaxation from below or 1 for that from above."""

Slopes: TypeAlias = Mapping[Side, Tensor]
"""What was chosen freely [batch, n]: the slope of a function's line; for a product the share r in [0, 1] of the first
of McCormick's two planes."""


class OutOfTime(Exception):
    """The deadline passed inside a pass over many rows; nothing that was being computed is known."""
