"""Balls in the checker: tangent planes and narrowed boxes in rational arithmetic, whole certificates by samples."""

import importlib
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import Claim, Node, affine, changed, mlp
from tests.certificate.meaning import checker, evaluate_all, in_ball, untrue
from tests.certificate.samples import ball_certificate, grown, tightly, widest

from soundly.certificate import Certificate, check

ball = importlib.import_module("soundly.certificate.ball")


def inside(norm: str, x: list[Fraction], centre: Any, radius: Any) -> bool:
    """Whether a point lies in a ball, exactly."""
    y = []
    for v, c, r in zip(x, centre.tolist(), radius.tolist(), strict=True):
        if r:
            y.append((v - Fraction(c)) / Fraction(r))
    return sum(abs(v) if norm == "l1" else v * v for v in y) <= 1


def sphere(norm: str, centre: np.ndarray, radius: np.ndarray, rng: np.random.Generator) -> list[list[Fraction]]:
    """Rational points of the sphere itself: by l1 shares, or Pythagorean triples in two entries."""
    found, n = [], len(centre)
    for _ in range(12):
        y = [Fraction(0)] * n
        if norm == "l1":
            parts = [Fraction(int(k)) for k in rng.integers(0, 4, n)]
            total = sum(parts) or 1
            y = [p / total * int(s) for p, s in zip(parts, rng.choice([-1, 1], n), strict=True)]
        else:
            t = Fraction(int(rng.integers(0, 99)), 17)
            i, j = rng.permutation(n)[:2] if n > 1 else (0, 0)
            y[i] = (1 - t * t) / (1 + t * t)
            if i != j:
                y[j] = 2 * t / (1 + t * t) * int(rng.choice([-1, 1]))
        pairs = zip(centre.tolist(), radius.tolist(), y, strict=True)
        found.append([Fraction(c) + Fraction(r) * v for c, r, v in pairs])
    return found


def escapes(with_: Any, seed: int) -> bool:
    """Whether a point of the ball lies below a lifted row, or outside a narrowed box; decided in rational numbers."""
    rng = np.random.default_rng(seed)
    n, norm = int(rng.choice([1, 2, 3, 7])), ["l1", "l2"][seed % 2]
    centre = rng.standard_normal(n) * 10.0 ** rng.integers(-3, 7)
    radius = rng.choice([0.0, 1e-3, 0.1, 1.0, 7.0], n)
    if seed % 3 == 0:
        radius[:] = radius[0]
    low, high = centre - 2 * radius * rng.random(n), centre + 2 * radius * rng.random(n)
    some = with_.Ball(centre[None], radius[None], norm)
    a = rng.standard_normal((4, n)) * 10.0 ** rng.integers(-3, 3)
    lifted, d, off = some.lifted(a, low[None], high[None])
    (left,), (right,) = some.narrowed(low[None], high[None])
    # Where each box is a point of the sphere, or next to it, narrowing must keep it.
    for x in sphere(norm, centre, radius, rng):
        assert inside(norm, x, centre, radius)
        for k in range(4):
            # What was rounded in a + h costs U times its size: that is added where it is used.
            rest = sum(
                (Fraction(p) - Fraction(q)) * v + Fraction(abs(q)) * abs(v) * Fraction(2) ** -53
                for p, q, v in zip(a[k].tolist(), lifted[k].tolist(), x, strict=True)
            )
            if rest < Fraction(float(d[k])) - Fraction(float(off[k])):
                return True
        ends = zip(x, low.tolist(), high.tolist(), strict=True)
        if all(Fraction(p) <= v <= Fraction(q) for v, p, q in ends):
            if not all(
                Fraction(p) <= v <= Fraction(q) for v, p, q in zip(x, left.tolist(), right.tolist(), strict=True)
            ):
                return True
        near = np.array([float(v) for v in x])
        if inside(norm, [Fraction(v) for v in near.tolist()], centre, radius):
            (left_,), (right_,) = some.narrowed(near[None], np.maximum(near, high)[None])
            if (left_ > near).any() or (right_ < near).any():
                return True
    return False


def test_lifted_rows_and_narrowed_boxes_lose_no_point():
    assert not [seed for seed in range(60) if escapes(ball, seed)]


def test_a_linear_row_on_a_ball_is_least_where_the_dual_norm_says():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, norm = int(rng.integers(1, 9)), ["l1", "l2"][seed % 2]
        centre, radius = rng.standard_normal(n), rng.random(n) + 0.1
        a = rng.standard_normal((3, n))
        some = ball.Ball(centre[None], radius[None], norm)
        rest, d, off = some.lifted(a, (centre - radius)[None], (centre + radius)[None])
        dual = np.abs(a * radius).max(1) if norm == "l1" else np.linalg.norm(a * radius, axis=1)
        least = d - off + np.minimum(rest * (centre - radius), rest * (centre + radius)).sum(1)
        assert np.allclose(least, a @ centre - dual, rtol=1e-9, atol=1e-12)


def test_random_certificates_with_balls_prove_no_untruth_and_something():
    proven = 0
    for seed in range(60):
        assert untrue(ball_certificate(seed), seed) == []
        proven += int(checker.replay(ball_certificate(seed)).proven.sum())
    assert proven > 60


@cache
def ball_claim(norm: str, room: float = 0.05) -> Claim:
    """Two outputs of a network over a ball that two corners of its box are far from, split until it is proved."""
    steps, arrays = mlp(np.random.default_rng(3), [2, 8, 8, 2])
    return grown(tightly(steps, arrays, [-1, -1], [1, 1], [room], 0, (norm, [0.0, 0.0], [1.0, 1.0])), 20, widest)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_claim_that_holds_on_the_ball_alone_is_proved(norm):
    c = ball_claim(norm).certificate()
    assert check(c).accepted
    header = {k: v for k, v in c.header.items() if k != "ball"}
    box = Certificate(header, {k: v for k, v in c.arrays.items() if not k.startswith("ball_")})
    assert not check(box).accepted  # without the ball it is false
    wide = changed(c, ball_radius=c.arrays["ball_radius"] * 1.3)
    assert not check(wide).accepted
    moved = [changed(c, ball_centre=np.array([0.4 * i, 0.4 * j])) for i in (-1, 1) for j in (-1, 1)]
    assert not all(check(other).accepted for other in moved)
    assert check(changed(c, ball_radius=c.arrays["ball_radius"] * 0.5)).accepted
    if norm == "l1":
        assert not check(changed(c, {"ball": "l2"})).accepted


def test_boxes_outside_the_ball_need_no_proof():
    """A corner of the box, where the claim is false: a leaf there is closed, because the ball does not reach it."""
    steps, arrays = mlp(np.random.default_rng(0), [2, 2])
    arrays["w0"], arrays["b0"] = np.eye(2), np.zeros(2)
    row = [[(np.array([1.0, 1.0]), np.zeros(2), 1.5, 0.0)]]  # x + y > -1.5, false in the corner (-1, -1) alone
    root = Node()
    left, _ = root.split(1, 0, -0.8)
    left.split(1, 1, -0.8)
    claim = Claim(steps, arrays, [([-1, -1], [1, 1], row)], [(0, 0, 1, root)], ball=("l2", [0, 0], [1, 1]))
    assert check(claim.certificate()).accepted
    claim.ball = ("l2", [0, 0], [1.1, 1.1])
    assert not check(claim.certificate()).accepted


@pytest.mark.parametrize(
    ("header", "arrays", "problem"),
    [
        ({"ball": "linf"}, {}, "neither"), ({"ball": None}, {}, "neither"), ({"ball": 2}, {}, "neither"),
        ({}, {"ball_radius": np.array([-1.0, 1.0])}, "negative"), ({}, {"ball_radius": np.ones(3)}, "shape"),
        ({}, {"ball_centre": np.array([np.nan, 0.0])}, "finite"),
        ({}, {"ball_radius": np.array([1e-310, 1.0])}, "small"),
        ({}, {"ball_centre": np.zeros(2, np.float32)}, "expected"),
    ],
)  # fmt: skip
def test_balls_that_make_no_sense_are_refused(header, arrays, problem):
    result = check(changed(ball_claim("l2").certificate(), header, **arrays))
    assert not result.accepted
    assert any(problem in p for p in result.problems)


def test_a_ball_without_numbers_and_numbers_without_a_ball_are_refused():
    c = ball_claim("l2").certificate()
    no_header = Certificate({k: v for k, v in c.header.items() if k != "ball"}, c.arrays)
    no_arrays = Certificate(c.header, {k: v for k, v in c.arrays.items() if k != "ball_radius"})
    for broken in (no_header, no_arrays):
        assert check(broken).problems


def test_samples_reach_the_sphere():
    """The test of the tests: points of balls lie on their boundary, too."""
    c = ball_claim("l1").certificate()
    x = in_ball(
        c, np.full(2, -1.0), np.ones(2), np.random.default_rng(0).uniform(-1, 1, (400, 2)), np.random.default_rng(1)
    )
    size = np.abs(x).sum(1)
    assert size.max() > 1 - 1e-9
    assert size.max() <= 1
    assert (np.abs(x).max(1) > 0.999).any()


def test_parts_of_a_ball_belong_to_places(monkeypatch):
    """Neurons of a convolution see a window of the ball, each its own; with another's something is lost."""
    shape = {"shape": [1, 1, 2, 2], "wide": [1, 5, 5], "narrow": [1, 4, 4], "stride": [1, 1], "padding": [0, 0],
             "dilation": [1, 1], "groups": 1, "transposed": False}  # fmt: skip
    steps = [{"step": "variable", "size": 25},
             affine(1, 16, [{"map": "convolution", "from": 0, "array": "w0", **shape}], "b0"),
             {"step": "function", "from": 1, "size": 16, "function": "relu"},
             affine(3, 1, [{"map": "matrix", "from": 2, "array": "w1", "blocks": 1}], "b1")]  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {"w0": np.ones(4), "b0": np.zeros(16), "w1": np.ones((1, 16)), "b1": np.zeros(1)}
    centre, radius = rng.uniform(-1, 1, 25), rng.uniform(0.1, 0.6, 25)
    row = [[(np.ones(1), np.zeros(25), 1.0, 0.0)]]
    claim = Claim(steps, arrays, [(centre - radius, centre + radius, row)], [(0, 0, 1, Node())],
                  ball=("l2", centre, radius))  # fmt: skip
    c = claim.certificate()
    x = in_ball(c, centre - radius, centre + radius, rng.uniform(-1, 1, (500, 25)), rng)
    values = evaluate_all(c, x)[1]

    def lost() -> bool:
        proof = importlib.import_module("soundly.certificate.reading").read(c)
        frame, _ = importlib.import_module("soundly.certificate.intervals").refresh(
            proof.program, proof.lower, proof.upper, None, np.array([-1]), proof.stored
        )
        return bool((values < frame.lower[1]).any() or (values > frame.upper[1]).any())

    assert not lost()
    take = ball.Ball.take
    monkeypatch.setattr(ball.Ball, "take", lambda self, rows: take(self, np.sort(rows)[::-1]))
    assert lost()
