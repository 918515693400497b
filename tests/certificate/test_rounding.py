"""The checker knows its rounding, and the errors that a program states for its own numbers."""

import importlib
import itertools
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from tests.certificate.claims import Claim, Node, affine, mlp
from tests.certificate.meaning import checker, exact
from tests.certificate.samples import hard

from soundly.certificate import Certificate, check

bounding = importlib.import_module("soundly.certificate.bounding")
reading = importlib.import_module("soundly.certificate.reading")


def test_rows_within_ulps_of_their_exact_value_are_never_proven_wrongly():
    answers = set()
    for seed in range(120):
        c, holds = hard(seed)
        proven = checker.replay(c).proven
        assert not any(p and not h for p, h in zip(proven.tolist(), holds, strict=True)), seed
        answers |= set(holds)
    assert answers == {True, False}


@pytest.mark.parametrize("seed", range(12))
def test_bounds_of_points_are_within_rounding_of_the_exact_value(seed):
    """Completeness: with 1e-10 of room everything of ordinary size is proven."""
    c, _ = hard(4 * seed)
    wide = Certificate(c.header, {**c.arrays, "row_constant": c.arrays["row_constant"] + 1e-10})
    assert checker.replay(wide).proven.all()


def test_bounds_over_boxes_in_rational_arithmetic():
    """An affine network is bounded exactly, up to rounding: its least value lies in a corner."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        steps, arrays = mlp(rng, [3, 4])
        lower = rng.standard_normal(3)
        upper = lower + rng.random(3)
        blank = Claim(steps, arrays, [(lower, upper, [[(np.eye(4)[0], np.zeros(3), 0.0, 0.0)]])], [(0, 0, 1, Node())])
        c = blank.certificate()
        corners = [[Fraction(float(v[i])) for i, v in enumerate(zip(lower, upper, strict=True))] for v in ()]
        corners = [[Fraction(float((upper if k >> i & 1 else lower)[i])) for i in range(3)] for k in range(8)]
        least = min(exact(c, corner)[0] for corner in corners)
        for ulps in (-40, -2, -1, 0, 1, 2, 40):
            constant = float(-least) + ulps * float(np.spacing(float(-least)))
            some = Certificate(c.header, {**c.arrays, "row_constant": np.array([constant])})
            proven = bool(checker.replay(some).proven[0])
            assert not proven or least + Fraction(constant) > 0
        assert checker.replay(Certificate(c.header, {**c.arrays, "row_constant": np.array([constant + 1e-12])})).proven


def uncertain(kind: str, factor: float) -> Certificate:
    """y = 3 x - 1 at x = 2, weight or bias known up to 0.01 or so: claims y > 5 less `factor` times what that makes."""
    step = affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")
    arrays = {"w": np.array([[3.0]]), "b": np.array([-1.0]), "f": np.array([0.01])}
    step["weight_error" if kind == "weight" else "bias_error"] = "f"
    room = factor * (0.06 if kind == "weight" else 0.01)
    clause = [([1.0], [0.0], -5.0 + room, 0.0)]
    return Claim([{"step": "variable", "size": 1}, step], arrays, [([2.0], [2.0], [clause])],
                 [(0, 0, 1, Node())]).certificate()  # fmt: skip


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_networks_within_the_stated_errors_are_covered(kind):
    assert not check(uncertain(kind, 0.99)).accepted and check(uncertain(kind, 1.01)).accepted


@cache
def unlikely(room: float) -> Certificate:
    """relu(x - 2.005 + e) < room at x = 2 with |e| <= 0.01: true if room > 0.005."""
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "one", "blocks": 1}], "zero"),
        {**affine(2, 1, [{"map": "matrix", "from": 1, "array": "one", "blocks": 1}], "b"), "bias_error": "f"},
        {"step": "function", "from": 2, "size": 1, "function": "relu"},
    ]  # fmt: skip
    arrays = {"one": np.ones((1, 1)), "zero": np.zeros(1), "b": np.array([-2.005]), "f": np.array([0.01])}
    case = ([2.0], [2.0], [[([-1.0], [0.0], room, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node())]).certificate()


def test_uncertain_numbers_count_in_hidden_intervals():
    assert check(unlikely(0.0051)).accepted and not check(unlikely(0.0049)).accepted


def test_sums_are_bounded_whatever_cancels():
    rng = np.random.default_rng(5)
    for _ in range(200):
        terms = np.ldexp(rng.standard_normal(6), rng.integers(-60, 60, 6))
        terms = rng.permutation(np.r_[terms, -terms[:4]])
        bound = bounding.Bound(1)
        for v in terms:
            bound.add(np.array([v]))
        assert Fraction(float(bound.lower()[0])) <= sum(map(Fraction, terms.tolist()))


def test_planes_of_products_lie_exactly_beside_the_product():
    """A product less a plane is bilinear, so what holds in the corners of a rectangle holds inside."""
    rng, n = np.random.default_rng(6), 300
    steps = [{"step": "variable", "size": n}, {"step": "times", "size": n, "left": 0, "right": 0}]
    clause = [(np.ones(n), np.zeros(n), 0.0, 0.0)]
    c = Claim(steps, {}, [(np.zeros(n), np.ones(n), [clause])], [(0, 0, 1, Node())]).certificate()
    program = reading.read(c).program
    centre = np.ldexp(rng.standard_normal((2, 1, n)), rng.integers(-3, 4, (2, 1, n)))
    radius = rng.choice([0.0, 1e-9, 1e-3, 1.0], (2, 1, n))
    box = [(m - r, m + r) for m, r in zip(centre, radius, strict=True)]
    found = bounding.relax(program, 1, box, *rng.choice([np.nan, 0.0, 0.3, 1.0], (2, 1, n)))
    assert np.isfinite(found.below_offset).all() and np.isfinite(found.above_offset).all()
    for k in range(n):
        numbers = (*found.below, found.below_offset, *found.above, found.above_offset)
        ax, ay, a, bx, by, b = (Fraction(float(v[0, k])) for v in numbers)
        for x, y in itertools.product(*([Fraction(float(end[0, k])) for end in ends] for ends in box)):
            assert ax * x + ay * y + a <= x * y <= bx * x + by * y + b


def test_rows_of_the_input_alone_are_bounded_in_rational_arithmetic():
    """Large terms that nearly cancel over thin boxes: what remains is smaller than their rounding."""
    held = 0
    for seed in range(60):
        rng, n = np.random.default_rng(seed), 40
        middle, a = 1e6 * rng.standard_normal(n), rng.standard_normal(n)
        a[-1] = -(a[:-1] @ middle[:-1]) / middle[-1]
        lower, upper = middle - 1e-9, middle + 1e-9
        least = sum(Fraction(v) * Fraction(float(low if v > 0 else high))
                    for v, low, high in zip(a.tolist(), lower, upper, strict=True))  # fmt: skip
        clauses = [[(np.zeros(1), a, float(-least) + room, 0.0)] for room in (-1e-9, -1e-12, 0.0, 1e-12, 1e-9, 1e-3)]
        steps = [{"step": "variable", "size": n}, affine(1, 1, [], "b")]
        c = Claim(steps, {"b": np.zeros(1)}, [(lower, upper, clauses)], [(0, 0, len(clauses), Node())]).certificate()
        result = checker.replay(c)
        assert result.problems == ()
        for proven, ((_, _, constant, _),) in zip(result.proven, clauses, strict=True):
            assert not proven or least + Fraction(constant) > 0
            held += int(proven)
    assert held >= 60
