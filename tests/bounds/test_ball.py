"""Balls met with boxes: least values against linear programs and a general solver, intervals by samples of the ball."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from tests.bounds.samples import made
from torch import Tensor, nn

from soundly.bounds.ball import Ball
from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Start
from soundly.bounds.lower import lower
from soundly.bounds.program import Program
from soundly.spec.region import Ball as Region
from soundly.spec.region import Box

F64 = torch.float64


def cases(seed: int) -> Iterator[tuple[Ball, Tensor, Tensor, Tensor]]:
    """Balls, boxes that cut them, perhaps far from the centre, and rows."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, dtype=F64, generator=g)

    for k in range(12):
        n = 1 + k % 6
        centre, radius = 4 * uniform(1, n) - 2, 0.1 + uniform(1, n)
        if k % 5 == 0:
            radius[0, 0] = 0.0
        low, high = centre - 2 * radius * uniform(1, n), centre + 2 * radius * uniform(1, n)
        if k % 3 == 0:
            low = centre + radius * (0.6 * uniform(1, n) - 0.3) / n
            high = low + radius * uniform(1, n)
        a = 2 * uniform(6, n) - 1
        a[0, 0] = 0.0
        for norm in ("l1", "l2"):
            ball = Ball(centre, radius, norm)
            if not bool(torch.gt(*ball.narrowed(low, high)).any()):
                yield ball, low, high, a


def reference(ball: Ball, low: Tensor, high: Tensor, a: Tensor) -> float:
    """The least <a, x>: a linear program with |y| <= t, or a solver for smooth constraints from several points."""
    c, r, a, low, high = (v.reshape(-1).numpy() for v in (ball.centre, ball.radius, a, low, high))
    n, some = len(a), r > 0
    if ball.norm == "l1":
        rows, ends = [], []
        for i in np.flatnonzero(some):
            for sign in (1, -1):
                row = np.zeros(2 * n)
                row[i], row[n + i] = sign / r[i], -1
                rows.append(row)
                ends.append(sign * c[i] / r[i])
        rows.append(np.r_[np.zeros(n), np.ones(n)])
        bounds = [*zip(low, high, strict=True), *[(0, None)] * n]
        return float(linprog(np.r_[a, np.zeros(n)], np.array(rows), np.r_[ends, 1.0], bounds=bounds).fun)
    best = np.inf
    for start in (np.clip(c, low, high), (low + high) / 2):
        found = minimize(
            lambda x: a @ x, start, jac=lambda x: a, bounds=list(zip(low, high, strict=True)), method="SLSQP",
            constraints={"type": "ineq", "fun": lambda x: 1 - (((x - c)[some] / r[some]) ** 2).sum()},
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        y = ((found.x - c)[some] / r[some]) ** 2
        if y.sum() <= 1 + 1e-7 and bool(((found.x >= low - 1e-9) & (found.x <= high + 1e-9)).all()):
            best = min(best, float(found.fun))
    return best


def wrong(ball: Ball, seed: int) -> str | None:
    """What a ball says that is not so."""
    for own, low, high, a in cases(seed):
        ball_ = type(ball)(own.centre, own.radius, own.norm)
        least, points = ball_.least(a, low, high), ball_.lowest(a, low, high)
        for k in range(len(a)):
            truth = reference(own, low, high, a[k])
            if abs(float(least[k]) - truth) > 2e-6:
                return f"{own.norm}: {float(least[k])} instead of {truth}"
        if not torch.allclose((a * points).sum(1), least, atol=1e-6):
            return "a point is not lowest"
    return None


SOME = Ball(torch.zeros(1, 1), torch.ones(1, 1), "l2")


def test_rows_are_least_where_a_solver_says():
    assert [wrong(SOME, seed) for seed in range(2)] == [None] * 2


class Exchanged(Ball):
    """With the other dual norm."""

    def least(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        h, _ = self._tangent(a, low, high)
        dual = torch.linalg.vector_norm(h * self.radius, torch.inf if self.norm == "l2" else 2, dim=-1)
        rest = a + h
        return (rest.clamp(min=0) * low + rest.clamp(max=0) * high - h * self.centre).sum(-1) - dual


class Ignored(Ball):
    """The box alone."""

    def least(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return (a.clamp(min=0) * low + a.clamp(max=0) * high).sum(-1)


class Half(Ball):
    """Of half the radius."""

    def least(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return Ball(self.centre, self.radius / 2, self.norm).least(a, low, high)


class Central(Ball):
    """Around zero."""

    def least(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return Ball(0 * self.centre, self.radius, self.norm).least(a, low, high)


class Turned(Ball):
    """With the multiplier's sign changed."""

    def _tangent(self, a: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        h, y = super()._tangent(a, low, high)
        return -h, y


@pytest.mark.parametrize("kind", [Exchanged, Ignored, Half, Central, Turned])
def test_broken_balls_are_noticed(kind):
    assert wrong(kind(SOME.centre, SOME.radius, "l2"), 0) is not None


def test_narrowed_boxes_keep_the_ball_and_are_met_by_it():
    """No sample is lost, and every end is reached by the point that is lowest, or greatest, there."""
    for own, low, high, _ in cases(5):
        left, right = own.narrowed(low, high)
        n = low.shape[1]
        for sign, ends in ((1.0, left), (-1.0, right)):
            points = own.lowest(sign * torch.eye(n, dtype=F64), low, high)
            assert torch.allclose(points.diagonal(), ends[0], atol=1e-6)
        assert torch.equal(torch.cat(own.narrowed(left, right)), torch.cat([left, right])) or torch.allclose(
            torch.cat(own.narrowed(left, right)), torch.cat([left, right])
        )


def test_boxes_beyond_the_ball_are_empty():
    for norm, corner in (("l1", 0.51), ("l2", 0.71)):
        ball = Ball(torch.zeros(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64), norm)
        low, high = torch.full((1, 2), corner, dtype=F64), torch.ones(1, 2, dtype=F64)
        assert bool(torch.gt(*ball.narrowed(low, high)).any())
        assert not bool(torch.gt(*ball.narrowed(low - 0.02, high)).any())


def networks() -> dict[str, tuple[Program, int]]:
    perceptron = made(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)), 5, seed=0)
    seen = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 2),
    )  # fmt: skip
    image = made(nn.Sequential(nn.Unflatten(1, (1, 9, 9)), seen), 81, seed=1)
    return {"perceptron": (lower(perceptron), 5), "image": (lower(image), 81)}


@pytest.mark.parametrize("name", ["perceptron", "image"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_intervals_and_rows_hold_at_every_point_of_the_ball(name, norm):
    program, n = networks()[name]
    g = torch.Generator().manual_seed(2)
    centre = torch.rand(n, dtype=F64, generator=g)
    clip = Box(torch.zeros(n), torch.ones(n))
    region = Region(centre, 0.6 if n < 10 else 1.5, norm, clip)
    points = torch.cat([region.samples(800), region.corners(400)])
    low, high = region.box.lower[None], region.box.upper[None]
    radius = torch.as_tensor(region.radius).expand(n)

    def left(c: Tensor, r: Tensor) -> tuple[list[float], float]:
        """By how much samples leave the intervals of all steps, and a row's bound."""
        bounder = Bounder(program.to(F64), ball=Ball(c[None], r[None], norm))
        frame = bounder.refresh(low, high)
        values = program.to(F64).evaluate(points)
        beyond = [
            float(torch.maximum(a - v, v - b).max()) for a, b, v in zip(frame.lower, frame.upper, values, strict=True)
        ]
        start = Start({len(values) - 1: torch.eye(2, dtype=F64)}, torch.zeros(2, dtype=F64))
        bound = bounder.backward(frame, bounder.lines(frame), start).least(low, high)
        return beyond, float((bound - values[-1].amin(0)).max())

    beyond, above = left(centre, radius)
    assert max(beyond) <= 1e-9
    assert above <= 1e-9
    assert max(left(centre, radius / 10)[0]) > 1e-3  # the test of the test
    plain = Bounder(program.to(F64)).refresh(low, high)
    own = Bounder(program.to(F64), ball=Ball(centre[None], radius[None], norm)).refresh(low, high)
    widths = [(b - a).sum() for f in (plain, own) for a, b in [(f.lower[-1], f.upper[-1])]]
    assert widths[1] < 0.9 * widths[0]
