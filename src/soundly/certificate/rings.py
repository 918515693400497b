"""The rings that the checker's functions are polynomials over: base functions, their derivatives, their ranges.

A polynomial in x and a few base functions (sigmoid, exp, ...) has a derivative of the same kind, by exact algebra, and
bounds by interval arithmetic. Trusted: numpy's exp, log, tanh, arctan, sqrt, power to 4 ulp, its sin and cos to 2^-48,
math.erf to 4 ulp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Enclosure: TypeAlias = tuple[Array, Array]

U = 2.0**-53
FAR = 2.0**300  # what is larger counts as infinite; nothing that is smaller overflows in a few products
TINY = 2.0**-900  # pays for underflow
BASE = 32 * U  # relative error of a base function: 4 ulp of each library function, a few operations


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
        if self.lower == 0:  # -0.0 is 0, but not to numpy's quotients
            a, b = (a + 0.0,) * 2 if a is b else (a + 0.0, b + 0.0)
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
