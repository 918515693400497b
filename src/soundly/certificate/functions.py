"""Elementwise functions for the checker: ranges and lines over intervals, rigorous, and without finding a single root.

A function is piecewise a polynomial in x and a few base functions (sigmoid, exp, ...) whose derivatives are again such
polynomials. Affine pieces are bounded at their ends. Curved ones are cut into segments; on a segment around m,
f(t) - k t >= f(m) - k m + s (t - m) + c (t - m)^2 / 2 with enclosures of s = f'(m) - k and of c <= f'' from interval
arithmetic. Trusted: numpy's exp, log, tanh, arctan, sqrt, power to 4 ulp, its sin and cos to 2^-48, math.erf to 4 ulp.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Enclosure: TypeAlias = tuple[Array, Array]

U = 2.0**-53
FAR = 2.0**300  # what is larger counts as infinite; nothing that is smaller overflows in a few products
TINY = 2.0**-900  # pays for underflow
BASE = 32 * U  # relative error of a base function: 4 ulp of each library function, a few operations
ENTRIES = 2**13  # curved functions are bounded for so many entries at once
SEGMENTS, PARTS, ROUNDS = 8, 4, 20  # at first, of the worst segment, and how often that is cut


@dataclass(frozen=True)
class Term:
    """coefficient * x^exponents[0] * base_1^exponents[1] * ...; size bounds what the coefficient was summed from."""

    exponents: tuple[int, ...]
    coefficient: Fraction
    size: Fraction


Polynomial: TypeAlias = tuple[Term, ...]
Rule: TypeAlias = Mapping[tuple[int, ...], float]


@dataclass(frozen=True)
class Base:
    """A base function: its value, how it runs, and its relative error at x in units of 2^-53.

    shape: "up" and "down" are monotone (on each side of a pole); a "hill" is even and falls away from 0; a "wave" has
    slope at most 1 and values between -1 and 1.
    """

    value: Callable[[Array], Array]
    shape: Literal["up", "down", "hill", "wave"]
    error: Callable[[Array], Array] | None = None

    def at(self, x: Array) -> Enclosure:
        v = self.value(x)
        slack = np.abs(v) * (BASE + (0.0 if self.error is None else U * self.error(x))) + TINY
        return v - slack, v + slack

    def enclose(self, a: Array, b: Array) -> Enclosure:
        """Over each [a, b]; NaN where a base function does not exist."""
        if self.shape == "wave":
            m, h = a / 2 + b / 2, (b - a) * (0.5 + 4 * U)
            wide = ~((h < 2) & (np.abs(m) < 2.0**20))
            v = self.value(np.where(wide, 0.0, m))
            h = h + 2.0**-47 + 4 * U * np.abs(m)
            return np.where(wide, -1.0, np.maximum(v - h, -1)), np.where(wide, 1.0, np.minimum(v + h, 1))
        (low_a, high_a), (low_b, high_b) = self.at(a), self.at(b)
        if self.shape == "hill":
            top = self.at(np.zeros(1))[1]
            return np.minimum(low_a, low_b), np.where((a <= 0) & (b >= 0), top, np.maximum(high_a, high_b))
        return (low_a, high_b) if self.shape == "up" else (low_b, high_a)


@dataclass(frozen=True)
class Ring:
    """Base functions with their derivatives; they exist for x >= lower, and for no interval with the pole in it."""

    bases: tuple[Base, ...] = ()
    rules: tuple[Rule, ...] = ()
    lower: float = -math.inf
    pole: float | None = None

    def derivative(self, p: Polynomial) -> Polynomial:
        """By the product rule, in exact arithmetic but for the rules' constants."""
        found: dict[tuple[int, ...], tuple[Fraction, Fraction]] = {}
        for term in p:
            for i, power in enumerate(term.exponents):
                if power == 0:
                    continue
                lowered = tuple(e - (j == i) for j, e in enumerate(term.exponents))
                rule: Rule = {(0,) * len(lowered): 1.0} if i == 0 else self.rules[i - 1]
                for exponents, c in rule.items():
                    key = tuple(map(int.__add__, lowered, exponents))
                    value, size = found.get(key, (Fraction(0), Fraction(0)))
                    factor = power * Fraction(c)
                    found[key] = value + term.coefficient * factor, size + term.size * abs(factor)
        return tuple(Term(e, c, s) for e, (c, s) in sorted(found.items()) if s)

    def enclose(self, p: Polynomial, a: Array, b: Array) -> Enclosure:
        """Bounds of the polynomial over each [a, b]; (-inf, inf) where nothing is known."""
        a, b = np.broadcast_arrays(a, b)
        known = a >= self.lower
        if self.pole is not None:
            known &= (a > self.pole) | (b < self.pole)
        values: list[Enclosure | None] = [(a, b)]
        for i, base in enumerate(self.bases, 1):
            values.append(base.enclose(a, b) if any(t.exponents[i] for t in p) else None)
        low, high, size = np.zeros(a.shape), np.zeros(a.shape), np.full(a.shape, TINY)
        for power in sorted({t.exponents[0] for t in p}):  # x once for each power: its terms often cancel
            least, most, largest = np.zeros(a.shape), np.zeros(a.shape), np.zeros(a.shape)
            for term in (t for t in p if t.exponents[0] == power):
                c, one = float(term.coefficient), np.ones(())
                q, r = one, one
                for value, e in zip(values[1:], term.exponents[1:], strict=True):
                    if e and value is not None:
                        q, r = _times(q, r, *_power(*value, e))
                least, most = least + (c * q if c >= 0 else c * r), most + (c * r if c >= 0 else c * q)
                largest = largest + float(term.size) * np.maximum(np.abs(q), np.abs(r))
            if power:
                x = _power(a, b, power)
                least, most = _times(least, most, *x)
                largest = largest * np.maximum(np.abs(x[0]), np.abs(x[1]))
            low, high, size = low + least, high + most, size + largest
        steps = 16 + 2 * len(p) + max((4 * sum(t.exponents) for t in p), default=0)
        slack = steps * U * size + TINY
        low, high = low - slack, high + slack
        return np.where(known & ~np.isnan(low), low, -np.inf), np.where(known & ~np.isnan(high), high, np.inf)


def _power(low: Array, high: Array, exponent: int) -> Enclosure:
    a, b = low, high
    for _ in range(exponent - 1):
        a, b = a * low, b * high
    if exponent % 2:
        return a, b
    return np.where((low <= 0) & (high >= 0), 0.0, np.minimum(a, b)), np.maximum(a, b)


def _times(a: Array, b: Array, c: Array, d: Array) -> Enclosure:
    """[a, b] [c, d]; NaN where 0 meets an infinity."""
    p, q, r, s = a * c, a * d, b * c, b * d
    return np.minimum(np.minimum(p, q), np.minimum(r, s)), np.maximum(np.maximum(p, q), np.maximum(r, s))


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1 + e)


def _softplus(x: Array) -> Array:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


_erf_of = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Array) -> Array:
    result: Array = np.asarray(_erf_of(x)).astype(np.float64)
    return result


def _square(x: Array) -> Array:
    return 4 * np.minimum(x * x, 1600.0)


S = math.sqrt(2 / math.pi)
_SIGMOID = Base(_sigmoid, "up")
_TANH: Rule = {(0, 0): 1.0, (0, 2): -1.0}


def ring(name: str, rate: float | None) -> Ring:
    """The ring of that name. Raises ValueError if there is none, or its rate is missing, superfluous or useless."""
    if name in _RATED:
        if rate is None or not 2.0**-30 <= abs(rate) <= 2.0**30:
            raise ValueError(f"ring {name!r} needs a rate of a sensible size")
        return _RATED[name](rate)
    if name not in _RINGS or rate is not None:
        raise ValueError(f"ring {name!r:.80} is unknown, or has a rate that it does not need")
    return _RINGS[name]


_INVERSE = Base(lambda x: 1 / x, "down")
_RINGS: Mapping[str, Ring] = {
    "polynomial": Ring(),
    "sigmoid": Ring((_SIGMOID,), ({(0, 1): 1.0, (0, 2): -1.0},)),
    "tanh": Ring((Base(np.tanh, "up"),), (_TANH,)),
    "exp": Ring((Base(np.exp, "up"),), ({(0, 1): 1.0},)),
    "softplus": Ring((Base(_softplus, "up"), _SIGMOID), ({(0, 0, 1): 1.0}, {(0, 0, 1): 1.0, (0, 0, 2): -1.0})),
    "tanh(softplus)": Ring(
        (Base(lambda x: np.tanh(_softplus(x)), "up"), _SIGMOID),
        ({(0, 0, 1): 1.0, (0, 2, 1): -1.0}, {(0, 0, 1): 1.0, (0, 0, 2): -1.0}),
    ),
    "erf, Gaussian": Ring(
        (Base(lambda x: _erf(x * math.sqrt(0.5)), "up"), Base(lambda x: np.exp(-0.5 * x * x), "hill", _square)),
        ({(0, 0, 1): S}, {(1, 0, 1): -1.0}),
    ),
    "erf, exp(-x^2)": Ring(
        (Base(_erf, "up"), Base(lambda x: np.exp(-x * x), "hill", _square)),
        ({(0, 0, 1): 2 / math.sqrt(math.pi)}, {(1, 0, 1): -2.0}),
    ),
    "tanh(sqrt(2/pi) (x + 0.044715 x^3))": Ring(
        (Base(lambda x: np.tanh(S * (x + 0.044715 * x * x * x)), "up"),),
        ({(0, 0): S, (2, 0): S * 0.134145, (0, 2): -S, (2, 2): -S * 0.134145},),
    ),
    "sin, cos": Ring((Base(np.sin, "wave"), Base(np.cos, "wave")), ({(0, 0, 1): 1.0}, {(0, 1, 0): -1.0})),
    "atan, 1/(1+x^2)": Ring(
        (Base(np.arctan, "up"), Base(lambda x: 1 / (1 + x * x), "hill")), ({(0, 0, 1): 1.0}, {(1, 0, 2): -2.0})
    ),
    "log, 1/x": Ring((Base(np.log, "up"), _INVERSE), ({(0, 0, 1): 1.0}, {(0, 0, 2): -1.0}), lower=0.0),
    "sqrt, 1/sqrt": Ring(
        (Base(np.sqrt, "up"), Base(lambda x: 1 / np.sqrt(x), "down")),
        ({(0, 0, 1): 0.5}, {(0, 0, 3): -0.5}),
        lower=0.0,
    ),
    "1/x": Ring((_INVERSE,), ({(0, 2): -1.0},), pole=0.0),
}


def _exp_ring(rate: float) -> Ring:
    base = Base(lambda x: np.exp(rate * x), "up" if rate > 0 else "down", lambda x: 2 * np.minimum(abs(rate * x), 800))
    return Ring((base,), ({(0, 1): rate},))


def _power_ring(exponent: float) -> Ring:
    base = Base(lambda x: np.power(x, exponent), "up" if exponent > 0 else "down")
    return Ring((base, _INVERSE), ({(0, 1, 1): exponent}, {(0, 0, 2): -1.0}), lower=0.0)


_RATED: Mapping[str, Callable[[float], Ring]] = {"exp(rate x)": _exp_ring, "x^p, 1/x": _power_ring}


@dataclass(frozen=True, eq=False)
class Function:
    """A function of one number, piecewise polynomial over a ring.

    Attributes:
        pieces: one polynomial between consecutive breaks.
        breaks: increasing.
        held: values of its own at breaks, NaN where one of the neighbouring pieces has the say.
    """

    ring: Ring
    pieces: tuple[Polynomial, ...]
    breaks: tuple[float, ...] = ()
    held: tuple[float, ...] = ()
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

    def straight(self, lower: Array, upper: Array) -> Array:
        """The number of the affine piece that f is on all of [lower, upper], or -1."""
        found = np.full(lower.shape, -1)
        for i, (a, b, closed_a, closed_b) in enumerate(self.ends):
            if self.affine[i] is not None:
                left = lower >= a if closed_a else lower > a
                right = upper <= b if closed_b else upper < b
                found[left & right] = i
        return found

    def range(self, lower: Array, upper: Array) -> Enclosure:
        """Bounds of f over each [lower, upper]; infinite where nothing is known, never NaN."""
        zero = np.zeros(lower.shape)
        return self.least(lower, upper, zero), -self.least(lower, upper, zero, sign=-1)

    def least(self, lower: Array, upper: Array, slope: Array, sign: int = 1) -> Array:
        """A lower bound of sign * (f(t) - slope t) over each [lower, upper], at jumps with both sides; never NaN."""
        shape = lower.shape
        lower, upper, slope = lower.reshape(-1), upper.reshape(-1), slope.reshape(-1)
        result = np.full(lower.shape, np.inf)
        bounded = (lower >= -FAR) & (upper <= FAR)
        with np.errstate(all="ignore"):
            for i, (left, right, _, _) in enumerate(self.ends):
                met = (upper >= left) & (lower <= right)
                for some, finite in ((met & bounded, True), (met & ~bounded, False)):
                    at = some.nonzero()[0]
                    if len(at):
                        a, b = np.maximum(lower[at], left), np.minimum(upper[at], right)
                        result[at] = np.minimum(result[at], self._piece(i, a, b, slope[at], sign, finite))
            for t, own in zip(self.breaks, self.held, strict=True):
                if not math.isnan(own):
                    value = sign * (own - slope * t) - 4 * U * (abs(own) + np.abs(slope * t)) - TINY
                    result = np.where((lower <= t) & (upper >= t), np.minimum(result, value), result)
        return np.where(lower <= upper, result, -np.inf).reshape(shape)

    def _piece(self, i: int, a: Array, b: Array, slope: Array, sign: int, finite: bool) -> Array:
        if not finite:
            low, high = self.ring.enclose(self.pieces[i], a, b)
            return np.where(slope == 0, low if sign > 0 else -high, -np.inf)
        line = self.affine[i]
        if line is None:
            parts = [slice(j, j + ENTRIES) for j in range(0, len(a), ENTRIES)]
            return np.concatenate([self._curved(i, a[part], b[part], slope[part], sign) for part in parts])
        excess, ends = line[0] - slope, []
        for t in (a, b):
            product = excess * t
            slack = np.where(excess == 0, 0.0, 4 * U * (np.abs(product) + abs(line[1])) + TINY)
            ends.append(sign * (product + line[1]) - slack)
        return np.nan_to_num(np.minimum(*ends), nan=-np.inf, posinf=-np.inf, neginf=-np.inf)

    def _curved(self, i: int, a: Array, b: Array, slope: Array, sign: int) -> Array:
        """Segments; the worst of each entry is cut until it is known well enough."""
        steps = np.arange(SEGMENTS + 1)[:, None] / SEGMENTS
        points = np.clip(a + (b - a) * steps, a, b)
        points[0], points[-1] = a, b
        left, right = points[:-1], points[1:]
        low, doubt, value = self._segments(i, left, right, slope, sign)
        spread = value.max(0) - value.min(0)
        enough = np.nan_to_num(2.0**-15 * spread + 2.0**-46 * np.abs(value).max(0), posinf=0.0)
        parts = np.arange(PARTS + 1)[:, None] / PARTS
        for _ in range(ROUNDS):
            worst, every = low.argmin(0), np.arange(low.shape[1])
            busy = (~(doubt[worst, every] <= enough)).nonzero()[0]
            if len(busy) == 0:
                break
            worst = worst[busy]
            p, q = left[worst, busy], right[worst, busy]
            points = np.clip(p + (q - p) * parts, p, q)
            points[0], points[-1] = p, q
            found = (points[:-1], points[1:], *self._segments(i, points[:-1], points[1:], slope[busy], sign)[:2])
            arrays = []
            for old, new, blank in zip((left, right, low, doubt), found, (0.0, 0.0, np.inf, 0.0), strict=True):
                whole = np.concatenate([old, np.full((PARTS - 1, old.shape[1]), blank)])
                whole[worst, busy] = new[0]
                whole[-(PARTS - 1) :, busy] = new[1:]
                arrays.append(whole)
            left, right, low, doubt = arrays
        return low.min(0)

    def _segments(self, i: int, a: Array, b: Array, slope: Array, sign: int) -> tuple[Array, Array, Array]:
        """Of sign * (f - slope t) over each [a, b]: a lower bound, how far it may be from the truth, some value."""
        m = a / 2 + b / 2
        h = np.maximum(m - a, b - m) * (1 + 4 * U)
        k = sign * slope

        def enclose(p: Polynomial, x: Array, y: Array) -> Enclosure:
            low, high = self.ring.enclose(p, x, y)
            return (low, high) if sign > 0 else (-high, -low)

        value, _ = enclose(self.pieces[i], m, m)
        steep_low, steep_high = enclose(self.slopes[i], m, m)
        steep = np.maximum(np.abs(steep_low - k), np.abs(steep_high - k)) * (1 + 4 * U)
        bend, bend_high = enclose(self.bends[i], a, b)
        inside = (bend > 0) & (steep < bend * h)
        fall = np.where(inside, steep * steep / (2 * bend), steep * h - bend * h * h / 2)
        size = np.abs(value) + np.abs(k * m) + steep * h + np.where(inside, fall, np.abs(bend) * h * h)
        low = np.nan_to_num(value - k * m - fall - 16 * U * size - TINY, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
        whole, _ = enclose(self.pieces[i], a, b)
        largest = np.maximum(k * a, k * b)
        plain = whole - largest - 4 * U * (np.abs(whole) + np.abs(largest)) - TINY
        doubt = (bend_high - bend) * h * h / 2 + (steep_high - steep_low) * h
        low = np.maximum(low, np.nan_to_num(plain, nan=-np.inf, posinf=-np.inf, neginf=-np.inf))
        return low, np.where(np.isnan(doubt), np.inf, doubt), np.nan_to_num(value - k * m, nan=0.0, posinf=0, neginf=0)

    def lines(self, lower: Array, upper: Array, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
        """k, b, K, B with k t + b <= f(t) <= K t + B for t in each [lower, upper].

        Args:
            lower, upper: any shape.
            low, high: slopes to use, NaN where the default is wanted; ignored where the line is exact or f unbounded.
        """
        piece = self.straight(lower, upper)
        k, b, top_k, top_b = (np.zeros(lower.shape) for _ in range(4))
        for i, line in enumerate(self.affine):
            if line is not None:
                exact = piece == i
                k[exact], b[exact] = line
                top_k[exact], top_b[exact] = line
        at = piece == -1
        if at.any():
            a, z, low, high = lower[at], upper[at], low[at], high[at]
            wanted = np.isnan(low) | np.isnan(high)
            if wanted.any():
                default = self.default_slopes(a[wanted], z[wanted])
                for slopes, found in zip((low, high), default, strict=True):
                    slopes[wanted] = np.where(np.isnan(slopes[wanted]), found, slopes[wanted])
            known = (a >= -FAR) & (z <= FAR)
            k[at], top_k[at] = low, high = np.where(known, low, 0.0), np.where(known, high, 0.0)
            b[at], top_b[at] = self.least(a, z, low), -self.least(a, z, high, sign=-1)
            flat = ~(np.isfinite(b) & np.isfinite(top_b)) & at  # a slope may have been too steep
            k[flat & ~np.isfinite(b)] = 0.0
            top_k[flat & ~np.isfinite(top_b)] = 0.0
            if flat.any():
                least, greatest = self.range(lower[flat], upper[flat])
                b[flat] = np.where(np.isfinite(b[flat]), b[flat], least)
                top_b[flat] = np.where(np.isfinite(top_b[flat]), top_b[flat], greatest)
        return k, b, top_k, top_b

    def default_slopes(self, lower: Array, upper: Array) -> Enclosure:
        """Of a few candidates those whose lines are best in the middle, judged by samples. Any slope is sound."""
        curved = None in self.affine
        with np.errstate(all="ignore"):
            at = [lower, upper, *(lower + (upper - lower) * (i / 16) for i in range(1, 16 if curved else 1))]
            values = [self._sample(self.pieces, t) for t in at]
            slopes = [
                np.zeros(lower.shape),
                *(self._sample(self.slopes, lower + (upper - lower) * (i / 8)) for i in range(9)),
            ]
            slopes.append((values[1] - values[0]) / (upper - lower))
            for i, t in enumerate(self.breaks):
                inside = (lower <= t) & (t <= upper)
                point = np.full(lower.shape, t)
                sides = [_mean(self.ring.enclose(p, point, point)) for p in self.pieces[i : i + 2]]
                for side in sides:
                    at.append(np.where(inside, t, lower))
                    values.append(np.where(inside, side, values[0]))
                for end in (0, 1):
                    slopes += [np.where(inside, (side - values[end]) / (t - at[end]), 0.0) for side in sides]
            points, heights, middle = np.stack(at), np.stack(values), lower / 2 + upper / 2
            best = [np.zeros(lower.shape), np.zeros(lower.shape)]
            record = [np.full(lower.shape, -np.inf), np.full(lower.shape, np.inf)]
            for slope in slopes:
                usable = np.isfinite(slope)
                slope = np.where(usable, slope, 0.0)
                excess = heights - slope * points
                low, high = excess.min(0) + slope * middle, excess.max(0) + slope * middle
                higher, lower_still = usable & (low > record[0]), usable & (high < record[1])
                best = [np.where(higher, slope, best[0]), np.where(lower_still, slope, best[1])]
                record = [np.where(higher, low, record[0]), np.where(lower_still, high, record[1])]
        return best[0], best[1]

    def _sample(self, polynomials: Sequence[Polynomial], t: Array) -> Array:
        result = np.full(t.shape, np.nan)
        for p, (a, b, _, _) in zip(polynomials, self.ends, strict=True):
            some = t <= b if a == -math.inf else (t > a) & (t <= b)
            line = _affine(p)
            if line is not None:
                np.copyto(result, line[0] * t + line[1] if line[0] else line[1], where=some)
            elif some.any():
                result[some] = _mean(self.ring.enclose(p, t[some], t[some]))
        return result


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
