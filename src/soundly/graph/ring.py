"""Differential rings: why one class can hold every elementwise function and all its derivatives.

Sigmoid, GELU, square roots, sines: each is a polynomial in x and in a few base functions whose derivatives are again
polynomials in the same (tanh' = 1 - tanh^2). Such polynomials are closed under differentiation, so derivatives of any
order are exact algebra on coefficients: nothing is typed in, nothing approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Polynomial = tuple[tuple[tuple[int, ...], float], ...]
"""Terms (exponents of x, base 1, base 2, ...; coefficient), sorted, without zero coefficients."""


def polynomial(terms: dict[tuple[int, ...], float]) -> Polynomial:
    """A polynomial in canonical form."""
    return tuple(sorted((e, float(c)) for e, c in terms.items() if c != 0))


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    total = dict(a)
    for exponents, c in b:
        total[exponents] = total.get(exponents, 0.0) + c
    return polynomial(total)


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    total: dict[tuple[int, ...], float] = {}
    for ea, ca in a:
        for eb, cb in b:
            e = tuple(i + j for i, j in zip(ea, eb, strict=True))
            total[e] = total.get(e, 0.0) + ca * cb
    return polynomial(total)


@dataclass(frozen=True)
class Ring:
    """Base functions t1, t2, ... of x, and their derivatives as polynomials in (x, t1, t2, ...).

    Attributes:
        name: identifies the ring; two rings of one name are equal.
        rules: rules[i] is the derivative of base i.
        bases: evaluates all base functions at a tensor, each to within a few units in the last place.
        period: common period of the base functions, for functions that do not use x itself.
        lower, upper: the functions exist for lower <= x <= upper (open where a base is infinite there).
        pole: a point inside the domain at which a base is infinite.
    """

    name: str
    rules: tuple[Polynomial, ...] = field(compare=False)
    bases: Callable[[Tensor], tuple[Tensor, ...]] = field(compare=False)
    period: float | None = field(default=None, compare=False)
    lower: float = field(default=-math.inf, compare=False)
    upper: float = field(default=math.inf, compare=False)
    pole: float | None = field(default=None, compare=False)

    def derivative(self, p: Polynomial) -> Polynomial:
        """The derivative of a polynomial in x and the bases, by the product rule."""
        total: Polynomial = ()
        for exponents, c in p:
            for i, power in enumerate(exponents):
                if power:
                    lowered = tuple(e - (j == i) for j, e in enumerate(exponents))
                    term = polynomial({lowered: c * power})
                    total = _plus(total, _times(term, self.rules[i - 1]) if i else term)
        return total

    def evaluate(self, p: Polynomial, x: Tensor, *, absolute: bool = False) -> Tensor:
        """The polynomial at x; with `absolute` the sum of its terms' absolute values, the scale of its rounding."""
        needed = [any(e[i] for e, _ in p) for i in range(len(self.rules) + 1)]
        bases = self.bases(x) if any(needed[1:]) else (x,) * len(self.rules)
        values = [v.abs() if absolute else v for v in (x, *bases)]
        total: Tensor | None = None
        for exponents, c in p:
            term: Tensor | None = None
            for value, e in zip(values, exponents, strict=True):
                if e:
                    power = value if e == 1 else value**e
                    term = power if term is None else term * power
            factor = abs(c) if absolute else c
            term = torch.full_like(x, factor) if term is None else term if factor == 1 else term * factor
            total = term if total is None else total + term
        return torch.zeros_like(x) if total is None else total


def _sigmoid_of(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.sigmoid(x),)


def _softplus(x: Tensor) -> Tensor:
    # log(1 + e^x) without overflow and, unlike torch's kernel, without a switch to x beyond 20.
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def _gauss(rate: float) -> Callable[[Tensor], Tensor]:
    """exp(-rate x^2) to a few units in the last place; rounding x^2 alone would cost |rate x^2| of them."""

    def base(x: Tensor) -> Tensor:
        x = x.clamp(-40, 40)  # beyond which it is 0
        near = torch.trunc(64 * x) / 64  # its square is exact, and x^2 = near^2 + (x - near) (x + near)
        return torch.exp(-rate * near * near) * torch.exp(-rate * (x - near) * (x + near))

    return base


def exp_ring(rate: float) -> Ring:
    """Base exp(rate x), with the rounding error of rate times x put right."""

    def base(x: Tensor) -> Tensor:
        wide = x.double().clamp(-1e4 / abs(rate), 1e4 / abs(rate))
        product = rate * wide
        (a, b), (c, d) = (_halves(torch.full_like(wide, rate)), _halves(wide))
        error = ((a * c - product) + a * d + b * c) + b * d  # Dekker, 1971: product + error = rate * wide
        return (torch.exp(product) * (1 + error)).to(x.dtype)

    return Ring(f"exp({rate!r} x)", (polynomial({(0, 1): rate}),), lambda x: (base(x),))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of 26 bits each."""
    big = x * 134217729.0
    high = big - (big - x)
    return high, x - high


def _tanh_gelu(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),)


_slope = math.sqrt(2 / math.pi)

PLAIN = Ring("polynomial", (), lambda x: ())
SIGMOID = Ring("sigmoid", (polynomial({(0, 1): 1, (0, 2): -1}),), _sigmoid_of)
TANH = Ring("tanh", (polynomial({(0, 0): 1, (0, 2): -1}),), lambda x: (torch.tanh(x),))
EXP = Ring("exp", (polynomial({(0, 1): 1}),), lambda x: (torch.exp(x),))
SOFTPLUS = Ring(
    "softplus",
    (polynomial({(0, 0, 1): 1}), polynomial({(0, 0, 1): 1, (0, 0, 2): -1})),
    lambda x: (_softplus(x), torch.sigmoid(x)),
)
TANH_SOFTPLUS = Ring(
    "tanh(softplus)",
    (polynomial({(0, 0, 1): 1, (0, 2, 1): -1}), polynomial({(0, 0, 1): 1, (0, 0, 2): -1})),
    lambda x: (torch.tanh(_softplus(x)), torch.sigmoid(x)),
)
GAUSS = Ring(
    "erf, Gaussian",  # bases erf(x / sqrt 2) and exp(-x^2 / 2)
    (polynomial({(0, 0, 1): _slope}), polynomial({(1, 0, 1): -1})),
    lambda x: (torch.erf(x * math.sqrt(0.5)), _gauss(0.5)(x)),
)
ERF = Ring(
    "erf, exp(-x^2)",
    (polynomial({(0, 0, 1): 2 / math.sqrt(math.pi)}), polynomial({(1, 0, 1): -2})),
    lambda x: (torch.erf(x), _gauss(1.0)(x)),
)
TANH_GELU = Ring(
    "tanh(sqrt(2/pi) (x + 0.044715 x^3))",
    (polynomial({(0, 0): _slope, (2, 0): _slope * 0.134145, (0, 2): -_slope, (2, 2): -_slope * 0.134145}),),
    _tanh_gelu,
)
CIRCLE = Ring(
    "sin, cos",
    (polynomial({(0, 0, 1): 1}), polynomial({(0, 1, 0): -1})),
    lambda x: (torch.sin(x), torch.cos(x)),
    period=2 * math.pi,
)
ATAN = Ring(
    "atan, 1/(1+x^2)",
    (polynomial({(0, 0, 1): 1}), polynomial({(1, 0, 2): -2})),
    lambda x: (torch.atan(x), 1 / (1 + x * x)),
)
LOG = Ring(
    "log, 1/x",
    (polynomial({(0, 0, 1): 1}), polynomial({(0, 0, 2): -1})),
    lambda x: (torch.log(x), 1 / x),
    lower=0.0,
)
SQRT = Ring(
    "sqrt, 1/sqrt",
    (polynomial({(0, 0, 1): 0.5}), polynomial({(0, 0, 3): -0.5})),
    lambda x: (torch.sqrt(x), torch.rsqrt(x)),
    lower=0.0,
)
RECIPROCAL = Ring("1/x", (polynomial({(0, 2): -1}),), lambda x: (1 / x,), pole=0.0)


def power_ring(exponent: float) -> Ring:
    """Bases x^exponent and 1/x, for x > 0."""
    rules = (polynomial({(0, 1, 1): exponent}), polynomial({(0, 0, 2): -1}))
    return Ring(f"x^{exponent}, 1/x", rules, lambda x: (x**exponent, 1 / x), lower=0.0)
