"""Lines and ranges of the checker's functions against dense sampling and, where possible, rational arithmetic."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from soundly.certificate import functions
from soundly.certificate.functions import Function
from soundly.certificate.rings import Term, ring

erf = np.vectorize(math.erf, otypes=[float])


def function(name: str, pieces: list, breaks: tuple = (), held: tuple = (), rate: float | None = None) -> Function:
    polynomials = tuple(tuple(Term(tuple(e), Fraction(c), abs(Fraction(c))) for c, *e in piece) for piece in pieces)
    return Function(ring(name, rate), polynomials, breaks, held or (math.nan,) * len(breaks))


def sigmoid(x):
    return np.where(x > 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def softplus(x):
    return np.logaddexp(0, x)


TANH_GELU = "tanh(sqrt(2/pi) (x + 0.044715 x^3))"
CASES: dict[str, tuple[Function, Callable, tuple[float, float]]] = {  # the function, its values, a domain
    "relu": (function("polynomial", [[], [(1, 1)]], (0.0,)), lambda x: np.maximum(x, 0), (-9, 9)),
    "abs": (function("polynomial", [[(-1, 1)], [(1, 1)]], (0.0,)), np.abs, (-9, 9)),
    "clip": (function("polynomial", [[(-1, 0)], [(1, 1)], [(2, 0)]], (-1.0, 2.0)),
             lambda x: np.clip(x, -1, 2), (-9, 9)),
    "step": (function("polynomial", [[], [(1, 0)]], (0.0,)), lambda x: (x > 0) * 1.0, (-3, 3)),
    "sign": (function("polynomial", [[(-1, 0)], [(1, 0)]], (0.0,), (0.0,)), np.sign, (-3, 3)),
    "square": (function("polynomial", [[(1, 2)]]), np.square, (-20, 20)),
    "cubic": (function("polynomial", [[(1, 3), (-2, 1), (0.5, 0)]]), lambda x: x**3 - 2 * x + 0.5, (-4, 4)),
    "hardswish": (function("polynomial", [[], [(1 / 6, 2), (0.5, 1)], [(1, 1)]], (-3.0, 3.0)),
                  lambda x: x * np.clip(x / 6 + 0.5, 0, 1), (-9, 9)),
    "sigmoid": (function("sigmoid", [[(1, 0, 1)]]), sigmoid, (-60, 60)),
    "sigmoid'": (function("sigmoid", [[(1, 0, 1), (-1, 0, 2)]]), lambda x: sigmoid(x) * sigmoid(-x), (-30, 30)),
    "silu": (function("sigmoid", [[(1, 1, 1)]]), lambda x: x * sigmoid(x), (-30, 30)),
    "tanh": (function("tanh", [[(1, 0, 1)]]), np.tanh, (-30, 30)),
    "tanh'": (function("tanh", [[(1, 0, 0), (-1, 0, 2)]]), lambda x: np.cosh(x) ** -2.0, (-20, 20)),
    "exp": (function("exp", [[(1, 0, 1)]]), np.exp, (-20, 10)),
    "elu": (function("exp", [[(1, 0, 1), (-1, 0, 0)], [(1, 1, 0)]], (0.0,)),
            lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), (-20, 9)),
    "exp(-3x)": (function("exp(rate x)", [[(1, 0, 1)]], rate=-3.0), lambda x: np.exp(-3 * x), (-4, 9)),
    "softplus": (function("softplus", [[(1, 0, 1, 0)]]), softplus, (-40, 40)),
    "mish": (function("tanh(softplus)", [[(1, 1, 1, 0)]]), lambda x: x * np.tanh(softplus(x)), (-30, 30)),
    "gelu": (function("erf, Gaussian", [[(0.5, 1, 0, 0), (0.5, 1, 1, 0)]]),
             lambda x: 0.5 * x * (1 + erf(x * math.sqrt(0.5))), (-12, 12)),
    "gaussian": (function("erf, Gaussian", [[(1, 0, 0, 1)]]), lambda x: np.exp(-x * x / 2), (-12, 12)),
    "erf": (function("erf, exp(-x^2)", [[(1, 0, 1, 0)]]), erf, (-9, 9)),
    "gelu_tanh": (function(TANH_GELU, [[(0.5, 1, 0), (0.5, 1, 1)]]),
                  lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), (-9, 9)),
    "sin": (function("sin, cos", [[(1, 0, 1, 0)]]), np.sin, (-20, 20)),
    "cos": (function("sin, cos", [[(1, 0, 0, 1)]]), np.cos, (-20, 20)),
    "atan": (function("atan, 1/(1+x^2)", [[(1, 0, 1, 0)]]), np.arctan, (-50, 50)),
    "log": (function("log, 1/x", [[(1, 0, 1, 0)]]), np.log, (0.01, 20)),
    "sqrt": (function("sqrt, 1/sqrt", [[(1, 0, 1, 0)]]), np.sqrt, (0.0, 20)),
    "rsqrt": (function("sqrt, 1/sqrt", [[(1, 0, 0, 1)]]), lambda x: x**-0.5, (0.01, 20)),
    "reciprocal": (function("1/x", [[(1, 0, 1)]]), lambda x: 1 / x, (0.01, 20)),
    "negative reciprocal": (function("1/x", [[(1, 0, 1)]]), lambda x: 1 / x, (-20, -0.01)),
    "x^1.7": (function("x^p, 1/x", [[(1, 0, 1, 0)]], rate=1.7), lambda x: x**1.7, (0.01, 20)),
    "x^-0.3": (function("x^p, 1/x", [[(1, 0, 1, 0)]], rate=-0.3), lambda x: x**-0.3, (0.01, 20)),
}  # fmt: skip


def intervals(domain: tuple[float, float], seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Inside the domain, from points to all of it, some ending at 0 or at a break."""
    rng = np.random.default_rng(seed)
    a, b = domain
    middle = rng.uniform(a, b, count)
    radius = (b - a) * 10.0 ** rng.uniform(-9, 0, count) * (rng.random(count) > 0.1)
    lower, upper = np.clip(middle - radius, a, b), np.clip(middle + radius, a, b)
    lower[:4], upper[:4] = a, b
    for end, at in ((lower, slice(4, 12)), (upper, slice(12, 20))):
        end[at] = np.clip(rng.choice([-3.0, 0.0, 3.0], 8), a, b)
    return np.minimum(lower, upper), np.maximum(lower, upper)


def samples(lower: np.ndarray, upper: np.ndarray, count: int = 1501) -> np.ndarray:
    t = np.linspace(0, 1, count)[:, None]
    return np.clip(lower + (upper - lower) * t, lower, upper)


def slopes_for(f: Function, value: Callable, lower: np.ndarray, upper: np.ndarray, seed: int) -> np.ndarray:
    """Chords, slopes of tangents, zeros, and anything."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        chord = (value(upper) - value(lower)) / (upper - lower)
        t = rng.uniform(lower, upper)
        tangent = (value(t + 1e-6) - value(t)) / 1e-6
    choice = np.stack([chord, tangent, np.zeros(len(t)), rng.standard_normal(len(t))])
    chosen = choice[rng.integers(0, 4, len(t)), np.arange(len(t))]
    return np.where(np.isfinite(chosen), chosen, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_offsets_hold_and_are_tight(name):
    f, value, domain = CASES[name]
    lower, upper = intervals(domain, 1)
    slope = slopes_for(f, value, lower, upper, 2)
    t = samples(lower, upper)
    excess = value(t) - slope * t
    least, greatest = f.least(lower, upper, slope), -f.least(lower, upper, slope, sign=-1)
    size = np.abs(value(t)).max(0) + np.abs(slope * t).max(0)
    assert (least <= excess.min(0) + 1e-14 * size).all() and (greatest >= excess.max(0) - 1e-14 * size).all()
    spread = excess.max(0) - excess.min(0)
    if None in f.affine and not f.breaks:  # and the greatest curvature times the width squared
        spread = spread + np.abs(np.diff(excess, 2, axis=0)).max(0) * len(t) ** 2
    jump = 2.0 * np.isin(name, ["step", "sign"])  # an interval that only touches a jump has both sides
    room = 1e-3 * spread + 1e-11 * (1 + size) + jump * ((lower == 0) | (upper == 0))
    if name == "mish":  # in its tails interval arithmetic sees little of what cancels
        room = room + 1e-7 * (1 + size)
    assert (excess.min(0) - least <= room).all(), np.argmax(excess.min(0) - least - room)
    assert (greatest - excess.max(0) <= room).all(), np.argmax(greatest - excess.max(0) - room)


@pytest.mark.parametrize("name", CASES)
def test_default_lines_hold_and_are_good_in_the_middle(name):
    """Never worse than the range, and for a smooth function on a short interval within a fraction of its curvature."""
    f, value, domain = CASES[name]
    lower, upper = intervals(domain, 3)
    none = np.full(lower.shape, np.nan)
    k, b, top_k, top_b = f.lines(lower, upper, none.copy(), none.copy())
    t = samples(lower, upper)
    y, size = value(t), 1e-12 * (1 + np.abs(value(t)).max(0) + np.abs(k * t).max(0) + np.abs(top_k * t).max(0))
    assert (k * t + b <= y + size).all() and (top_k * t + top_b >= y - size).all()
    low, high = f.range(lower, upper)
    m = lower / 2 + upper / 2
    room = 0.05 * (high - low) + size  # what judging by samples may cost on waves
    assert (k * m + b >= low - room).all() and (top_k * m + top_b <= high + room).all()


@pytest.mark.parametrize("name", CASES)
def test_ranges_of_unbounded_intervals_hold(name):
    f, value, (a, b) = CASES[name]
    lower, upper = np.array([-np.inf, -np.inf, b]), np.array([np.inf, a, np.inf])
    low, high = f.range(lower, upper)
    assert not np.isnan(low).any() and not np.isnan(high).any()
    with np.errstate(all="ignore"):
        for i, t in enumerate((np.linspace(a, b), np.array([a]), np.array([b, b + 1, b + 50]))):
            y = value(t)
            assert (low[i] <= y + 1e-12).all() and (high[i] >= y - 1e-12).all()
    none = np.full(3, np.nan)
    lines = f.lines(lower, upper, none.copy(), none.copy())
    assert not any(np.isnan(x).any() for x in lines)
    assert (lines[0][f.straight(lower, upper) == -1] == 0).all()


def test_saturating_functions_are_bounded_everywhere():
    everything = np.array([-np.inf]), np.array([np.inf])
    for name in ("sigmoid", "tanh", "erf", "atan", "sin", "gaussian"):
        low, high = CASES[name][0].range(*everything)
        assert -1.6 < low[0] < high[0] < 1.6


def test_nothing_is_known_at_poles_and_outside_the_domain():
    for name in ("log", "sqrt", "rsqrt", "x^1.7", "reciprocal"):
        low, high = CASES[name][0].range(np.array([-1.0]), np.array([1.0]))
        assert low[0] == -np.inf and high[0] == np.inf
        k, b, top_k, top_b = CASES[name][0].lines(np.array([-1.0]), np.array([1.0]), np.ones(1), np.ones(1))
        assert (k[0], b[0], top_k[0], top_b[0]) == (0, -np.inf, 0, np.inf)


@pytest.mark.parametrize("name, rate", [("sqrt, 1/sqrt", None), ("log, 1/x", None), ("x^p, 1/x", -0.5)])
def test_minus_zero_is_zero(name, rate):
    made, upper = ring(name, rate), np.array([4.0])
    for exponents in ((0, 1, 0), (0, 0, 1)):
        term = (Term(exponents, Fraction(1), Fraction(1)),)
        with np.errstate(all="ignore"):
            minus, plus = (made.enclose(term, np.array([zero]), upper) for zero in (-0.0, 0.0))
        assert minus == plus


def test_relu_has_the_usual_lines():
    f = CASES["relu"][0]
    none = np.full(4, np.nan)
    lower, upper = np.array([-1.0, -2.0, 1.0, -3.0]), np.array([2.0, 1.0, 2.0, 0.0])
    k, b, top_k, top_b = f.lines(lower, upper, none.copy(), none.copy())
    assert k.tolist() == [1, 0, 1, 0] and top_k == pytest.approx([2 / 3, 1 / 3, 1, 0])
    assert b == pytest.approx([0, 0, 0, 0], abs=1e-200) and top_b == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert f.lines(lower[:1], upper[:1], np.array([0.25]), np.array([0.5]))[0][0] == 0.25
    assert f.straight(lower, upper).tolist() == [-1, -1, 1, 0]


def test_a_jump_at_the_end_of_an_interval_counts():
    f = CASES["step"][0]
    zero, one = np.zeros(1), np.ones(1)
    assert [x[0] for x in f.range(zero, one)] == [0, 1] and [x[0] for x in f.range(-one, zero)] == [0, 1]
    assert f.straight(zero, one)[0] == -1 and f.straight(zero + 1e-300, one)[0] == 1
    own = function("polynomial", [[], []], (0.0,), (5.0,))
    assert [x[0] for x in own.range(zero, one)] == pytest.approx([0, 5])


def test_affine_pieces_are_bounded_in_rational_arithmetic():
    rng = np.random.default_rng(0)
    f = function("polynomial", [[(0.1, 1), (0.7, 0)], [(-0.3, 1), (1 / 3, 0)]], (0.2,))
    for _ in range(300):
        a, b = sorted(rng.standard_normal(2) * 10.0 ** rng.integers(-9, 9))
        k = float(rng.choice([0.1, -0.3, rng.standard_normal()]))
        ends = [t for t in (a, b, 0.2) if a <= t <= b]
        values = []
        for t in ends:
            for c, d, here in ((0.1, 0.7, t <= 0.2), (-0.3, 1 / 3, t >= 0.2)):
                if here:
                    values.append((Fraction(c) - Fraction(k)) * Fraction(t) + Fraction(d))
        low = f.least(np.array([a]), np.array([b]), np.array([k]))[0]
        high = -f.least(np.array([a]), np.array([b]), np.array([k]), sign=-1)[0]
        assert Fraction(low) <= min(values) and max(values) <= Fraction(high)
        assert high - low <= float(max(values) - min(values)) + 1e-14 * (1 + abs(a) + abs(b))


def test_derivatives_are_right():
    for f, value, (a, b) in CASES.values():
        t = np.linspace(a, b, 23)[1:-1] + 1e-3
        h = 1e-5
        for p, (left, right, _, _) in zip(f.slopes, f.ends, strict=True):
            inside = t[(t > left + h) & (t < right - h)]
            low, high = f.ring.enclose(p, inside, inside)
            numeric = (value(inside + h) - value(inside - h)) / (2 * h)
            assert low / 2 + high / 2 == pytest.approx(numeric, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name, rate", [("cosh", None), ("exp(rate x)", None), ("exp", 1.0), ("x^p, 1/x", math.nan)])
def test_unknown_rings_are_refused(name, rate):
    with pytest.raises(ValueError, match="ring"):
        ring(name, rate)


@pytest.mark.parametrize("name", ["tanh", "gelu", "softplus", "square"])
def test_a_function_without_its_curvature_is_found_out(name, monkeypatch):
    """The tests above see a checker that takes f to be straight on every segment."""
    f, value, domain = CASES[name]
    straight = Function(f.ring, f.pieces, f.breaks, f.held)
    object.__setattr__(straight, "bends", tuple(() for _ in f.pieces))
    monkeypatch.setattr(functions, "ROUNDS", 0)
    lower, upper = intervals(domain, 1)
    t = samples(lower, upper)
    with np.errstate(all="ignore"):
        assert (-straight.least(lower, upper, 0 * lower, sign=-1) < value(t).max(0) - 1e-9).any() or (
            straight.least(lower, upper, 0 * lower) > value(t).min(0) + 1e-9
        ).any()


def test_ends_that_belong_to_the_inside():
    """exp on the left of 0, 3 - x from 0 to 1, and x after that: intervals that end in a jump, from either side."""
    pieces = [[(1, 0, 1)], [(3, 0, 0), (-1, 1, 0)], [(1, 1, 0)]]
    f = function("exp", pieces, (0.0, 1.0))
    values = (np.exp, lambda x: 3 - x, lambda x: x)
    low, high = np.array([-2.0, 0.0, 0.0, 0.0, 1.0, -1.0]), np.array([0.0, 0.5, 1.0, 2.0, 1.5, 1.0])
    after, before = low >= 0, np.array([True, False, True, False, False, True])
    expected = [(math.exp(-2), 1), (2.5, 3), (2, 3), (1, 3), (1, 1.5), (math.exp(-1), 3)]
    sides = after, before
    least, greatest = f.range(low, high, sides)
    assert np.stack([least, greatest], 1) == pytest.approx(np.array(expected), abs=1e-6)
    assert f.straight(low, high, sides).tolist() == [-1, 1, 1, -1, 2, -1]
    assert f.straight(low, high).tolist() == [-1, -1, -1, -1, -1, -1]
    slopes = [None, *(np.full(low.shape, k) for k in (-1.0, 0.0, 0.7))]
    for k, top_k in ((k, top_k) for k in slopes for top_k in slopes):
        below, b, above, top_b = f.lines(low, high, k, top_k, sides)
        for i in range(len(low)):
            for p, (start, end) in zip(values, ((-math.inf, 0), (0, 1), (1, math.inf)), strict=True):
                x = np.linspace(max(low[i], start), min(high[i], end), 101)
                if x[0] < x[-1]:  # the closed piece
                    assert (below[i] * x + b[i] <= p(x) + 1e-12).all() and (
                        above[i] * x + top_b[i] >= p(x) - 1e-12
                    ).all()


def test_whose_value_a_function_has_at_a_break():
    constant = [[(0, 0)], [(1, 0)]]

    def at(held: float, say: tuple[int, ...], pieces: list = constant) -> set[int]:
        found = function("polynomial", pieces, (0.0,), (held,))
        return Function(found.ring, found.pieces, found.breaks, found.held, say).sides(0.0)

    assert at(math.nan, (-1,)) == {-1} and at(math.nan, (1,)) == {1} and at(math.nan, ()) == set()
    assert at(0.0, (-1,)) == {-1} and at(1.0, (-1,)) == {1} and at(0.5, (-1,)) == set()
    assert at(math.nan, (-1,), [[(0, 0)], [(1, 1)]]) == {-1, 1} == at(0.0, (1,), [[(0, 0)], [(1, 1)]])
    assert function("polynomial", constant, (0.0,)).sides(0.5) == {-1, 1}


def decimal_softplus(x: Decimal) -> Decimal:
    return (1 + x.exp()).ln()


BASES: dict[str, tuple[float | None, tuple[Callable[[Decimal], Decimal], ...], float]] = {  # rate, base functions, from
    "exp": (None, (Decimal.exp,), -30),
    "exp(rate x)": (-3.0, (lambda x: (-3 * x).exp(),), -10),
    "tanh": (None, (lambda x: 1 - 2 / ((2 * x).exp() + 1),), -15),
    "sigmoid": (None, (lambda x: 1 / (1 + (-x).exp()),), -30),
    "softplus": (None, (decimal_softplus, lambda x: 1 / (1 + (-x).exp())), -30),
    "tanh(softplus)": (None, (lambda x: 1 - 2 / ((2 * decimal_softplus(x)).exp() + 1),), -20),
    "log, 1/x": (None, (Decimal.ln, lambda x: 1 / x), 1e-6),
    "sqrt, 1/sqrt": (None, (Decimal.sqrt, lambda x: 1 / x.sqrt()), 1e-6),
    "x^p, 1/x": (1.75, (lambda x: (Decimal("1.75") * x.ln()).exp(),), 1e-3),
}


@pytest.mark.parametrize("name", BASES)
def test_base_functions_hold_their_exact_values(name):
    """At points, to fifty digits: what the library's functions err is paid."""
    rate, exact, first = BASES[name]
    x = first + (20 - first) * np.random.default_rng(8).random(300)
    with localcontext() as context:
        context.prec = 50
        for base, f in zip(ring(name, rate).bases, exact, strict=False):
            for at, low, high in zip(x.tolist(), *(end.tolist() for end in base.at(x)), strict=True):
                assert Decimal(low) <= f(Decimal(at)) <= Decimal(high), at
