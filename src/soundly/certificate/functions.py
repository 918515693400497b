"""Elementwise functions for the checker: ranges and lines over intervals, rigorous, and without finding a single root.

A function is piecewise a polynomial over a ring. Affine pieces are bounded at their ends. Curved ones are cut into
segments; on a segment around m, f(t) - k t >= f(m) - k m + s (t - m) + c (t - m)^2 / 2 with enclosures of s = f'(m) - k
and of c <= f'' from interval arithmetic. Functions that are linear on both sides of zero have a closed form.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from soundly.certificate.rings import FAR, TINY, Enclosure, Polynomial, Ring, U

Array = npt.NDArray[Any]
Sides = tuple[Array, Array]
"""Of intervals: where the lower end, and the upper one, belongs to the piece inside alone."""

ENTRIES = 2**10  # curved functions are bounded for so many entries at once
SEGMENTS, PARTS, ROUNDS = 8, 4, 20  # at first, of the worst segment, and how often that is cut
ENOUGH = 2.0**-10  # of what a function's excess over a line varies by: a bound that is so near the truth is not cut


@dataclass(frozen=True, eq=False)
class Function:
    """A function of one number, piecewise polynomial over a ring.

    Attributes:
        pieces: one polynomial between consecutive breaks.
        breaks: increasing.
        held: values of its own at breaks, NaN where one of the neighbouring pieces has the say.
        say: which one that is: -1 the left one, 1 the right one; empty if nobody knows.
    """

    ring: Ring
    pieces: tuple[Polynomial, ...]
    breaks: tuple[float, ...] = ()
    held: tuple[float, ...] = ()
    say: tuple[int, ...] = ()
    slopes: tuple[Polynomial, ...] = field(init=False)
    bends: tuple[Polynomial, ...] = field(init=False)

    def __post_init__(self) -> None:
        slopes = tuple(map(self.ring.derivative, self.pieces))
        object.__setattr__(self, "slopes", slopes)
        object.__setattr__(self, "bends", tuple(map(self.ring.derivative, slopes)))

    @cached_property
    def affine(self) -> tuple[tuple[float, float] | None, ...]:
        """Slope and offset of each piece, None if it is curved."""
        return tuple(map(_affine, self.pieces))

    @cached_property
    def ends(self) -> tuple[tuple[float, float, bool, bool], ...]:
        """Of each piece: left and right end, and whether f is continuous there beyond doubt."""
        whole = [False] * len(self.breaks)
        for i, t in enumerate(self.breaks):
            left, right = self.affine[i], self.affine[i + 1]
            if left and right:
                values = [Fraction(k) * Fraction(t) + Fraction(d) for k, d in (left, right)]
                own = [] if math.isnan(self.held[i]) else [Fraction(self.held[i])]
                whole[i] = len({*values, *own}) == 1
        points = (-math.inf, *self.breaks, math.inf)
        sides = zip(pairwise(points), pairwise([True, *whole, True]), strict=True)
        return tuple((left, right, *closed) for (left, right), closed in sides)

    def sides(self, t: float) -> set[int]:
        """Whose value f has at t beyond doubt: that of the piece on the left (-1), on the right (1), or of both."""
        if t not in self.breaks or self.ends[i := self.breaks.index(t)][3]:
            return {-1, 1}
        own = self.held[i]
        if math.isnan(own):
            return {self.say[i]} if self.say else set()
        lines = {-1: self.affine[i], 1: self.affine[i + 1]}
        return {
            side for side, line in lines.items()
            if line is not None and Fraction(line[0]) * Fraction(t) + Fraction(line[1]) == Fraction(own)
        }  # fmt: skip

    def sample(self, polynomials: Sequence[Polynomial], t: Array) -> Array:
        """Values, roughly, of one polynomial for each piece."""
        result = np.full(t.shape, np.nan)
        for p, (a, b, _, _) in zip(polynomials, self.ends, strict=True):
            some = t <= b if a == -math.inf else (t > a) & (t <= b)
            line = _affine(p)
            if line is not None:
                np.copyto(result, line[0] * t + line[1] if line[0] else line[1], where=some)
            elif some.any():
                result[some] = _mean(self.ring.enclose(p, t[some], t[some]))
        return result

    def straight(self, lower: Array, upper: Array, sides: Sides | None = None) -> Array:
        """The number of the affine piece that f is on all of [lower, upper], or -1."""
        found = np.full(lower.shape, -1)
        after, before = (False, False) if sides is None else sides
        for i, (a, b, closed_a, closed_b) in enumerate(self.ends):
            if self.affine[i] is not None:
                left = lower >= a if closed_a else (lower > a) | (after & (lower == a))
                right = upper <= b if closed_b else (upper < b) | (before & (upper == b))
                found[left & right] = i
        return found

    @cached_property
    def kink(self) -> tuple[float, float] | None:
        """Left and right slope of a function that is linear on both sides of 0, and 0 there."""
        if self.breaks != (0.0,) or any(line is None or line[1] != 0 for line in self.affine):
            return None
        (left, _), (right, _) = (line for line in self.affine if line is not None)
        return (left, right) if math.isnan(self.held[0]) or self.held[0] == 0 else None

    def range(self, lower: Array, upper: Array, sides: Sides | None = None) -> Enclosure:
        """Bounds of f over each [lower, upper]; infinite where nothing is known, never NaN."""
        zero = np.zeros(lower.shape)
        return self.least(lower, upper, zero, sides=sides), -self.least(lower, upper, zero, sign=-1, sides=sides)

    def least(self, lower: Array, upper: Array, slope: Array, sign: int = 1, sides: Sides | None = None) -> Array:
        """A lower bound of sign * (f(t) - slope t) over each [lower, upper], at jumps with both sides, except at ends
        that belong to one; never NaN."""
        slope = slope.reshape(-1)
        parts = [over.least(slope[part], sign) for part, over in self._over(lower, upper, sides)]
        return np.concatenate([np.zeros(0), *parts]).reshape(lower.shape)

    def _over(self, lower: Array, upper: Array, sides: Sides | None) -> Iterator[tuple[slice, "_Over"]]:
        lower, upper = lower.reshape(-1), upper.reshape(-1)
        flat = None if sides is None else (sides[0].reshape(-1), sides[1].reshape(-1))
        for begin in range(0, len(lower), ENTRIES):
            part = slice(begin, begin + ENTRIES)
            yield part, _Over(self, lower[part], upper[part], _some(flat, part))

    def lines(
        self,
        lower: Array,
        upper: Array,
        low: Array | None = None,
        high: Array | None = None,
        sides: Sides | None = None,
    ) -> "Lines":
        """k, b, K, B with k t + b <= f(t) <= K t + B for t in each [lower, upper].

        Args:
            lower, upper: any shape.
            low, high: slopes to use, NaN or None where the default is wanted; ignored where the line is exact or f
                unbounded, and where f is linear on both sides of 0 for the side on which the chord is best.
            sides: at ends where these say so, f counts as the piece inside, closed.
        """
        if self.kink is not None:
            return self._kinked(self.kink, lower, upper, low, high)
        return self._lines(lower, upper, low, high, sides, False)[0]

    def follow(self, lower: Array, upper: Array, sides: Sides | None = None) -> tuple[Enclosure, "Lines", "Band"]:
        """The range, the default lines, and bounds of f(t) - k t: k is the slope of the upper line, or of the chord
        of a function that is linear on both sides of 0."""
        if self.kink is None:
            lines, *others = self._lines(lower, upper, None, None, sides, True)
            low, high, floor = others
            return (low, high), lines, Band(lines.above, floor, lines.above_offset)
        lines = self._kinked(self.kink, lower, upper, None, None)
        left, right = self.kink
        ends = []
        with np.errstate(all="ignore"):
            for t in (lower, upper):
                value = np.where(t >= 0, right * t if right else 0.0, left * t if left else 0.0)
                slack = 0.0 if {left, right} <= {-1.0, 0.0, 1.0} else 2 * U * np.abs(value) + TINY
                ends.append((value - slack, value + slack))
        low, high = np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])
        across = (lower < 0) & (upper > 0)
        low, high = np.where(across, np.minimum(low, 0.0), low), np.where(across, np.maximum(high, 0.0), high)
        # One of the lines is the chord; the other one goes through 0, so in 0 the function is farthest from the chord.
        zero = np.zeros(lower.shape)
        if right < left:
            return (low, high), lines, Band(lines.below, lines.below_offset, zero)
        return (low, high), lines, Band(lines.above, zero, lines.above_offset)

    def _kinked(
        self, slopes: tuple[float, float], lower: Array, upper: Array, low: Array | None, high: Array | None
    ) -> "Lines":
        left, right = slopes
        least, greatest = min(slopes), max(slopes)
        free = low if right >= left else high
        with np.errstate(all="ignore"):
            across = (lower < 0) & (upper > 0)
            straight = np.where(lower >= 0, right, left)
            default = np.where(lower + upper > 0, right, left)
            if free is not None:
                default = np.where(np.isnan(free), default, np.clip(free, least, greatest))
            through = np.where(across, default, straight)
            chord = np.clip((right * upper - left * lower) / (upper - lower), least, greatest)
            chord = np.where(across, chord, straight)
            rise = np.maximum(np.abs((left - chord) * lower), np.abs((right - chord) * upper))
            rise = np.where(across, rise * (1 + 4 * U) + TINY, 0.0)
        offset = np.zeros(np.broadcast_shapes(through.shape, lower.shape))
        unknown = across & ~((lower >= -FAR) & (upper <= FAR))
        if unknown.any():
            through, chord, rise = (np.where(unknown, v, w) for v, w in ((0.0, through), (0.0, chord), (np.inf, rise)))
            if least > 0 or greatest < 0:
                offset = np.where(unknown, -np.inf if right >= left else np.inf, offset)
        if right >= left:
            return Lines(through, offset, chord, rise)
        return Lines(chord, -rise, through, offset)

    def _lines(
        self, lower: Array, upper: Array, low: Array | None, high: Array | None, sides: Sides | None, more: bool
    ) -> tuple["Lines", Array, Array, Array]:
        """Lines; with `more`, least and greatest value, and the least f(t) - K t."""
        shape = np.broadcast_shapes(lower.shape, *(v.shape for v in (low, high) if v is not None))
        given = [None if v is None else np.broadcast_to(v, shape).reshape(-1) for v in (low, high)]
        lower, upper = (np.broadcast_to(v, shape).reshape(-1) for v in (lower, upper))
        if sides is not None:
            after, before = (np.broadcast_to(v, shape).reshape(-1) for v in sides)
            sides = after, before
        piece = self.straight(lower, upper, sides)
        result = [np.zeros(len(lower)) for _ in range(7)]
        k, b, top_k, top_b, least, greatest, floor = result
        for i, line in enumerate(self.affine):
            if line is not None:
                exact = piece == i
                k[exact], b[exact] = line
                top_k[exact], top_b[exact] = line
                floor[exact] = line[1]
        bent = (piece == -1).nonzero()[0]
        for begin in range(0, len(bent), ENTRIES):
            at = bent[begin : begin + ENTRIES]
            over = _Over(self, lower[at], upper[at], _some(sides, at))
            wanted = [np.full(len(at), np.nan) if v is None else v[at] for v in given]
            for v, found in zip(result, over.lines(*wanted), strict=False):
                v[at] = found
            if more:
                floor[at] = over.least(top_k[at])
        if more:
            flat = (piece != -1).nonzero()[0]
            least[flat], greatest[flat] = self.range(lower[flat], upper[flat], _some(sides, flat))
        shaped = [v.reshape(shape) for v in result]
        return Lines(*shaped[:4]), shaped[4], shaped[5], shaped[6]


class Lines(NamedTuple):
    """Of a line below and a line above: slopes and offsets."""

    below: Array
    below_offset: Array
    above: Array
    above_offset: Array


class Band(NamedTuple):
    """floor <= f(t) - slope t <= ceiling."""

    slope: Array
    floor: Array
    ceiling: Array


class _Over:
    """A function over some intervals [n]: what does not depend on a slope is computed once."""

    def __init__(self, f: Function, lower: Array, upper: Array, sides: Sides | None) -> None:
        self.f, self.lower, self.upper, self.sides = f, lower, upper, sides
        self.bounded = (lower >= -FAR) & (upper <= FAR)
        self.parts: list[tuple[int, Array, Array, Array, _Grid | None]] = []
        with np.errstate(all="ignore"):
            for i, (left, right, _, _) in enumerate(f.ends):
                met = (upper >= left) & (lower <= right)
                if sides is not None:
                    met &= ~(sides[0] & (lower == right)) & ~(sides[1] & (upper == left))
                for some, finite in ((met & self.bounded, True), (met & ~self.bounded, False)):
                    at = some.nonzero()[0]
                    if len(at):
                        a, b = np.maximum(lower[at], left), np.minimum(upper[at], right)
                        curved = finite and f.affine[i] is None
                        self.parts.append((i, at, a, b, _Grid(f, i, *_cut(a, b, SEGMENTS)) if curved else None))

    def least(self, slope: Array, sign: int = 1) -> Array:
        """A lower bound of sign * (f(t) - slope t)."""
        f, result = self.f, np.full(self.lower.shape, np.inf)
        with np.errstate(all="ignore"):
            for i, at, a, b, grid in self.parts:
                result[at] = np.minimum(result[at], self._piece(i, a, b, grid, slope[at], sign))
            for t, own in zip(f.breaks, f.held, strict=True):
                if not math.isnan(own):
                    value = sign * (own - slope * t) - 4 * U * (abs(own) + np.abs(slope * t)) - TINY
                    inside = (self.lower <= t) & (self.upper >= t)
                    if self.sides is not None:
                        inside &= ~(self.sides[0] & (self.lower == t)) & ~(self.sides[1] & (self.upper == t))
                    result = np.where(inside, np.minimum(result, value), result)
        return np.where(self.lower <= self.upper, result, -np.inf)

    def _piece(self, i: int, a: Array, b: Array, grid: "_Grid | None", slope: Array, sign: int) -> Array:
        line = self.f.affine[i]
        if grid is not None:
            return grid.least(slope, sign)
        if line is None or not (np.isfinite(a) & np.isfinite(b) & (np.maximum(np.abs(a), np.abs(b)) <= FAR)).all():
            low, high = self.f.ring.enclose(self.f.pieces[i], a, b)
            return np.where(slope == 0, low if sign > 0 else -high, -np.inf)
        excess, ends = line[0] - slope, []
        for t in (a, b):
            product = excess * t
            slack = np.where(excess == 0, 0.0, 4 * U * (np.abs(product) + abs(line[1])) + TINY)
            ends.append(sign * (product + line[1]) - slack)
        return np.nan_to_num(np.minimum(*ends), nan=-np.inf, posinf=-np.inf, neginf=-np.inf)

    def lines(self, low: Array, high: Array) -> tuple[Array, ...]:
        """Lines with slopes, or default ones where they are NaN, and the range."""
        zero = np.zeros(self.lower.shape)
        least, greatest = self.least(zero), -self.least(zero, sign=-1)
        if np.isnan(low).any() or np.isnan(high).any():
            slopes = self.default_slopes()
            low, high = (np.where(np.isnan(v), w, v) for v, w in zip((low, high), slopes, strict=True))
        k, top_k = np.where(self.bounded, low, 0.0), np.where(self.bounded, high, 0.0)
        b, top_b = self.least(k), -self.least(top_k, sign=-1)
        sloped, top_sloped = np.isfinite(b), np.isfinite(top_b)  # a slope may have been too steep
        return (
            np.where(sloped, k, 0.0), np.where(sloped, b, least),
            np.where(top_sloped, top_k, 0.0), np.where(top_sloped, top_b, greatest), least, greatest,
        )  # fmt: skip

    def default_slopes(self) -> Enclosure:
        """Of a few candidates those whose lines are best in the middle, judged by samples. Any slope is sound."""
        found = np.zeros(self.lower.shape), np.zeros(self.lower.shape)
        with np.errstate(all="ignore"):
            if len(self.f.pieces) > 1:
                return _chosen(self.lower, self.upper, *self._samples())
            for _, at, a, b, grid in self.parts:
                if grid is not None:
                    found[0][at], found[1][at] = _chosen(a, b, *grid.samples())
        return found

    def _samples(self) -> tuple[Array, Array, Sequence[Array]]:
        f, lower, upper = self.f, self.lower, self.upper
        if self.sides is not None:  # samples are to be taken from the piece inside
            lower = np.where(self.sides[0], np.nextafter(lower, np.inf), lower)
            upper = np.where(self.sides[1], np.nextafter(upper, -np.inf), upper)
        steps = 16 if None in f.affine else 1
        at = [lower, upper, *(lower + (upper - lower) * (i / 16) for i in range(1, steps))]
        values = [f.sample(f.pieces, t) for t in at]
        slopes = [np.zeros(lower.shape), *(f.sample(f.slopes, lower + (upper - lower) * (i / 8)) for i in range(9))]
        slopes.append((values[1] - values[0]) / (upper - lower))
        for i, t in enumerate(f.breaks):
            inside = (lower <= t) & (t <= upper)
            point = np.full(lower.shape, t)
            sides = [_mean(f.ring.enclose(p, point, point)) for p in f.pieces[i : i + 2]]
            for side in sides:
                at.append(np.where(inside, t, lower))
                values.append(np.where(inside, side, values[0]))
            for end in (0, 1):
                slopes += [np.where(inside, (side - values[end]) / (t - at[end]), 0.0) for side in sides]
        return np.stack(at), np.stack(values), slopes


def _chosen(lower: Array, upper: Array, points: Array, heights: Array, candidates: Sequence[Array]) -> Enclosure:
    """The slopes of the lines below and above the samples that are best in the middle."""
    middle = lower / 2 + upper / 2
    best = [np.zeros(lower.shape), np.zeros(lower.shape)]
    record = [np.full(lower.shape, -np.inf), np.full(lower.shape, np.inf)]
    scratch = np.empty(points.shape)
    for slope in candidates:
        slope = np.where(np.isfinite(slope), slope, 0.0)
        np.multiply(points, slope, out=scratch)
        np.subtract(heights, scratch, out=scratch)
        at = slope * middle
        low, high = scratch.min(0) + at, scratch.max(0) + at
        higher, lower_still = low > record[0], high < record[1]
        best = [np.where(higher, slope, best[0]), np.where(lower_still, slope, best[1])]
        record = [np.where(higher, low, record[0]), np.where(lower_still, high, record[1])]
    return best[0], best[1]


def _cut(a: Array, b: Array, parts: int) -> tuple[Array, Array]:
    """Ends of equal parts of each [a, b], [parts, n]."""
    steps = np.arange(parts + 1)[:, None] / parts
    points = np.clip(a + (b - a) * steps, a, b)
    points[0], points[-1] = a, b
    return points[:-1], points[1:]


class _Grid:
    """A curved piece on segments [segments, n]."""

    def __init__(self, f: Function, i: int, left: Array, right: Array) -> None:
        self.f, self.i, self.left, self.right = f, i, left, right
        ring, self.m = f.ring, left / 2 + right / 2
        self.h = np.maximum(self.m - left, right - self.m) * (1 + 4 * U)
        middle, over = ring.values(self.m, self.m), ring.values(left, right)
        self.value, self.steep = ring.bounds(f.pieces[i], middle), ring.bounds(f.slopes[i], middle)
        self.whole, self.bend = ring.bounds(f.pieces[i], over), ring.bounds(f.bends[i], over)
        self.doubt = (self.bend[1] - self.bend[0]) * self.h * self.h / 2 + (self.steep[1] - self.steep[0]) * self.h
        self.doubt = np.where(np.isnan(self.doubt), np.inf, self.doubt)

    def samples(self) -> tuple[Array, Array, Sequence[Array]]:
        """Points, values at them, and slopes to choose from."""
        points = np.concatenate([self.left, self.right[-1:]])
        ends = self.f.ring.values(points, points)
        heights = _mean(self.f.ring.bounds(self.f.pieces[self.i], ends))
        slopes = _mean(self.f.ring.bounds(self.f.slopes[self.i], ends))
        chord = (heights[-1] - heights[0]) / (points[-1] - points[0])
        heights = np.concatenate([heights, _mean(self.value)])
        return np.concatenate([points, self.m]), heights, [np.zeros(chord.shape), *slopes, chord]

    def least(self, slope: Array, sign: int) -> Array:
        """A lower bound of sign * (f(t) - slope t); the worst segment of each entry is cut until it is known well."""
        low, value = self._least(slope, sign)
        spread = value.max(0) - value.min(0)
        enough = np.nan_to_num(ENOUGH * spread + 2.0**-46 * np.abs(value).max(0), posinf=0.0)
        every, doubt, left, right = np.arange(low.shape[1]), self.doubt, self.left, self.right
        for _ in range(ROUNDS):
            worst = low.argmin(0)
            busy = (~(doubt[worst, every] <= enough)).nonzero()[0]
            if len(busy) == 0:
                break
            worst = worst[busy]
            finer = _Grid(self.f, self.i, *_cut(left[worst, busy], right[worst, busy], PARTS))
            found = (finer.left, finer.right, finer._least(slope[busy], sign)[0], finer.doubt)
            arrays = []
            for old, new, blank in zip((left, right, low, doubt), found, (0.0, 0.0, np.inf, 0.0), strict=True):
                whole = np.concatenate([old, np.full((PARTS - 1, old.shape[1]), blank)])
                whole[worst, busy] = new[0]
                whole[-(PARTS - 1) :, busy] = new[1:]
                arrays.append(whole)
            left, right, low, doubt = arrays
        return low.min(0)

    def _least(self, slope: Array, sign: int) -> tuple[Array, Array]:
        """Of sign * (f - slope t) over each segment: a lower bound, and some value."""
        k, m, h = sign * slope, self.m, self.h
        (value, bend, whole), steep = (
            (x[0] if sign > 0 else -x[1] for x in (self.value, self.bend, self.whole)),
            self.steep,
        )
        tilt = sign * steep[0] - k, sign * steep[1] - k
        steepness = np.maximum(np.abs(tilt[0]), np.abs(tilt[1]))
        steepness *= 1 + 4 * U
        reach, arc = steepness * h, bend * h
        inside = (bend > 0) & (steepness < arc)
        arc *= h
        fall = reach - arc / 2
        if inside.any():
            np.copyto(fall, steepness * steepness / (2 * bend), where=inside)
        line = k * m
        size = np.abs(value) + np.abs(line) + reach + np.where(inside, fall, np.abs(arc))
        height = value - line
        low = height - fall - 16 * U * size - TINY
        largest = np.maximum(k * self.left, k * self.right)
        plain = whole - largest - 4 * U * (np.abs(whole) + np.abs(largest)) - TINY
        for bound in (low, plain):
            if not np.isfinite(bound).all():
                np.nan_to_num(bound, copy=False, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
        return np.maximum(low, plain), np.nan_to_num(height, nan=0.0, posinf=0, neginf=0)


def _some(sides: Sides | None, part: slice | Array) -> Sides | None:
    return None if sides is None else (sides[0][part], sides[1][part])


def _mean(x: Enclosure) -> Array:
    return x[0] / 2 + x[1] / 2


def _affine(p: Polynomial) -> tuple[float, float] | None:
    slope = offset = 0.0
    for term in p:
        if any(term.exponents[1:]) or term.exponents[0] > 1:
            return None
        if term.exponents[0]:
            slope = float(term.coefficient)
        else:
            offset = float(term.coefficient)
    return slope, offset
