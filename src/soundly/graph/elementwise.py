"""The elementwise functions, each a few polynomials over a differential ring, and the facts analyses need of them.

A function is given piecewise: between break points it is one polynomial in x and the ring's base functions. From
that, everything is computed and nothing typed in: derivatives of any order, the jumps at the breaks, the points where
the derivative equals a given slope, and hence the range on any interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from soundly.graph import ring as rings
from soundly.graph.node import Op, Shape
from soundly.graph.ring import Polynomial, Ring, polynomial

Held = str | float
"""What a function is at a break: the "left" piece's value, the "right" one's, or a number of its own."""

_FAR = 2.0 ** torch.linspace(-100.0, 100.0, 200 * 16 + 1, dtype=torch.float64)
_SCAN = torch.cat([-_FAR, torch.linspace(-64.0, 64.0, 2**15 + 1, dtype=torch.float64), _FAR]).unique()


@dataclass(frozen=True)
class Elementwise(Op):
    """A function of one number, applied to each entry.

    Attributes:
        name: as shown to users; derivatives add a prime.
        pieces: one polynomial over the ring between consecutive breaks.
        ring: the base functions.
        breaks: increasing points at which the piece changes.
        held: per break, what the function is there (left by default).
        kernel: torch's own implementation, where it is faster or more accurate than evaluating the pieces.
        kernel_slope: the same for the derivative.
    """

    name: str
    pieces: tuple[Polynomial, ...]
    ring: Ring = rings.PLAIN
    breaks: tuple[float, ...] = ()
    held: tuple[Held, ...] = ()
    kernel: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)
    kernel_slope: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    def apply(self, *values: Tensor) -> Tensor:
        (x,) = values
        return self.kernel(x) if self.kernel else self._evaluate(x)

    def _evaluate(self, x: Tensor) -> Tensor:
        # Each piece is evaluated only where it belongs, so that none overflows, neither here nor in a backward pass.
        ends = (-math.inf, *self.breaks, math.inf)
        parts = [self.ring.evaluate(p, x.clamp(a, b)) for a, b, p in zip(ends, ends[1:], self.pieces, strict=False)]
        result = parts[0]
        for t, held, part in zip(self.breaks, self._held, parts[1:], strict=True):
            result = torch.where(x >= t if held == "right" else x > t, part, result)
            if not isinstance(held, str):
                result = torch.where(x == t, torch.full_like(x, held), result)
        return torch.where(torch.isnan(x), x, result) if self.breaks else result

    @property
    def _held(self) -> tuple[Held, ...]:
        return self.held or ("left",) * len(self.breaks)

    def shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    @cached_property
    def derivative(self) -> Elementwise:
        """f', an explicit zero on pieces where it vanishes; at a break the neighbouring piece's value."""
        pieces = tuple(self.ring.derivative(p) for p in self.pieces)
        held = tuple(h if isinstance(h, str) else "left" for h in self._held)
        return Elementwise(self.name + "'", pieces, self.ring, self.breaks, held, kernel=self.kernel_slope)

    @property
    def is_zero(self) -> bool:
        """True where the function is identically zero (breaks apart)."""
        return not any(self.pieces)

    def points_with_slope(self, slope: float) -> tuple[float, ...]:
        """The points inside pieces where f' crosses `slope`, to float64 accuracy, by scanning and bisection.

        For periodic functions those of one period. The scan has steps of 1/256 up to 64 and of a sixteenth of an
        octave from 2^-100 to 2^100; crossings closer together would be missed: no function listed here has any.
        """
        found: list[float] = []
        ends = (self.ring.lower, *self.breaks, self.ring.upper)
        for lower, upper, piece in zip(ends, ends[1:], self.derivative.pieces, strict=False):
            grid = _SCAN[(lower < _SCAN) & (upper > _SCAN)]
            if self.ring.period:
                # A step more than a period, so that a crossing at the seam lies between two points.
                grid = torch.linspace(-1.0, 4097 / 4096 * self.ring.period - 1.0, 4098, dtype=torch.float64)
            excess = self.ring.evaluate(piece, grid) - slope
            # Where the value drowns in its own rounding error (saturated tails), its sign says nothing.
            noise = 1e-14 * (self.ring.evaluate(piece, grid, absolute=True) + abs(slope))
            usable = torch.isfinite(excess) & (excess.abs() > noise)
            grid, sign = grid[usable], torch.sign(excess[usable])
            change = (sign[1:] != sign[:-1]).nonzero()[:, 0]
            a, b, before = grid[change].clone(), grid[change + 1].clone(), sign[change]
            for _ in range(64):
                middle = (a + b) / 2
                same = torch.sign(self.ring.evaluate(piece, middle) - slope) == before
                a, b = torch.where(same, middle, a), torch.where(same, b, middle)
            found += [float(t) for t in b if self.ring.pole is None or abs(t - self.ring.pole) > 1e-9]
        return tuple(sorted(set(found)))

    @cached_property
    def special_points(self) -> tuple[tuple[float, float, float], ...]:
        """(t, least, greatest): turning points and breaks, with the values the function takes or approaches there."""

        def value(piece: Polynomial, t: float) -> float:
            return float(self.ring.evaluate(piece, torch.tensor(t, dtype=torch.float64)))

        points = []
        for i, t in enumerate(self.breaks):
            held = [h for h in self._held[i : i + 1] if not isinstance(h, str)]
            near = [value(self.pieces[i], t), value(self.pieces[i + 1], t), *map(float, held)]
            points.append((t, min(near), max(near)))
        for t in self.points_with_slope(0.0):
            v = value(self.pieces[sum(t > b for b in self.breaks)], t)
            points.append((t, v, v))
        return tuple(sorted(points))

    def enclose(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The range on [lower, upper] up to rounding (see `widen`); at a jump both sides belong to it (Clarke).

        Infinite where the interval meets a pole or where a bound is NaN; points outside the domain are left out.
        """
        ring = self.ring
        unknown = torch.isnan(lower) | torch.isnan(upper) | (lower > upper)
        unknown |= (upper < ring.lower) | (lower > ring.upper)
        if ring.pole is not None:
            unknown |= (lower <= ring.pole) & (upper >= ring.pole)
        # + 0.0: to a kernel -0.0 would lie on the other side of a domain that ends at 0.
        ends = [self.apply(end.clamp(ring.lower, ring.upper) + 0.0) for end in (lower, upper)]
        least, greatest = torch.minimum(*ends), torch.maximum(*ends)
        for t, low, high in self.special_points:
            if ring.period:
                turns = torch.floor((upper - t) / ring.period) >= torch.ceil((lower - t) / ring.period)
                # Far from zero the division's rounding could hide a turning point.
                inside = turns | (torch.maximum(lower.abs(), upper.abs()) > 1e3)
            else:
                inside = (lower <= t) & (upper >= t)
            least = torch.where(inside, least.clamp(max=low), least)
            greatest = torch.where(inside, greatest.clamp(min=high), greatest)
        unknown |= torch.isnan(least) | torch.isnan(greatest)
        infinite = torch.full_like(least, math.inf)
        return torch.where(unknown, -infinite, least), torch.where(unknown, infinite, greatest)

    def magnitude(self, lower: Tensor, upper: Tensor) -> Tensor:
        """A bound on the sum of the absolute values of the function's terms over [lower, upper]."""
        total = torch.zeros_like(lower)
        ends = (-math.inf, *self.breaks, math.inf)
        for a, b, piece in zip(ends, ends[1:], self.pieces, strict=False):
            left, right = lower.clamp(a, b), upper.clamp(a, b)
            sizes = [torch.maximum(left.abs(), right.abs())]
            for base in self._bases if any(any(e[1:]) for e, _ in piece) else ():
                least, greatest = base.enclose(left, right)
                sizes.append(torch.maximum(least.abs(), greatest.abs()))
            terms = torch.zeros_like(lower)
            for exponents, c in piece:
                term = torch.full_like(lower, abs(c))
                for size, e in zip(sizes, exponents, strict=False):
                    term = term * size**e if e else term
                terms = terms + term
            total = torch.maximum(total, terms)
        return total

    @cached_property
    def _bases(self) -> tuple[Elementwise, ...]:
        n = len(self.ring.rules)
        unit = [polynomial({tuple(int(j == i) for j in range(n + 1)): 1}) for i in range(1, n + 1)]
        return tuple(Elementwise(f"base {i} of {self.ring.name}", (p,), self.ring) for i, p in enumerate(unit, 1))

    def widen(
        self, lower: Tensor, upper: Tensor, least: Tensor, greatest: Tensor, unit: float
    ) -> tuple[Tensor, Tensor]:
        """The range [least, greatest] on [lower, upper], widened by what rounding may change.

        Covers the error of the range's own computation and that of evaluating f at any point of the interval with
        unit roundoff `unit`, where every base function errs by at most four units in its last place (of two `unit`s
        each). Underflow is not covered, see `underflow`.
        """
        steps = max(8 + len(piece) + 9 * max((sum(e) for e, _ in piece), default=0) for piece in self.pieces)
        if all(len(piece) <= 1 for piece in self.pieces):  # one term: the error is relative
            return least - 2 * steps * unit * least.abs(), greatest + 2 * steps * unit * greatest.abs()
        slack = 2 * steps * unit * self.magnitude(lower, upper)
        return least - slack, greatest + slack

    @cached_property
    def underflow(self) -> float:
        """How often the smallest normal number may be lost: a base function that small is met for |x| < 1024 at most,
        beyond it is far smaller than what it is multiplied by is large."""
        return max(1 + sum(abs(c) * 1024.0 ** e[0] for e, c in piece) for piece in self.pieces)

    @property
    def exact(self) -> bool:
        """Whether evaluation never rounds: pieces that are 0, x, -x or a small dyadic number."""

        def plain(exponents: tuple[int, ...], c: float) -> bool:
            dyadic = abs(c) < 128 and c * 256 == int(c * 256)
            return dyadic if not any(exponents) else abs(c) == 1 and exponents[0] == sum(exponents) == 1

        return all(len(piece) <= 1 and all(plain(*term) for term in piece) for piece in self.pieces)


def _x(power: int, factor: float = 1.0, bases: int = 0) -> Polynomial:
    return polynomial({(power, *(0,) * bases): factor})


def _step(t: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x > t).to(x.dtype)


def leaky_relu(slope: float) -> Elementwise:
    """x for x > 0, slope times x below."""
    return Elementwise(f"leaky_relu({slope:g})", (_x(1, slope), _x(1)), breaks=(0.0,))


def clip(lower: float, upper: float) -> Elementwise:
    """x between lower and upper (either may be infinite); the derivative at the ends is 0, as for ReLU6."""
    finite = [(lower, "left"), (upper, "right")]
    kept = [(t, h) for t, h in finite if math.isfinite(t)]
    constant = {t: polynomial({(0,): t}) for t, _ in kept}
    pieces = [
        *([constant[lower]] if lower in constant else []),
        _x(1),
        *([constant[upper]] if upper in constant else []),
    ]

    def slope(x: Tensor) -> Tensor:
        return ((x > lower) & (x < upper)).to(x.dtype)

    return Elementwise(
        f"clip({lower:g}, {upper:g})",
        tuple(pieces),
        breaks=tuple(t for t, _ in kept),
        held=tuple(h for _, h in kept),
        kernel=lambda x: x.clamp(lower, upper),
        kernel_slope=slope,
    )


def power(exponent: float) -> Elementwise:
    """x^exponent: for every x if the exponent is a whole number (x != 0 if negative), otherwise for x > 0."""
    name = f"power({exponent:g})"
    if exponent == int(exponent):
        n = int(exponent)
        if n >= 0:
            return Elementwise(name, (_x(n),), kernel=lambda x: x**n)
        return Elementwise(name, (polynomial({(0, -n): 1}),), rings.RECIPROCAL)
    return Elementwise(name, (polynomial({(0, 1, 0): 1}),), rings.power_ring(exponent))


def elu(alpha: float, scale: float = 1.0, rate: float = 1.0) -> Elementwise:
    """scale * x for x > 0, scale * alpha * (exp(rate x) - 1) below."""
    ring = rings.EXP if rate == 1 else rings.exp_ring(rate)
    below = polynomial({(0, 1): scale * alpha, (0, 0): -scale * alpha})

    def kernel(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(rate * x.clamp(max=0)))

    def slope(x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.full_like(x, scale), scale * alpha * rate * ring.bases(x.clamp(max=0))[0])

    pieces = (below, _x(1, scale, bases=1))
    return Elementwise(f"elu({alpha:g}, {scale:g}, {rate:g})", pieces, ring, (0.0,), kernel=kernel, kernel_slope=slope)


RELU = Elementwise("relu", ((), _x(1)), breaks=(0.0,), kernel=torch.relu, kernel_slope=_step(0.0))
ABS = Elementwise("abs", (_x(1, -1), _x(1)), breaks=(0.0,), kernel=torch.abs, kernel_slope=torch.sign)
STEP = Elementwise("step", ((), _x(0)), breaks=(0.0,), kernel=_step(0.0))
"""1 for x > 0, else 0."""
SIGN = Elementwise("sign", (_x(0, -1), _x(0)), breaks=(0.0,), held=(0.0,), kernel=torch.sign)
SQUARE = Elementwise("square", (_x(2),), kernel=torch.square)
HARDSIGMOID = Elementwise(
    "hardsigmoid", ((), polynomial({(1,): 1 / 6, (0,): 0.5}), _x(0)), breaks=(-3.0, 3.0), held=("left", "right")
)
HARDSWISH = Elementwise(
    "hardswish", ((), polynomial({(2,): 1 / 6, (1,): 0.5}), _x(1)), breaks=(-3.0, 3.0), held=("left", "right")
)
SIGMOID = Elementwise("sigmoid", (polynomial({(0, 1): 1}),), rings.SIGMOID, kernel=torch.sigmoid)
TANH = Elementwise("tanh", (polynomial({(0, 1): 1}),), rings.TANH, kernel=torch.tanh)
SILU = Elementwise("silu", (polynomial({(1, 1): 1}),), rings.SIGMOID, kernel=torch.nn.functional.silu)
GELU = Elementwise(
    "gelu", (polynomial({(1, 0, 0): 0.5, (1, 1, 0): 0.5}),), rings.GAUSS, kernel=torch.nn.functional.gelu
)
GELU_TANH = Elementwise("gelu_tanh", (polynomial({(1, 0): 0.5, (1, 1): 0.5}),), rings.TANH_GELU)
SOFTPLUS = Elementwise("softplus", (polynomial({(0, 1, 0): 1}),), rings.SOFTPLUS)
MISH = Elementwise("mish", (polynomial({(1, 1, 0): 1}),), rings.TANH_SOFTPLUS)
EXP = Elementwise("exp", (polynomial({(0, 1): 1}),), rings.EXP, kernel=torch.exp)
LOG = Elementwise("log", (polynomial({(0, 1, 0): 1}),), rings.LOG, kernel=torch.log)
SQRT = Elementwise("sqrt", (polynomial({(0, 1, 0): 1}),), rings.SQRT, kernel=torch.sqrt)
RSQRT = Elementwise("rsqrt", (polynomial({(0, 0, 1): 1}),), rings.SQRT, kernel=torch.rsqrt)
RECIPROCAL = Elementwise("reciprocal", (polynomial({(0, 1): 1}),), rings.RECIPROCAL, kernel=torch.reciprocal)
SIN = Elementwise("sin", (polynomial({(0, 1, 0): 1}),), rings.CIRCLE, kernel=torch.sin)
COS = Elementwise("cos", (polynomial({(0, 0, 1): 1}),), rings.CIRCLE, kernel=torch.cos)
ERF = Elementwise("erf", (polynomial({(0, 1, 0): 1}),), rings.ERF, kernel=torch.erf)
ATAN = Elementwise("atan", (polynomial({(0, 1, 0): 1}),), rings.ATAN, kernel=torch.atan)
