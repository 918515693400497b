"""Lines below and above an elementwise function on an interval: one rule for all of them, no case tables.

For any slope k the best lines are b_low(k) + k t and b_high(k) + k t with the least and greatest value of f(t) - k t on the
interval, and these are met at an end, at a break of f, or where f' = k. Every slope is sound; good ones are tight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from soundly.graph.elementwise import Elementwise


class Lines(NamedTuple):
    """slope_low t + offset_low <= f(t) <= slope_high t + offset_high for lower <= t <= upper, entry by entry."""

    slope_low: Tensor
    offset_low: Tensor
    slope_high: Tensor
    offset_high: Tensor


def offsets(f: Elementwise, lower: Tensor, upper: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of f(t) - slope * t over [lower, upper], widened by rounding.

    Args:
        lower, upper: finite, lower <= upper, inside the function's domain.
        slope: any finite numbers, of the same shape.
    """
    unit = torch.finfo(lower.dtype).eps / 2
    least = torch.full_like(lower, math.inf)
    greatest = -least
    points = [(t, None) for t in (lower, upper, *_stationary(f, lower, upper, slope))]
    points += [(torch.full_like(lower, t), (low, high)) for t, low, high in f.special_points if t in f.breaks]
    for t, near in points:
        inside = (lower <= t) & (t <= upper)
        value = f.apply(t.clamp(lower, upper))
        low, high = (value, value) if near is None else (torch.full_like(value, near[0]), torch.full_like(value, near[1]))
        low, high = f.widen(lower, upper, low, high, unit)
        slack = 4 * unit * (low.abs() + high.abs() + (slope * t).abs())
        least = torch.where(inside, torch.minimum(least, low - slope * t - slack), least)
        greatest = torch.where(inside, torch.maximum(greatest, high - slope * t + slack), greatest)
    return least, greatest


def _stationary(f: Elementwise, lower: Tensor, upper: Tensor, slope: Tensor) -> list[Tensor]:
    """Points of [lower, upper] that include every interior t with f'(t) = slope, to bisection accuracy.

    Between consecutive special points of f' (its turning points and the breaks) f' is monotone, so each such stretch
    holds at most one. Where a stretch holds none, the point returned is some other point of the interval.
    """
    found = []
    period = f.ring.period
    cuts = sorted({*f.breaks, *(t for t, _, _ in f.derivative.special_points)})
    ends = [*cuts, cuts[0] + period] if period else [-math.inf, *cuts, math.inf]
    for left, right in zip(ends, ends[1:], strict=False):
        piece = f.derivative.pieces[sum(t <= left for t in f.breaks)]
        if all(not any(exponents) for exponents, _ in piece):
            continue  # a straight stretch: its ends are breaks
        if period:
            a, b = torch.full_like(lower, left), torch.full_like(lower, right)
        else:
            a, b = lower.clamp(left, right), upper.clamp(left, right)
        rising = f.ring.evaluate(piece, b) >= f.ring.evaluate(piece, a)
        for _ in range(60 if lower.dtype == torch.float64 else 30):
            middle = (a + b) / 2
            go_right = (f.ring.evaluate(piece, middle) < slope) == rising
            a, b = torch.where(go_right, middle, a), torch.where(go_right, b, middle)
        root = (a + b) / 2
        if not period:
            found.append(root.clamp(lower, upper))
            continue
        # In an interval of at most one period: its first occurrence, and the next.
        first = root + period * torch.ceil((lower - root) / period)
        found += [first.clamp(lower, upper), (first + period).clamp(lower, upper), (first - period).clamp(lower, upper)]
    return found


def default_lines(f: Elementwise, lower: Tensor, upper: Tensor) -> Lines:
    """Lines whose slopes are, of a few candidates, those with the tightest value at the middle of the interval.

    The candidates are the chord, the derivative at the middle and at both ends, and zero. For ReLU this gives the usual
    adaptive choice. Where the interval is infinite, or longer than a period, the lines are the bounds of the range.
    """
    least, greatest = f.enclose(lower, upper)
    least, greatest = f.widen(lower, upper, least, greatest, torch.finfo(lower.dtype).eps / 2)
    width = upper - lower
    usable = torch.isfinite(width) & torch.isfinite(least) & torch.isfinite(greatest)
    if f.ring.period:
        usable &= width <= f.ring.period
    a, b = (torch.where(usable, end, _inside(f)) for end in (lower, upper))
    middle = (a + b) / 2
    tiny = b - a <= 1e-6 * torch.maximum(a.abs(), b.abs()).clamp(min=1e-6)
    chord = torch.where(tiny, f.derivative.apply(middle), (f.apply(b) - f.apply(a)) / torch.where(tiny, 1.0, b - a))
    candidates = [torch.zeros_like(a), chord, *(f.derivative.apply(t) for t in (middle, a, b))]
    zero = torch.zeros_like(a)
    best = Lines(zero, torch.where(usable, zero - math.inf, least), zero, torch.where(usable, zero + math.inf, greatest))
    for slope in candidates:
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        low, high = offsets(f, a, b, slope)
        better = usable & (low + slope * middle > best.offset_low + best.slope_low * middle)
        slope_low, offset_low = torch.where(better, slope, best.slope_low), torch.where(better, low, best.offset_low)
        better = usable & (high + slope * middle < best.offset_high + best.slope_high * middle)
        slope_high, offset_high = torch.where(better, slope, best.slope_high), torch.where(better, high, best.offset_high)
        best = Lines(slope_low, offset_low, slope_high, offset_high)
    return best


def _inside(f: Elementwise) -> float:
    """Some point of the function's domain."""
    return 1.0
