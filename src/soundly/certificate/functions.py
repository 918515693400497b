"""Elementwise functions for the checker: ranges and lines over intervals, rigorous, and without finding a single root.

A function is piecewise a polynomial in x and a few base functions (sigmoid, exp, ...) whose derivatives are again such
polynomials. Affine pieces are bounded at their ends. Curved ones are cut into segments; on a segment around m,
f(t) - k t >= f(m) - k m + s (t - m) + c (t - m)^2 / 2 with enclosures of s = f'(m) - k and of c <= f'' from interval
arithmetic. Trusted: numpy's exp, log, tanh, arctan, sqrt, power to 4 ulp, its sin and cos to 2^-48, math.erf to 4 ulp.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Enclosure: TypeAlias = tuple[Array, Array]

U = 2.0**-53
FAR = 2.0**300  # what is larger counts as infinite; nothing that is smaller overflows in a few products
TINY = 2.0**-900  # pays for underflow
BASE = 32 * U  # relative error of a base function: 4 ulp of each library function, a few operations
ENTRIES = 2**10  # curved functions are bounded for so many entries at once
SEGMENTS, PARTS, ROUNDS = 8, 4, 20  # at first, of the worst segment, and how often that is cut
ENOUGH = 2.0**-10  # of what a function's excess over a line varies by: a bound that is so near the truth is not cut


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
        low_a, high_a = self.at(a)
        low_b, high_b = (low_a, high_a) if a is b else self.at(b)
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

    def values(self, a: Array, b: Array) -> "Values":
        """x and the bases over each [a, b]."""
        return Values((a, b), tuple(base.enclose(a, b) for base in self.bases), self._exists(a, b))

    def _exists(self, a: Array, b: Array) -> Array | None:
        known = None if self.lower == -math.inf else a >= self.lower
        if self.pole is None:
            return known
        beside = (a > self.pole) | (b < self.pole)
        return beside if known is None else known & beside

    def enclose(self, p: Polynomial, a: Array, b: Array) -> Enclosure:
        """Bounds of the polynomial over each [a, b]; (-inf, inf) where nothing is known."""
        return self.bounds(p, self.values(*np.broadcast_arrays(a, b)))

    def bounds(self, p: Polynomial, values: "Values") -> Enclosure:
        """Bounds of the polynomial where x and the bases are within `values`."""
        (a, b), known = values.x, values.known
        low, high, size = np.zeros(a.shape), np.zeros(a.shape), np.full(a.shape, TINY)
        for power in sorted({t.exponents[0] for t in p}):  # x once for each power: its terms often cancel
            least, most, largest = (np.zeros(()) for _ in range(3))
            for term in (t for t in p if t.exponents[0] == power):
                c, q, r = float(term.coefficient), np.ones(()), np.ones(())
                first = True
                for value, e in zip(values.bases, term.exponents[1:], strict=True):
                    if e:
                        factor = _power(*value, e)
                        q, r = factor if first else _times(q, r, *factor)
                        first = False
                least, most = least + (c * q if c >= 0 else c * r), most + (c * r if c >= 0 else c * q)
                largest = largest + float(term.size) * np.maximum(np.abs(q), np.abs(r))
            if power:
                x = _power(a, b, power)
                least, most = _times(least, most, *x)
                largest = largest * np.maximum(np.abs(x[0]), np.abs(x[1]))
            low, high, size = low + least, high + most, size + largest
        size *= (16 + 2 * len(p) + max((4 * sum(t.exponents) for t in p), default=0)) * U
        size += TINY
        low, high = low - size, high + size
        sure = ~(np.isnan(low) | np.isnan(high))
        if known is not None:
            sure &= known
        return (low, high) if sure.all() else (np.where(sure, low, -np.inf), np.where(sure, high, np.inf))


@dataclass(frozen=True, eq=False)
class Values:
    """Bounds of x and of a ring's base functions; `known`: where these exist, None for everywhere."""

    x: Enclosure
    bases: tuple[Enclosure, ...]
    known: Array | None


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

    def straight(self, lower: Array, upper: Array) -> Array:
        """The number of the affine piece that f is on all of [lower, upper], or -1."""
        found = np.full(lower.shape, -1)
        for i, (a, b, closed_a, closed_b) in enumerate(self.ends):
            if self.affine[i] is not None:
                left = lower >= a if closed_a else lower > a
                right = upper <= b if closed_b else upper < b
                found[left & right] = i
        return found

    @cached_property
    def kink(self) -> tuple[float, float] | None:
        """Left and right slope of a function that is linear on both sides of 0, and 0 there."""
        if self.breaks != (0.0,) or any(line is None or line[1] != 0 for line in self.affine):
            return None
        (left, _), (right, _) = (line for line in self.affine if line is not None)
        return (left, right) if math.isnan(self.held[0]) or self.held[0] == 0 else None

    def range(self, lower: Array, upper: Array) -> Enclosure:
        """Bounds of f over each [lower, upper]; infinite where nothing is known, never NaN."""
        zero = np.zeros(lower.shape)
        return self.least(lower, upper, zero), -self.least(lower, upper, zero, sign=-1)

    def least(self, lower: Array, upper: Array, slope: Array, sign: int = 1) -> Array:
        """A lower bound of sign * (f(t) - slope t) over each [lower, upper], at jumps with both sides; never NaN."""
        slope = slope.reshape(-1)
        parts = [over.least(slope[part], sign) for part, over in self._over(lower, upper)]
        return np.concatenate([np.zeros(0), *parts]).reshape(lower.shape)

    def _over(self, lower: Array, upper: Array) -> Iterator[tuple[slice, "_Over"]]:
        lower, upper = lower.reshape(-1), upper.reshape(-1)
        for begin in range(0, len(lower), ENTRIES):
            part = slice(begin, begin + ENTRIES)
            yield part, _Over(self, lower[part], upper[part])

    def lines(self, lower: Array, upper: Array, low: Array | None = None, high: Array | None = None) -> "Lines":
        """k, b, K, B with k t + b <= f(t) <= K t + B for t in each [lower, upper].

        Args:
            lower, upper: any shape.
            low, high: slopes to use, NaN or None where the default is wanted; ignored where the line is exact or f
                unbounded, and where f is linear on both sides of 0 for the side on which the chord is best.
        """
        if self.kink is not None:
            return self._kinked(self.kink, lower, upper, low, high)
        return self._lines(lower, upper, low, high, False)[0]

    def follow(self, lower: Array, upper: Array) -> tuple[Enclosure, "Lines", "Band"]:
        """The range, the default lines, and bounds of f(t) - k t: k is the slope of the upper line, or of the chord
        of a function that is linear on both sides of 0."""
        if self.kink is None:
            lines, *others = self._lines(lower, upper, None, None, True)
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
        self, lower: Array, upper: Array, low: Array | None, high: Array | None, more: bool
    ) -> tuple["Lines", Array, Array, Array]:
        """Lines; with `more`, least and greatest value, and the least f(t) - K t."""
        shape = np.broadcast_shapes(lower.shape, *(v.shape for v in (low, high) if v is not None))
        given = [None if v is None else np.broadcast_to(v, shape).reshape(-1) for v in (low, high)]
        lower, upper = (np.broadcast_to(v, shape).reshape(-1) for v in (lower, upper))
        piece = self.straight(lower, upper)
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
            over = _Over(self, lower[at], upper[at])
            wanted = [np.full(len(at), np.nan) if v is None else v[at] for v in given]
            for v, found in zip(result, over.lines(*wanted), strict=False):
                v[at] = found
            if more:
                floor[at] = over.least(top_k[at])
        if more:
            flat = (piece != -1).nonzero()[0]
            least[flat], greatest[flat] = self.range(lower[flat], upper[flat])
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

    def __init__(self, f: Function, lower: Array, upper: Array) -> None:
        self.f, self.lower, self.upper = f, lower, upper
        self.bounded = (lower >= -FAR) & (upper <= FAR)
        self.parts: list[tuple[int, Array, Array, Array, _Grid | None]] = []
        with np.errstate(all="ignore"):
            for i, (left, right, _, _) in enumerate(f.ends):
                met = (upper >= left) & (lower <= right)
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
