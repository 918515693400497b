"""Balls in the norms l1 and l2, rigorous: what a row is at least on a ball and a box, and what a ball leaves of a box.

Whatever h is, <h, x> is at most its value at the centre plus the dual norm of h times the radius, on the whole ball.
So only the roundings of that sum matter, and none of those with which h was chosen. docs/certificates.md says more.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from soundly.certificate.rings import U

Array = npt.NDArray[np.float64]

L1, L2 = "l1", "l2"
ROUNDS, CLOSE = 50, 1e-9
TINY = 2.0**-500  # above what underflow can change in a norm of fewer than 2^26 numbers


@dataclass(frozen=True, eq=False)
class Ball:
    """All x with norm((x - centre) / radius) <= 1, [1 or M, n]. Nothing is known of entries with the radius 0."""

    centre: Array
    radius: Array
    norm: str

    def take(self, rows: Array) -> "Ball":
        """Each row's ball."""
        return self if len(self.centre) == 1 else Ball(self.centre[rows], self.radius[rows], self.norm)

    def lifted(self, a: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
        """Rows [R, n] over boxes [1 or R, n]: coefficients a + h, a constant d, and how far off d may be, such that
        <a, x> >= <a + h, x> + d for all x of the ball. What rounding does to a + h is at most U times that."""
        with np.errstate(all="ignore"):
            h = self._tangent(a, low, high)
            h = np.where(np.isfinite(h).all(axis=1, keepdims=True), h, 0.0)
            at, n = h * self.centre, a.shape[1]
            dual = np.abs(h * self.radius)
            most = np.sqrt((dual * dual).sum(axis=1)) if self.norm == L2 else dual.max(axis=1)
            d = -at.sum(axis=1) - most
            return a + h, d, (n + 16) * U * (np.abs(at).sum(axis=1) + most) + TINY

    def narrowed(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Boxes [k, n] around what boxes and the ball have in common; the ends of some entry are crossed only where
        that is nothing."""
        with np.errstate(all="ignore"):
            left, right = self._scaled(low, high)
            near = np.maximum(np.maximum(left, -right), 0.0) * (1 - 8 * U)
            size = near * near if self.norm == L2 else near
            total = size.sum(axis=1, keepdims=True)
            reach = np.maximum(1 - (total - size) + (4 * low.shape[1] + 32) * U * (1 + total), 0.0)
            reach = self.radius * (np.sqrt(reach) if self.norm == L2 else reach) * (1 + 8 * U) + TINY
            reach = reach + 8 * U * (np.abs(self.centre) + reach)
            ends = self.centre - reach, self.centre + reach
            known = (self.radius > 0) & np.isfinite(ends[0]) & np.isfinite(ends[1])
        return np.where(known, np.maximum(low, ends[0]), low), np.where(known, np.minimum(high, ends[1]), high)

    # What follows only chooses h: nothing depends on it but how good bounds are.

    def _scaled(self, low: Array, high: Array) -> tuple[Array, Array]:
        r = np.where(self.radius > 0, self.radius, np.inf)
        return (low - self.centre) / r, (high - self.centre) / r

    def _tangent(self, a: Array, low: Array, high: Array) -> Array:
        """A multiplier times a derivative of the norm where <a, x> is least."""
        b, (left, right) = a * self.radius, self._scaled(low, high)
        if self.norm == L2:
            times = self._sphere(b, left, right)
        else:
            times = self._diamond(b, left, right)
            left, right = np.where(left > 0, 1.0, -1.0), np.where(right < 0, -1.0, 1.0)
        r = np.where(self.radius > 0, self.radius, np.inf)
        return np.clip(-a, times[:, None] * left / r, times[:, None] * right / r)

    def _sphere(self, b: Array, left: Array, right: Array) -> Array:
        """1 / t, where -b t, moved into the box, reaches the sphere."""
        far = np.where(b == 0, np.clip(0.0, left, right), np.where(b > 0, left, right))
        free = (far * far).sum(axis=1) <= 1
        t = 1 / np.maximum(np.sqrt((b * b).sum(axis=1)), 2.0**-1000)
        under, over = np.zeros(len(t)), np.full(len(t), np.inf)
        for _ in range(ROUNDS):
            y = np.clip(-b * t[:, None], left, right)
            moving = (y > left) & (y < right)
            small = (y * y).sum(axis=1) <= 1
            under, over = np.where(small, t, under), np.where(small, over, t)
            fixed, rate = (np.where(some, v * v, 0.0).sum(axis=1) for some, v in ((~moving, y), (moving, b)))
            newton = np.sqrt((1 - fixed) / rate)
            known = np.isfinite(newton) & (newton >= under * (1 - CLOSE)) & (newton <= over * (1 + CLOSE))
            new = np.where(known, newton, np.where(np.isfinite(over), (under + over) / 2, 2 * t))
            settled = free | (np.abs(new - t) <= CLOSE * t)
            t = new
            if settled.all():
                break
        return np.where(free, 0.0, 1 / t)

    def _diamond(self, b: Array, left: Array, right: Array) -> Array:
        """The size of the first entry, in descending order, that does not get to its end."""
        near = np.clip(0.0, left, right)
        room = np.abs(np.where(b == 0, 0.0, np.where(b > 0, left, right) - near))
        order = np.argsort(-np.abs(b), axis=1, kind="stable")
        spent = np.cumsum(np.take_along_axis(room, order, axis=1), axis=1)
        full = spent > np.maximum(1 - np.abs(near).sum(axis=1, keepdims=True), 0.0)
        steep = np.take_along_axis(np.abs(b), order, axis=1)
        return np.where(full.any(axis=1), steep[np.arange(len(b)), full.argmax(axis=1)], 0.0)
