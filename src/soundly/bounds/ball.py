"""Balls in the norms l1 and l2, met with boxes: where a row is least, and what a ball leaves of a box.

A ball lies behind each of its tangent planes: <h, x> <= support(h), the value of h at the centre plus the dual norm of
h times the radius. So a row <a, x> is at least <a + h, x> - support(h) there, and over a box that is a sum; for the
best h it is the least over box and ball together (Boyd and Vandenberghe, "Convex Optimization", 2004, 5.1.6 and 5.7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ROUNDS, CLOSE = 50, 1e-6
"""How often a multiplier is improved at most, and when a relative change is little enough."""


@dataclass(frozen=True, eq=False)
class Ball:
    """All x with norm((x - centre) / radius) <= 1, and x = centre in entries where the radius is 0.

    Attributes:
        centre, radius: [1 or rows, n], floating.
        norm: "l1" or "l2".
    """

    centre: Tensor
    radius: Tensor
    norm: Literal["l1", "l2"]

    def map(self, f: Callable[[Tensor], Tensor]) -> Ball:
        """With other numbers: some entries, another type."""
        return Ball(f(self.centre), f(self.radius), self.norm)

    def least(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The least values [rows] of <a, x>, a [rows, n], over boxes [1 or rows, n] met with the ball, from below."""
        h, _ = self._tangent(a, low, high)
        b = h * self.radius
        dual = torch.linalg.vector_norm(b, 2 if self.norm == "l2" else torch.inf, dim=-1)
        rest = a + h
        return (rest.clamp(min=0) * low + rest.clamp(max=0) * high - h * self.centre).sum(-1) - dual

    def lowest(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Points [rows, n] where <a, x> is least."""
        _, y = self._tangent(a, low, high)
        return torch.minimum(torch.maximum(self.centre + self.radius * y, low), high)

    def narrowed(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest boxes around what boxes [k, n] and the ball have in common; the ends of some entry are crossed
        where that is nothing."""
        near = self._inside(torch.zeros_like(low), *self._scaled(low, high)).abs()
        size = near.square() if self.norm == "l2" else near
        reach = (1 - size.sum(-1, keepdim=True) + size).clamp(min=0)
        reach = self.radius * (reach.sqrt() if self.norm == "l2" else reach)
        return torch.maximum(low, self.centre - reach), torch.minimum(high, self.centre + reach)

    def plane(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """h [n] and b with <h, y> <= b for all y of a ball that is the same for all rows, but not for y = x [n]; None
        if x lies inside, or as good as."""
        y = self._scaled(x, x)[0][0].double()
        norm = torch.linalg.vector_norm(y, 2 if self.norm == "l2" else 1)
        if norm <= 1 + CLOSE:
            return None
        way = y / norm if self.norm == "l2" else y.sign()
        h = torch.where(self.radius[0] > 0, way / self.radius[0], 0.0)
        h = h / h.abs().max()
        dual = torch.linalg.vector_norm(h * self.radius[0], 2 if self.norm == "l2" else torch.inf)
        return h, (h * self.centre[0]).sum() + dual

    # ---------------------------------------------------------------- the best tangent plane

    def _scaled(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of boxes where the ball is the unit ball."""
        r = torch.where(self.radius > 0, self.radius, torch.inf)
        return (low - self.centre) / r, (high - self.centre) / r

    @staticmethod
    def _inside(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(y, low), high)

    def _tangent(self, a: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The normal h [rows, n] of the best tangent plane, and the point y [rows, n] of the unit ball where the row is
        least. In units of the ball, and times the multiplier, the plane's normal is a derivative of the norm."""
        b, (low, high) = a * self.radius, self._scaled(low, high)
        if self.norm == "l2":
            times, y = self._sphere(b, low, high)
        else:
            times, y = self._diamond(b, low, high)
            low, high = torch.where(low > 0, 1.0, -1.0).to(a), torch.where(high < 0, -1.0, 1.0).to(a)
        r = torch.where(self.radius > 0, self.radius, torch.inf)
        ends = times[:, None] * low / r, times[:, None] * high / r
        return torch.minimum(torch.maximum(-a, ends[0]), ends[1]), y

    def _sphere(self, b: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The point is -b t, moved into the box, for the t at which it reaches the sphere: t grows until no more than
        the entries that are not at an end do so (a Newton method)."""
        corner = torch.where(b == 0, self._inside(torch.zeros_like(b), low, high), torch.where(b > 0, low, high))
        free = corner.square().sum(-1) <= 1
        t = 1 / b.square().sum(-1).sqrt().clamp(min=torch.finfo(b.dtype).tiny)
        under, over = torch.zeros_like(t), torch.full_like(t, torch.inf)
        for _ in range(ROUNDS):
            y = self._inside(-b * t[:, None], low, high)
            moving = (y > low) & (y < high)
            small = y.square().sum(-1) <= 1
            under, over = torch.where(small, t, under), torch.where(small, over, t)
            fixed = torch.where(moving, 0.0, y).square().sum(-1)
            newton = ((1 - fixed) / torch.where(moving, b, 0.0).square().sum(-1)).sqrt()
            other = torch.where(torch.isfinite(over), (under + over) / 2, 2 * t)
            known = torch.isfinite(newton) & (newton >= under * (1 - CLOSE)) & (newton <= over * (1 + CLOSE))
            new = torch.where(known, newton, other)
            settled = free | ((new - t).abs() <= CLOSE * t)
            t = new
            if bool(settled.all()):
                break
        y = torch.where(free[:, None], corner, self._inside(-b * t[:, None], low, high))
        return torch.where(free, 0.0, 1 / t), y

    def _diamond(self, b: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """From the box's point nearest to the centre the steepest entries go first, each as far as its end: the
        multiplier is the steepness of the one that does not get there (a fractional knapsack)."""
        near = self._inside(torch.zeros_like(b), low, high)
        way = torch.where(b == 0, 0.0, torch.where(b > 0, low, high) - near)
        steep, order = b.abs().sort(dim=-1, descending=True)
        room = way.abs().gather(-1, order)
        left = (1 - near.abs().sum(-1, keepdim=True)).clamp(min=0) - room.cumsum(-1) + room
        used = torch.minimum(left.clamp(min=0), room)
        full = left < room
        at = full.to(torch.uint8).argmax(-1, keepdim=True)
        times = torch.where(full.any(-1), steep.gather(-1, at)[:, 0], 0.0)
        moved = torch.zeros_like(used).scatter(-1, order, used)
        return times, near + way.sign() * moved
