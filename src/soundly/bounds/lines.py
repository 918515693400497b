"""Lines around elementwise functions on many intervals at once, good enough to search with.

Where a function is linear on both sides of zero they are exact; elsewhere they come from samples, and from how far the
derivative moves between them. What a search finds with them, its checker proves with lines of its own.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from soundly.bounds.relaxation import Lines
from soundly.graph.elementwise import Elementwise


@cache
def kink(f: Elementwise) -> tuple[float, float] | None:
    """The slopes of a function that is linear on both sides of zero, like ReLU."""
    if f.breaks != (0.0,) or any(len(piece) > 1 for piece in f.pieces):
        return None
    slopes = []
    for piece in f.pieces:
        exponents, c = piece[0] if piece else ((1,), 0.0)
        if exponents[0] != 1 or any(exponents[1:]):
            return None
        slopes.append(float(c))
    return None if any(not isinstance(h, str) and h != 0 for h in f.held) else (slopes[0], slopes[1])


def bent(f: Elementwise, lower: Tensor, upper: Tensor) -> Tensor:
    """Where the function is not one straight line on [lower, upper]."""
    if all(_degree(piece) <= 1 for piece in f.pieces):
        across = torch.zeros_like(lower, dtype=torch.bool)
        for i, t in enumerate(f.breaks):
            across |= (lower < t) & (upper > t) if _continuous(f, i) else (lower <= t) & (upper >= t)
        return across & (lower < upper)
    return lower < upper


def _degree(piece: tuple[tuple[tuple[int, ...], float], ...]) -> int:
    return max((e[0] if not any(e[1:]) else 9 for e, _ in piece), default=0)


@cache
def jumps(f: Elementwise) -> tuple[float, ...]:
    """Where the function jumps, and has one of both sides' values: there a split leaves one side to each half."""
    ends = {t: (low, high) for t, low, high in f.special_points}
    held = f.held or ("left",) * len(f.breaks)
    return tuple(
        t for i, t in enumerate(f.breaks)
        if not _continuous(f, i) and (isinstance(held[i], str) or held[i] in ends[t])
    )  # fmt: skip


@cache
def _continuous(f: Elementwise, i: int) -> bool:
    t = f.breaks[i]
    return any(p[0] == t and p[1] == p[2] for p in f.special_points)


def lines(f: Elementwise, lower: Tensor, upper: Tensor) -> Lines:
    """Of some candidate slopes those whose lines are best at the middle of the interval."""
    if (slopes := kink(f)) is not None:
        left, right = (lower.new_tensor(slope) for slope in slopes)
        best = torch.where(lower + upper > 0, right, left)
        return _kinked(slopes, lower, upper, best, best)
    flat = lower.reshape(-1), upper.reshape(-1)
    return Lines(*(v.reshape(lower.shape) for v in _chosen(f, *flat)))


def lines_of(
    f: Elementwise, lower: Tensor, upper: Tensor, low: Tensor | None, high: Tensor | None, best: Lines | None = None
) -> Lines:
    """Lines of given slopes, of any batch that fits the interval's; exact where the function is straight. The default
    ones (`best`, if they are known already) stay where no slope is given."""
    if (slopes := kink(f)) is not None:
        free = low if slopes[1] >= slopes[0] else high
        return lines(f, lower, upper) if free is None else _kinked(slopes, lower, upper, free, free)
    best = lines(f, lower, upper) if best is None else best
    if low is None and high is None:
        return best
    known = torch.isfinite(best.offset_low) & torch.isfinite(best.offset_high) & bent(f, lower, upper)
    samples = Samples(f, lower, upper)
    result = list(best)
    for k, slope in ((0, low), (1, high)):
        if slope is not None:
            result[2 * k] = torch.where(known, slope, result[2 * k])
            result[2 * k + 1] = torch.where(known, samples.extreme(slope, k)[0], result[2 * k + 1])
    return Lines(*result)


def _kinked(slopes: tuple[float, float], lower: Tensor, upper: Tensor, low: Tensor, high: Tensor) -> Lines:
    """Lines of a function with slopes (left, right) that is 0 at 0: one side is the chord, the other free."""
    left, right = slopes
    across = (lower < 0) & (upper > 0)
    straight = torch.where(lower >= 0, lower.new_tensor(right), lower.new_tensor(left))
    width = torch.where(across, upper - lower, 1.0)
    chord = torch.where(across, (right * upper - left * lower) / width, straight)
    lift = torch.where(across, (left - chord) * lower, 0.0)
    zero = torch.zeros_like(lower)
    if right >= left:
        free = torch.where(across, low.clamp(left, right), straight)
        return Lines(free, zero, chord, lift)
    free = torch.where(across, high.clamp(right, left), straight)
    return Lines(chord, lift, free, zero)


def _chosen(f: Elementwise, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ring = f.ring
    a, b = (end.clamp(ring.lower, ring.upper) for end in (lower, upper))
    least, greatest = f.enclose(lower, upper)
    zero = torch.zeros_like(a)
    result = [zero.clone(), least.clone(), zero.clone(), greatest.clone()]
    sloped = torch.isfinite(b - a) & torch.isfinite(greatest - least) & (greatest > least)
    if ring.period:
        sloped &= b - a <= ring.period
    if bool(sloped.any()):
        p, q = a[sloped], b[sloped]
        middle = (p + q) / 2
        # A thin interval has no chord to speak of.
        thin = q - p <= 1e-9 * torch.maximum(p.abs(), q.abs())
        steps = torch.linspace(0, 1, 9, dtype=p.dtype, device=p.device)[:, None]
        ends = f.apply(p), f.apply(q)
        candidates = [zero[sloped][None], f.derivative.apply(torch.lerp(p, q, steps))]
        candidates.append(((ends[1] - ends[0]) / (q - p))[None])
        for t, low_t, high_t in f.special_points:
            if t in f.breaks:
                inside = (p < t) & (t < q)
                for v in {low_t, high_t}:
                    candidates.append(torch.where(inside, (v - ends[0]) / (t - p), 0.0)[None])
                    candidates.append(torch.where(inside, (ends[1] - v) / (q - t), 0.0)[None])
        k = torch.cat(candidates).nan_to_num(0.0, 0.0, 0.0)
        k = torch.where(thin, k[1], k)
        low, high = sampled_offsets(f, p, q, k)
        best = (low + k * middle).argmax(0, keepdim=True)
        result[0][sloped], result[1][sloped] = k.gather(0, best)[0], low.gather(0, best)[0]
        best = (high + k * middle).argmin(0, keepdim=True)
        result[2][sloped], result[3][sloped] = k.gather(0, best)[0], high.gather(0, best)[0]
    return result[0], result[1], result[2], result[3]


def band(f: Elementwise, lower: Tensor, upper: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of f(t) - slope t over intervals of any shape, infinite where they are."""
    flat = [v.reshape(-1) for v in (lower.clamp(f.ring.lower, f.ring.upper), upper.clamp(max=f.ring.upper))]
    known = torch.isfinite(flat[1] - flat[0])
    p, q = (torch.where(known, v, 0.0) for v in flat)
    least, greatest = sampled_offsets(f, p, q, slope.reshape(1, -1))
    range_low, range_high = (v.reshape(-1) for v in f.enclose(lower, upper))
    known &= torch.isfinite(range_low) & torch.isfinite(range_high)
    return torch.where(known, least[0], -math.inf), torch.where(known, greatest[0], math.inf)


def sampled_offsets(f: Elementwise, lower: Tensor, upper: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest of f(t) - slope t on [lower, upper], for slopes [c, n], from samples. Good enough to
    search with."""
    samples = Samples(f, lower, upper)
    return samples.extreme(slope, 0)[0], samples.extreme(slope, 1)[0]


SEGMENTS = 16


class Samples:
    """A function on intervals, by samples: between two of them it leaves its chord by at most length / 4 times how far
    its derivative moves there, wherever that rises or falls throughout.

    Attributes:
        t: [samples, *shape].
        low, high: f(t), moved by what the segments beside a sample may add.
        slope: the derivative.
        range: the least and greatest value.
        convex, concave: whether the samples look so.
    """

    def __init__(self, f: Elementwise, lower: Tensor, upper: Tensor) -> None:
        share = torch.linspace(0, 1, SEGMENTS + 1, dtype=lower.dtype, device=lower.device)
        share = share.reshape(-1, *(1 for _ in lower.shape))
        t = torch.lerp(lower, upper, share)
        if f.ring.pole == 0 or f.ring.lower == 0:  # steep near 0: steps that grow with t
            growing = lower * (upper / lower) ** share
            t = torch.where((lower > 0) & (upper < math.inf), growing.minimum(upper), t)
        self.slope = f.derivative.apply(t)
        value = f.apply(t)
        rise = self.slope.diff(dim=0)
        self.convex, self.concave = (rise >= 0).all(0), (rise <= 0).all(0)
        turn = rise.abs() * t.diff(dim=0) / 4
        none = torch.zeros_like(value[:1])
        turn = torch.maximum(torch.cat([none, turn]), torch.cat([turn, none]))
        self.low = torch.where(self.concave, value, value - turn)
        self.high = torch.where(self.convex, value, value + turn)
        points = [p for p in f.special_points if p[0] in f.breaks]
        if points:
            at = torch.stack([torch.full_like(lower, p[0]) for p in points])
            inside = (lower <= at) & (at <= upper)
            ends = [torch.stack([torch.full_like(lower, p[k]) for p in points]) for k in (1, 2)]
            self.low = torch.cat([self.low, torch.where(inside, ends[0], math.inf)])
            self.high = torch.cat([self.high, torch.where(inside, ends[1], -math.inf)])
            t = torch.cat([t, torch.where(inside, at, lower)])
        self.t = t
        self.range = f.enclose(lower, upper)

    def extreme(self, slope: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """The least (side 0) or greatest of f(t) - slope t, and a t where it is taken."""
        sign, values = (1, self.low) if side == 0 else (-1, -self.high)
        k = sign * slope
        best = values[0] - k * self.t[0]
        at = self.t[0].expand_as(best)
        for t, v in zip(self.t[1:], values[1:], strict=True):
            now = torch.addcmul(v, k, t, value=-1)
            at = torch.where(now < best, t, at)
            best = torch.minimum(best, now)
        best = torch.where(slope == 0, best.maximum(sign * self.range[side]), best)
        return sign * best, at


def open_sides(f: Elementwise, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Where the lower line, and the upper one, has a choice: above a convex function nothing beats the chord."""
    if (slopes := kink(f)) is not None:
        convex = torch.full_like(lower, slopes[1] >= slopes[0], dtype=torch.bool)
        return convex, ~convex
    if f.breaks:
        both = torch.ones_like(lower, dtype=torch.bool)
        return both, both
    samples = Samples(f, lower, upper)
    return ~samples.concave, ~samples.convex
