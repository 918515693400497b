"""Lines below and above an elementwise function on an interval: one rule for all of them, no case tables.

For any slope k the best lines are k t + (least of f(t) - k t) and k t + (greatest of f(t) - k t). Between its breaks
and the turning points of f' a function is convex or concave: there one extreme lies at an end, and the other is bounded
by tangents, wherever they touch. So finding f' = k is a matter of tightness, not of soundness.

Every slope is sound; the default is best at the middle of the interval. All is computed in float64, rounded outward.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from soundly.errors import MissingRule
from soundly.graph.elementwise import Elementwise
from soundly.graph.ring import Polynomial

_UNIT = 2.0**-53
_HALVINGS = 28  # of a stretch; the tangents' error is quadratic in what remains
_SAMPLES, _ROUNDS = 8, 4  # of a curved function on each side of the middle, to choose its slopes
_ROOM = 0.999  # how far towards the middle they go
_FAR = 2.0**20  # beyond which the position within a period is no longer known well


class Lines(NamedTuple):
    """slope_low t + offset_low <= f(t) <= slope_high t + offset_high for lower <= t <= upper, entry by entry."""

    slope_low: Tensor
    offset_low: Tensor
    slope_high: Tensor
    offset_high: Tensor


class _Stretches(NamedTuple):
    """The stretches of one piece: where each begins and ends, and +1 where it is convex, -1 concave, 0 straight."""

    piece: Polynomial
    slope: Polynomial
    left: tuple[float, ...]
    right: tuple[float, ...]
    bend: tuple[int, ...]


@cache
def _stretches(f: Elementwise) -> tuple[_Stretches, ...]:
    """The function cut where it breaks, has a pole, or its derivative turns; one period of periodic ones."""
    ring = f.ring
    poles = () if ring.pole is None else (ring.pole,)
    cuts = sorted({*f.breaks, *poles, *(t for t, _, _ in f.derivative.special_points)})
    if ring.period:
        first = cuts[0] if cuts else 0.0
        ends = [*(cuts or [first]), first + ring.period]
    else:
        ends = [ring.lower, *(t for t in cuts if ring.lower < t < ring.upper), ring.upper]
    found: dict[tuple[Polynomial, bool], list[tuple[float, float, int]]] = {}
    for left, right in pairwise(ends):
        piece = f.pieces[sum(t <= left for t in f.breaks)]
        bend = _bend(f, ring.derivative(ring.derivative(piece)), left, right)
        found.setdefault((piece, bend == 0), []).append((left, right, bend))
    return tuple(_Stretches(p, ring.derivative(p), *zip(*parts, strict=True)) for (p, _), parts in found.items())


def _bend(f: Elementwise, curvature: Polynomial, left: float, right: float) -> int:
    """The sign of f'' between two neighbouring zeros of it, 0 if it vanishes identically."""
    if not curvature:
        return 0
    first = left if math.isfinite(left) else min(right, 2.0) - 4.0
    last = right if math.isfinite(right) else first + 4.0
    inside = torch.linspace(first, last, 17, dtype=torch.float64)[1:-1]
    values = f.ring.evaluate(curvature, inside)
    largest = float(values[values.abs().argmax()])
    if largest == 0 or not math.isfinite(largest):
        raise MissingRule(f"{f} does not say whether it is convex or concave between {left:g} and {right:g}.")
    return 1 if largest > 0 else -1


def straight(f: Elementwise, lower: Tensor, upper: Tensor) -> Tensor:
    """Where f is known to be affine on the whole interval, so that its lines are exact whatever the ends."""
    found = torch.zeros_like(lower, dtype=torch.bool)
    for part in () if f.ring.period else _stretches(f):
        for left, right, bend in zip(part.left, part.right, part.bend, strict=True):
            if bend == 0:
                found |= (left <= lower) & (upper <= right)
    return found


def offsets(f: Elementwise, lower: Tensor, upper: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds, from below and from above, of f(t) - slope * t over [lower, upper]: as tight as rounding allows.

    Args:
        lower, upper: finite, lower <= upper, meeting the function's domain, without a pole between them; at most a
            period long.
        slope: any finite numbers, of the same shape or with further dimensions before it.

    Returns:
        least, greatest of the shape and type of `slope`; infinite where overflow leaves nothing known. At a jump both
        sides count. Points outside the domain are left out.
    """
    a, b = (end.double().reshape(1, 1, -1) + 0.0 for end in (lower, upper))  # -0.0 is 0
    k = slope.double().reshape(1, -1, a.shape[2])
    least, greatest = torch.full_like(k, math.inf), torch.full_like(k, -math.inf)
    for part in _stretches(f):
        left, right, bend = (
            torch.tensor(v, dtype=torch.float64, device=k.device).reshape(-1, 1, 1)
            for v in (part.left, part.right, part.bend)
        )
        if f.ring.period:
            # The last beginning before the interval, and the next.
            first = left + f.ring.period * torch.floor((a - left) / f.ring.period)
            left, right = torch.cat([first, first + f.ring.period]), (right - left).repeat(2, 1, 1)
            right, bend = left + right, bend.repeat(2, 1, 1)
        met = (a <= right) & (b >= left)
        low, high = _extremes(f, part, a.clamp(left, right), b.clamp(left, right), bend, k)
        least = torch.minimum(least, torch.where(met, low, math.inf).amin(0))
        greatest = torch.maximum(greatest, torch.where(met, high, -math.inf).amax(0))
    for t, low_t, high_t in f.special_points:
        if t in f.breaks:  # where it may have a value of its own
            met, slack = (a <= t) & (b >= t), 8 * _UNIT * (abs(low_t) + abs(high_t) + (k * t).abs())
            least = torch.where(met, torch.minimum(least, low_t - k * t - slack), least)
            greatest = torch.where(met, torch.maximum(greatest, high_t - k * t + slack), greatest)
    least = least.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    greatest = greatest.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    return outward(least.reshape(slope.shape), -1, slope.dtype), outward(greatest.reshape(slope.shape), 1, slope.dtype)


def _extremes(f: Elementwise, part: _Stretches, a: Tensor, b: Tensor, bend: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of g = f - k t over each [a, b], inside one stretch; all broadcast to [stretch, slope, n]."""
    lost = _lost(f)

    def value(t: Tensor) -> tuple[Tensor, Tensor]:
        v = f.ring.evaluate(part.piece, t)
        low, high = f.widen(t, t, v, v, _UNIT)
        slack = 8 * _UNIT * (v.abs() + (k * t).abs()) + lost
        return low - k * t - slack, high - k * t + slack

    (low_a, high_a), (low_b, high_b) = value(a), value(b)
    if not any(part.bend):
        return torch.minimum(low_a, low_b), torch.maximum(high_a, high_b)

    def slopes(t: Tensor) -> tuple[Tensor, Tensor]:
        d = f.ring.evaluate(part.slope, t)
        low, high = f.derivative.widen(t, t, d, d, _UNIT)
        slack = 8 * _UNIT * (d.abs() + k.abs()) + lost
        return _turned(low - k - slack, high - k + slack, bend)

    p, q, _ = torch.broadcast_tensors(a, b, k)
    for _ in range(_HALVINGS):
        middle = (p + q) / 2
        on_the_right = (f.ring.evaluate(part.slope, middle) < k) == (bend > 0)
        p, q = torch.where(on_the_right, middle, p), torch.where(on_the_right, q, middle)
    # h = g or -g is convex: it lies above its tangents in p and in q, left of p, right of q, and between them.
    (h_p, _), (h_q, _) = _turned(*value(p), bend), _turned(*value(q), bend)
    (falls_p, rises_p), (falls_q, rises_q) = slopes(p), slopes(q)
    between = torch.maximum(h_p - _drop(-falls_p, q - p), h_q - _drop(rises_q, q - p))
    least = torch.minimum(between, torch.minimum(h_p - _drop(rises_p, p - a), h_q - _drop(-falls_q, b - q)))
    (_, h_a), (_, h_b) = _turned(low_a, high_a, bend), _turned(low_b, high_b, bend)
    return _turned(least, torch.maximum(h_a, h_b).expand_as(least), bend)


def _lost(f: Elementwise) -> float:
    """What underflow may cost."""
    return 0.0 if f.exact else f.underflow * torch.finfo(torch.float64).tiny


def _turned(low: Tensor, high: Tensor, bend: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of g as bounds of g where it is convex and of -g where it is concave; or back."""
    return torch.where(bend > 0, low, -high), torch.where(bend > 0, high, -low)


def _drop(slope: Tensor, length: Tensor) -> Tensor:
    """How far a tangent that falls at most that steeply can fall over a length; infinite where nothing is known."""
    drop = slope.clamp(min=0) * length * (1 + 8 * _UNIT)
    return torch.where(length > 0, drop, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def outward(x: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """x in another type, rounded down (side -1) or up."""
    if dtype == torch.float64:
        return x
    rounded = x.to(dtype)
    beyond = torch.nextafter(rounded, torch.full_like(rounded, side * math.inf))
    return torch.where(side * rounded.double() < side * x, beyond, rounded)


def default_lines(f: Elementwise, lower: Tensor, upper: Tensor) -> Lines:
    """Lines that are as tight as possible at the middle of the interval; for ReLU the usual adaptive choice.

    Where the interval is infinite, longer than a period or not inside one branch of the function, the lines are the
    bounds of its range: infinite where it is unknown, never NaN.
    """
    dtype, ring = lower.dtype, f.ring
    a, b = (end.double().clamp(ring.lower, ring.upper) for end in (lower, upper))
    least, greatest = f.widen(a, b, *f.enclose(lower.double(), upper.double()), _UNIT)
    lost = _lost(f)
    least = (least - lost).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    greatest = (greatest + lost).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    lines = Lines(torch.zeros_like(a), least, torch.zeros_like(a), greatest)
    sloped = torch.isfinite(b - a) & torch.isfinite(greatest - least) & (greatest - least > 4 * lost)
    if ring.period:
        sloped &= (b - a <= ring.period) & (torch.maximum(a.abs(), b.abs()) <= _FAR)
    if bool(sloped.any()):
        a, b, least, greatest = a[sloped], b[sloped], least[sloped], greatest[sloped]
        middle = a / 2 + b / 2
        slopes = _slopes(f, a, b, middle)
        slopes = slopes.to(dtype).nan_to_num(0.0, 0.0, 0.0).double()
        low, high = offsets(f, a, b, slopes)
        low, high = low[0], high[1]
        better = (low + slopes[0] * middle > least, high + slopes[1] * middle < greatest)
        lines.slope_low[sloped] = torch.where(better[0], slopes[0], 0.0)
        lines.offset_low[sloped] = torch.where(better[0], low, least)
        lines.slope_high[sloped] = torch.where(better[1], slopes[1], 0.0)
        lines.offset_high[sloped] = torch.where(better[1], high, greatest)
    return Lines(
        lines.slope_low.to(dtype),
        outward(lines.offset_low, -1, dtype),
        lines.slope_high.to(dtype),
        outward(lines.offset_high, 1, dtype),
    )


def _slopes(f: Elementwise, a: Tensor, b: Tensor, middle: Tensor) -> Tensor:
    """[2, n]: the slopes, at the middle, of the convex and of the concave envelope of samples and special points."""
    special = () if f.ring.period else f.special_points
    curved = any(any(part.bend) for part in _stretches(f))
    spread = torch.linspace(-2, 2, _SAMPLES, dtype=torch.float64, device=a.device)[:, None]
    near, far = torch.lerp(a, middle, _ROOM), torch.lerp(b, middle, _ROOM)
    found = []
    for sign, value in ((1, 1), (-1, 2)):
        at = [torch.full_like(a, t).where((a <= t) & (t <= b), math.nan) for t, _, _ in special]
        fixed = [torch.full_like(a, sign * point[value]) for point in special]
        p, q, reach = (a + middle) / 2, (b + middle) / 2, (b - a) / 8
        for _ in range(_ROUNDS if curved else 1):
            sides = []
            for end, centre, low, high in ((a, p, a, near), (b, q, far, b)):
                t = torch.cat([end[None], (centre + reach * spread).clamp(low, high)]) if curved else end[None]
                values = torch.cat([sign * f.apply(t), *(v[None] for v in fixed)])
                sides.append((torch.cat([t, *(u[None] for u in at)]), values))
            slope, p, q = _lowest(sides[0], sides[1], middle)
            reach = reach * 4 / _SAMPLES  # look closer at the ends of the best line
        found.append(sign * slope)
    thin = b - a <= 1e-6 * torch.maximum(a.abs(), b.abs())  # where quotients drown in rounding
    return torch.where(thin, f.derivative.apply(middle), torch.stack(found))


def _lowest(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all lines from a point (t, value) on the left to one on the right, that lowest in the middle: slope, ends."""
    (t, v), (u, w) = left, right
    slope = (w - v[:, None]) / (u - t[:, None])
    height = v[:, None] + slope * (middle - t[:, None])
    possible = (t <= middle)[:, None] & (middle <= u) & (t[:, None] < u) & torch.isfinite(height)
    best = torch.where(possible, height, math.inf).flatten(0, 1).argmin(0, keepdim=True)
    i, j = best // len(u), best % len(u)
    return slope.flatten(0, 1).gather(0, best)[0], t.gather(0, i)[0], u.gather(0, j)[0]
