"""The point of a polyhedron {lower <= rows d <= upper} nearest to the origin, by two active-set methods on the dual.

At the optimum d = rows[active].T @ multipliers, so all the work is to find which rows are active. `guess_active`
exchanges whole sets of rows and is right within a few rounds on most problems, but it may cycle. `nearest_point`
starts from any guess, changes one row at a time, raises the distance with each change and therefore ends: at the
optimum, or with a Farkas certificate that there is no point. Rows are unit vectors here; tolerances are relative to
the length of the point.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import qr, qr_delete, solve_triangular
from torch import Tensor

Array = NDArray[Any]

FEASIBLE = 1e-13  # a row is violated when it is missed by more than this, relative to the length of the point
ACCEPTED = 1e-9  # the largest relative violation with which a point may still be called optimal
DEPENDENT = 1e-13  # a row this close to the span of others, in units of its coefficients there, counts as dependent
EMPTY_RADIUS = 1e6  # "infeasible" excludes all points up to this many times the distance of the farthest single row
PATIENCE = 8  # rounds of whole-set exchange without fewer wrong rows before it is given up
STALLED = 50  # single exchanges without progress above rounding before giving up
POOL = 256  # of the violated rows, those from which the next ones to enter are chosen until none of them is violated


@dataclass(frozen=True)
class Nearest:
    """What `nearest_point` found.

    Attributes:
        point: the last iterate [n]; None if there is no point. It is the nearest point of the polyhedron that the
            active rows alone describe, so its length bounds the distance from below whether or not the others hold.
        side: per row [m], 1 where its lower end is active, -1 where its upper end is, 0 elsewhere.
        multipliers: per row [m], with point = rows.T @ multipliers; nonnegative on lower ends, nonpositive on upper
            ends of rows with two different ends; zeros if there is no point.
        certificate: if there is no point, y [m] with rows.T @ y = 0 up to rounding although y asks for more than 0: the
            sum of y_i lower_i over y_i > 0 and of y_i upper_i over y_i < 0 is positive. None if there is a point.
        finished: False when time or numerical accuracy ran out before either answer.
        steps: rounds of both methods.
    """

    point: Array | None
    side: Array
    multipliers: Array
    certificate: Array | None
    finished: bool
    steps: int


def nearest_point(
    rows: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    side: Tensor | None = None,
    noise: Tensor | None = None,
    deadline: float = np.inf,
) -> Nearest:
    """Find the point nearest to the origin with lower <= rows d <= upper, or prove that there is none.

    The dual active-set method with orthogonal factors of the active rows. It needs no regularity: repeated, opposite
    and dependent rows are exchanged without moving the point. The active rows are independent, so the support of a
    certificate is a circuit: leave out any of its rows and the others are consistent.

    Args:
        rows: unit rows [m, n], float64; products with them run on their device, the factors are kept on the CPU.
        lower, upper: ends [m], lower <= upper, infinite where there is none.
        side: rows to start from, as in `Nearest.side`.
        noise: relative error of each row [m] in units of a float64 rounding, at least 1; 1 if None. Rows that are
            dependent up to their noise count as dependent.
        deadline: value of `time.monotonic()` after which to stop.

    Reference: Goldfarb, Idnani, "A numerically stable dual method for solving strictly convex quadratic programs",
    Mathematical Programming 27, 1983.
    """
    nothing = torch.zeros(len(rows), dtype=torch.int8, device=rows.device)
    start, rounds = guess_active(rows, lower, upper, nothing if side is None else side, deadline)
    a, low, high = rows.cpu().numpy(), lower.cpu().numpy(), upper.cpu().numpy()
    m, n = a.shape
    free = low == high  # the multiplier of an equality has either sign
    unit = max(0.0, float(np.max(low, initial=0.0)), float(np.max(-high, initial=0.0)))
    active = _Active(a, low, high, start.cpu().numpy(), np.ones(m) if noise is None else noise.cpu().numpy())
    active.restart()
    skip = np.zeros(m, dtype=bool)  # dependent rows that are missed by too little to prove anything
    best, stalled, fresh = -1.0, 0, True
    pool, packed = np.zeros(0, dtype=np.int64), a[:0]

    def missing(index: Array | slice, part: Array) -> Array:
        """By how much the point misses rows; 0 for those that are active or to be skipped."""
        value = part @ point
        excess = np.maximum(low[index] - value, value - high[index])
        excess[(active.side[index] != 0) | skip[index]] = 0.0
        return excess

    for step in range(rounds + 1, rounds + 20 * (m + n) + 100):
        point, multipliers = active.solve()
        length = float(np.linalg.norm(point))
        excess = missing(pool, packed)
        if not float(np.max(excess, initial=0.0)) > FEASIBLE * max(length, unit):
            excess = missing(slice(None), a)
            pool = np.argsort(-excess)[:POOL]
            pool = pool[excess[pool] > 0]
            packed, excess = a[pool], excess[pool]
        late = time.monotonic() > deadline or stalled > STALLED
        if late or not float(np.max(excess, initial=0.0)) > FEASIBLE * max(length, unit):
            if not fresh and not late:
                active.restart()  # fresh factors: the answer must not carry the rounding of a long run of updates
                pool, packed, fresh = pool[:0], a[:0], True
                continue
            value = a @ point
            missed = float(np.max(np.maximum(low - value, value - high), initial=0.0))
            finished = missed <= ACCEPTED * max(length, unit)
            return Nearest(point, active.side, active.spread(multipliers), None, finished, step)
        stalled, best = (0, length) if length > best * (1 + 1e-14) else (stalled + 1, best)
        worst, most = int(pool[np.argmax(excess)]), float(np.max(excess))
        sign = 1 if float(a[worst] @ point) < low[worst] else -1
        certificate = active.enter(worst, sign, most, multipliers, free)
        fresh = False
        if certificate is None:
            continue
        if excludes(certificate, a, low, high, radius=EMPTY_RADIUS * unit):
            return Nearest(None, active.side, np.zeros(m), certificate, True, step)
        skip[worst] = True
        active.restart()
    return Nearest(point, active.side, active.spread(multipliers), None, False, step)


class _Active:
    """The active rows, linearly independent, with factors a[index].T = q @ r, q.T @ q = 1, r upper triangular."""

    def __init__(self, a: Array, low: Array, high: Array, side: Array, noise: Array) -> None:
        self.a, self.low, self.high, self.side, self.noise = a, low, high, side.astype(np.int64), noise
        self.buffer = np.empty((0, a.shape[1]))

    def restart(self) -> None:
        """Factorise afresh; drop rows until the rest is independent and every multiplier has the sign of its side."""
        self.index = np.flatnonzero(self.side)
        while True:
            self.q, self.r, order = qr(self.a[self.index].T, mode="economic", pivoting=True, check_finite=False)
            blurred = 10 * DEPENDENT * np.max(self.noise[self.index], initial=1.0)
            rank = int(np.count_nonzero(np.abs(np.diag(self.r)) > blurred))
            self.index, self.q, self.r = self.index[order[:rank]], self.q[:, :rank], self.r[:rank, :rank]
            _, multipliers = self.solve()
            signed = multipliers * self.side[self.index]
            keep = (signed >= -1e-13 * np.max(np.abs(signed), initial=0.0)) | (self.low == self.high)[self.index]
            if keep.all():
                break
            self.index = self.index[keep]
        self.side[np.setdiff1d(np.flatnonzero(self.side), self.index)] = 0

    def append(self, direction: Array) -> None:
        """One more column of q, in a buffer that has room for more."""
        rank = self.q.shape[1]
        if self.buffer.shape[0] <= rank or not np.may_share_memory(self.q, self.buffer):
            self.buffer = np.empty((rank + rank // 4 + 16, len(direction)))
            self.buffer[:rank] = self.q.T
        self.buffer[rank] = direction
        self.q = self.buffer[: rank + 1].T

    def solve(self) -> tuple[Array, Array]:
        """The nearest point at which all active rows hold with equality, and its multipliers."""
        target = np.where(self.side[self.index] > 0, self.low[self.index], self.high[self.index])
        along = solve_triangular(self.r, target, trans="T", check_finite=False)
        return self.q @ along, solve_triangular(self.r, along, check_finite=False)

    def enter(self, row: int, sign: int, excess: float, multipliers: Array, free: Array) -> Array | None:
        """Raise the multiplier of a violated row until it holds, dropping rows whose multipliers reach zero on the way.

        Returns a Farkas certificate if the row depends on active rows none of which gives way; else None.
        """
        while True:
            normal = sign * self.a[row]
            inside = self.q.T @ normal
            outside = normal - self.q @ inside
            if np.linalg.norm(outside) < 0.7:  # cancellation: orthogonalise once more ("twice is enough")
                again = self.q.T @ outside
                inside, outside = inside + again, outside - self.q @ again
            distance = float(np.linalg.norm(outside))
            rate = solve_triangular(self.r, inside, check_finite=False)
            side = self.side[self.index]
            shrinking = (rate * side > 1e-13 * np.max(np.abs(rate), initial=0.0)) & ~free[self.index]
            ratio = np.full(len(rate), np.inf)
            ratio[shrinking] = np.maximum(multipliers * side, 0.0)[shrinking] / (rate * side)[shrinking]
            dependent = distance <= DEPENDENT * (self.noise[row] + np.abs(rate) @ self.noise[self.index])
            full = np.inf if dependent else excess / distance**2
            blocking = int(np.argmin(ratio)) if len(ratio) else -1
            if blocking < 0 or full <= ratio[blocking]:
                break
            multipliers = multipliers - ratio[blocking] * rate
            excess -= 0.0 if dependent else ratio[blocking] * distance**2
            self.side[self.index[blocking]] = 0
            rank = len(self.index) - 1
            self.index, multipliers = np.delete(self.index, blocking), np.delete(multipliers, blocking)
            q, r = qr_delete(self.q, self.r, blocking, which="col", overwrite_qr=True, check_finite=False)
            self.q, self.r = q[:, :rank], r[:rank, :rank]
        if full == np.inf:
            certificate = np.zeros(len(self.side))
            certificate[row] = sign
            certificate[self.index] = np.where(np.abs(rate) > 1e-12 * np.max(np.abs(rate), initial=0.0), -rate, 0.0)
            return certificate
        self.append(outside / distance)
        grown = np.zeros((len(rate) + 1, len(rate) + 1), order="F")
        grown[:-1, :-1], grown[:-1, -1], grown[-1, -1] = self.r, sign * inside, sign * distance
        self.r, self.index, self.side[row] = grown, np.append(self.index, row), sign
        return None

    def spread(self, multipliers: Array) -> Array:
        """The multipliers of the active rows as an array over all rows."""
        whole = np.zeros(len(self.side))
        whole[self.index] = multipliers
        return whole


def excludes(
    y: Array, rows: Array, lower: Array, upper: Array, *, radius: float, norm: Literal["l2", "linf"] = "l2"
) -> bool:
    """Whether multipliers y [m] prove that no d of norm at most `radius` has lower <= rows d <= upper.

    Such a d has (y rows) d >= gap, the sum of y_i times the end its sign asks for, but (y rows) d <= |y rows|* radius
    in the dual norm. Both sides are rounded against the claim; a gap that is not finite proves nothing.
    """
    used = y != 0
    terms = y[used] * np.where(y > 0, lower, upper)[used]
    dual = float(np.linalg.norm(y[used] @ rows[used], 2 if norm == "l2" else 1))
    rounding = np.finfo(float).eps * len(y) * float(np.abs(y).sum()) * (1.0 if norm == "l2" else np.sqrt(rows.shape[1]))
    gap = float(terms.sum()) - np.finfo(float).eps * len(y) * float(np.abs(terms).sum())
    return bool(np.isfinite(gap) and gap > (dual + rounding) * radius)


def guess_active(rows: Tensor, lower: Tensor, upper: Tensor, side: Tensor, deadline: float) -> tuple[Tensor, int]:
    """Guess the active rows by exchanging all wrong ones at once (primal-dual active set).

    Each round solves for the multipliers of the present set, lets go of those with the wrong sign and takes in all
    violated rows. The matrix is regularised, so dependent rows are no obstacle, and the answer is only a guess.

    Returns:
        side [m] as in `Nearest.side` (the argument itself if the rounds lead nowhere), and the number of rounds.

    Reference: Hintermueller, Ito, Kunisch, "The primal-dual active set strategy as a semismooth Newton method",
    SIAM Journal on Optimization 13, 2002.
    """
    gram, start, value = _Gram(rows), side, torch.zeros_like(lower)
    small = 1e-11 * float(torch.maximum(lower, -upper).clamp(min=0).max()) if len(rows) else 0.0
    fewest, patience, rounds = 2 * len(rows) + 1, PATIENCE, 0
    index = side.nonzero().squeeze(1)
    wrong = torch.zeros(len(index), dtype=torch.bool, device=rows.device)
    while True:
        entering = ((lower - value > small).to(torch.int8) - (value - upper > small).to(torch.int8)) * (side == 0)
        count = int(wrong.sum()) + int(entering.count_nonzero())
        if count == 0 and (rounds > 0 or len(index) == 0):
            return side, rounds
        patience = PATIENCE if count < fewest else patience - 1
        fewest = min(fewest, count)
        side = side + entering
        side[index[wrong]] = 0
        index = side.nonzero().squeeze(1)
        if patience == 0 or len(index) > rows.shape[1] or time.monotonic() > deadline:
            return start, rounds
        rounds += 1
        square = gram.block(index)
        square.diagonal().add_(1e-9)
        factor, failed = torch.linalg.cholesky_ex(square)
        if failed:
            return start, rounds
        target = torch.where(side > 0, lower, upper)[index]
        multipliers = torch.cholesky_solve(target[:, None], factor).squeeze(1)
        wrong = (multipliers * side[index] < 0) & (lower != upper)[index]
        value = rows @ (multipliers @ rows[index])


class _Gram:
    """Inner products of rows, computed when first asked for."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.known = torch.zeros(0, dtype=torch.long, device=rows.device)
        self.place = torch.full((len(rows),), -1, dtype=torch.long, device=rows.device)
        self.matrix = rows.new_zeros(0, 0)

    def block(self, index: Tensor) -> Tensor:
        """The inner products [k, k] among the rows of `index` [k], as a new tensor."""
        new = index[self.place[index] < 0]
        if len(new):
            cross = self.rows[self.known] @ self.rows[new].T
            own = self.rows[new] @ self.rows[new].T
            self.matrix = torch.cat([torch.cat([self.matrix, cross], 1), torch.cat([cross.T, own], 1)])
            self.place[new] = torch.arange(len(self.known), len(self.known) + len(new), device=self.rows.device)
            self.known = torch.cat([self.known, new])
        place = self.place[index]
        return self.matrix[place][:, place]
