"""Regions contain what they say, exactly, and give verifiers points and parts that lie inside."""

import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.spec import region as module
from soundly.spec.claim import Region
from soundly.spec.region import Ball, Box, Union, join, rounded

NORMS = ("linf", "l2", "l1")


def f64(v: Any) -> Tensor:
    return torch.tensor(v, dtype=torch.float64)


def in_ball(x: Tensor, ball: Ball) -> bool:
    """Membership by fractions alone."""
    p = {"linf": 0, "l2": 2, "l1": 1}[ball.norm]
    radius = torch.as_tensor(ball.radius).expand(ball.shape).flatten().tolist()
    terms = []
    for v, c, r in zip(x.flatten().tolist(), ball.centre.flatten().tolist(), radius, strict=True):
        away = abs(Fraction(v) - Fraction(c))
        if r == 0 and away:
            return False
        if r:
            terms.append((away / Fraction(r)) ** (p or 1))
    inside = (sum(terms) if p else max(terms, default=Fraction(0))) <= 1
    if ball.clip is not None:
        inside = inside and bool(((ball.clip.lower <= x) & (x <= ball.clip.upper)).all())
    return inside


decimals = st.decimals(-3, 3, allow_nan=False, places=4) | st.decimals(-3, 3, allow_nan=False, places=25)


@given(decimals)
def test_rounding_encloses_as_tightly_as_float64_can(q: Decimal) -> None:
    down, up = rounded(Fraction(q))
    assert Fraction(down) <= Fraction(q) <= Fraction(up)
    assert down == up or math.nextafter(down, 9.0) == up
    assert (down == up) == (Fraction(float(q)) == Fraction(q))


def test_rounding_at_the_ends_of_float64() -> None:
    assert rounded(Fraction(10) ** 400) == (math.nextafter(math.inf, 0.0), math.inf)
    assert rounded(Fraction(-10) ** 401) == (-math.inf, -math.nextafter(math.inf, 0.0))
    assert rounded(Fraction(1, 10**400)) == (0.0, 5e-324)
    assert rounded(Fraction(0)) == (0.0, 0.0)


@settings(max_examples=200)
@given(st.lists(st.tuples(decimals, decimals), min_size=1, max_size=3), st.integers(0, 99))
def test_a_box_of_decimals_contains_exactly_their_points(ends: list[tuple[Decimal, Decimal]], seed: int) -> None:
    lower, upper = [Fraction(min(e)) for e in ends], [Fraction(max(e)) for e in ends]
    box, rng = Box.exactly(lower, upper), random.Random(seed)
    assert not box.is_empty
    for _ in range(20):
        x = []
        for low, high in zip(lower, upper, strict=True):
            v = rng.choice([float(low), float(high), float(low + high) / 2])
            x.append(rng.choice([v, math.nextafter(v, 9.0), math.nextafter(v, -9.0)]))
        exact = all(low <= Fraction(v) <= high for v, low, high in zip(x, lower, upper, strict=True))
        assert bool(box.contains(f64(x))) == exact
        if exact:
            assert bool(((box.lower <= f64(x)) & (f64(x) <= box.upper)).all())


def test_decimals_read_to_the_nearest_float_would_be_caught() -> None:
    tenth = Fraction("0.1")  # its nearest float lies above
    assert Box.exactly(["0.1"], [1]).lower.item() < tenth
    assert not Box.exactly([0], ["0.1"]).contains(f64([0.1]))
    assert Box(f64([0.0]), f64([0.1])).contains(f64([0.1]))


def test_contradictory_bounds_are_empty_and_not_an_error() -> None:
    for box in (Box(f64([0.0, 1.0]), f64([1.0, 0.0])), Box.exactly(["0.10000000000000000000001"], ["0.1"])):
        assert box.is_empty and box.volume == 0.0
        assert len(box.samples(5)) == 0 and len(box.corners(5)) == 0
        with pytest.raises(InvalidInput, match="empty"):
            box.project(box.lower)
    point = Box(f64([0.5, 0.0]), f64([0.5, 1.0]))
    assert not point.is_empty and point.volume == 1.0 and point.contains(f64([0.5, 0.3]), strict=True)
    assert not point.contains(f64([0.5, 1.0]), strict=True)


def test_constant_inputs_that_no_float_equals() -> None:
    box = Box.exactly(["0.1"], ["0.1"])
    assert not box.is_empty and not box.contains(box.project(f64([0.0])))
    assert box.excess(box.project(f64([0.0]))) < 1e-16


def regions() -> dict[str, Region]:
    shape = (2, 3)
    generator = torch.Generator().manual_seed(1)
    centre = torch.rand(shape, generator=generator)
    clip = Box(torch.zeros(shape), torch.ones(shape))
    far = Box(torch.full(shape, 0.9).double(), torch.full(shape, 3.0))
    radius = torch.rand(shape, generator=generator)
    radius[0, 1] = 0
    result: dict[str, Region] = {
        "box": Box(centre - radius, centre + radius),
        "decimals": join(Box.exactly(["0.1"] * 6, ["0.3"] * 6)),
        "union": Union.of([Box(centre, centre + 0.1), Box(centre - 2, centre - 1), Box(centre, centre - 1)]),
    }
    for norm in NORMS:
        result[norm] = Ball(centre, 0.7, norm)
        result[f"{norm} clipped"] = Ball(centre, 0.7, norm, clip)
        result[f"{norm} per entry"] = Ball(centre, radius, norm, clip)
        result[f"{norm} off centre"] = Ball(torch.zeros(shape), {"linf": 1.0, "l2": 2.5, "l1": 6.0}[norm], norm, far)
    return result


@pytest.mark.parametrize("name", regions())
def test_samples_corners_and_projections_lie_inside(name: str) -> None:
    region = regions()[name]
    assert not region.is_empty
    samples, corners = region.samples(64), region.corners(32)
    assert samples.shape == (64, *region.shape) and 0 < len(corners) <= 32
    assert torch.equal(samples, region.samples(64)), "seeded"
    other = region.samples(64, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(samples, other)
    wild = torch.randn((40, *region.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    for points in (samples, corners, region.project(wild), region.project(wild[0])):
        assert bool(region.contains(points).all())
        assert bool((region.excess(points) < 1e-12).all())
        assert bool(((points >= region.box.lower) & (points <= region.box.upper)).all())
    assert bool(region.contains(region.project(wild, dtype=torch.float32)).all()) or "per entry" in name
    assert torch.allclose(region.project(samples), samples, atol=1e-12)
    spread = samples.amax(0) - samples.amin(0)
    assert bool((spread[region.box.widths > 1e-9] > 0).all()), "every entry that varies is varied"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("per_entry", [False, True])
def test_balls_decide_membership_without_rounding(norm: str, per_entry: bool) -> None:
    rng = random.Random(1)
    hits = [0, 0]
    for trial in range(60):
        n = rng.randint(1, 4)
        if trial % 3 == 0:  # points on the sphere, such as 3-4-5
            centre, x = [0.0] * n, ([3.0, 4.0] + [0.0] * n)[: max(n, 2)]
            centre, radius = [0.0] * len(x), {"linf": 4.0, "l2": 5.0, "l1": 7.0}[norm]
        else:
            centre = [rng.choice([0.1, 0.3, 0.7, 1e-3]) for _ in range(n)]
            x = [c + rng.choice([0.0, 0.1, -0.2, 0.05]) for c in centre]
            radius = rng.choice([0.1, 0.2, 0.3])
        radii = f64([radius * rng.choice([1.0, 0.5]) for _ in x]) if per_entry else radius
        ball = Ball(f64(centre), radii, norm)  # type: ignore[arg-type]
        for _ in range(6):
            i = rng.randrange(len(x))
            expected = in_ball(f64(x), ball)
            assert bool(ball.contains(f64(x))) == expected
            hits[expected] += 1
            x = list(x)
            x[i] = math.nextafter(x[i], rng.choice([-9.0, 9.0]))
    assert min(hits) > 20


def test_a_membership_test_in_floats_would_be_caught() -> None:
    ball = Ball(f64([0.0, 0.0]), 5.0, "l2")
    beyond = f64([3.0, math.nextafter(4.0, 9.0)])
    tiny = f64([5.0, 1e-9])
    assert float(torch.linalg.vector_norm(tiny)) == 5.0 and not ball.contains(tiny)
    assert ball.contains(f64([3.0, 4.0])) and not ball.contains(f64([3.0, 4.0]), strict=True)
    assert not ball.contains(beyond)


@pytest.mark.parametrize("norm", NORMS)
def test_the_bounding_box_of_a_ball_loses_nothing(norm: str) -> None:
    for c, r in ((0.1, 0.03), (0.3, 1e-17), (1.0, 2**-60), (1e10, 0.1)):
        ball = Ball(f64([c]), r, norm)  # type: ignore[arg-type]
        assert Fraction(ball.box.lower.item()) <= Fraction(c) - Fraction(r)
        assert Fraction(ball.box.upper.item()) >= Fraction(c) + Fraction(r)
        assert not Fraction(ball.box.points[0].item()) < Fraction(c) - Fraction(r)


def test_rounding_the_bounding_box_to_nearest_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_sum", lambda a, b: (a + b, a + b))
    with pytest.raises(AssertionError):
        test_the_bounding_box_of_a_ball_loses_nothing("linf")


def test_empty_balls() -> None:
    far = Box(f64([3.0, 3.0]), f64([4.0, 4.0]))
    for norm, radius in (("linf", 2.9), ("l2", 4.2), ("l1", 5.9)):
        ball = Ball(f64([0.0, 0.0]), radius, norm, far)  # type: ignore[arg-type]
        assert ball.is_empty and len(ball.samples(4)) == 0 and len(ball.corners(4)) == 0
        with pytest.raises(InvalidInput, match="empty"):
            ball.project(f64([0.0, 0.0]))
        touching = Ball(f64([0.0, 0.0]), {"linf": 3.0, "l2": 4.25, "l1": 6.0}[norm], norm, far)  # type: ignore[arg-type]
        assert not touching.is_empty


@pytest.mark.parametrize("name", [k for k in regions() if k != "union"])
def test_halves_cover_and_share_the_cut(name: str) -> None:
    region = regions()[name]
    assert not isinstance(region, Union)
    left, right = region.split(4)
    points = region.samples(200)
    assert bool((left.contains(points) | right.contains(points)).all())
    assert bool(region.contains(torch.cat([left.samples(20), right.samples(20)])).all())
    cut = left.box.upper.flatten()[4]
    assert cut == right.box.lower.flatten()[4]
    if isinstance(region, Box):
        assert isinstance(left, Box) and isinstance(right, Box)
        assert math.isclose(left.volume + right.volume, region.volume, rel_tol=1e-12)
        at = float(region.lower.flatten()[4])
        assert region.split(4, at)[0].widths.flatten()[4] == 0


def test_corners_are_all_of_them_if_they_are_few() -> None:
    box = Box(f64([0.0, 5.0, 0.0]), f64([1.0, 5.0, 2.0]))
    assert sorted(box.corners(4).tolist()) == [[0, 5, 0], [0, 5, 2], [1, 5, 0], [1, 5, 2]]
    assert len(box.corners(3)) == 3
    assert sorted(Ball(f64([0.0, 0.0]), 1.0, "l1").corners(9).tolist()) == [[-1, 0], [0, -1], [0, 1], [1, 0]]
    assert Box(f64([1.0]), f64([1.0])).corners(8).tolist() == [[1.0]]


def test_unions() -> None:
    union = Union.of([Box(f64([0.0]), f64([1.0])), Box(f64([2.0]), f64([1.5])), Box.exactly(["2.1"], ["3.1"])])
    assert len(union) == 3 and union.filled == [0, 2] and union.shape == (1,)
    assert union.contains(f64([[0.5], [1.2], [2.1], [3.1], [2.5]])).tolist() == [True, False, True, False, True]
    assert union.box.lower.item() == 0 and union.box.upper.item() >= 3.1
    assert union.project(f64([[1.4], [1.9]])).flatten().tolist() == [1.0, 2.1]
    assert union.samples(9).shape == (9, 1) and union.members(f64([2.5])).tolist() == [False, False, True]
    nothing = Union(torch.empty((0, 4)), torch.empty((0, 4)))
    assert nothing.is_empty and nothing.box.is_empty and len(nothing.samples(3)) == 0
    assert not nothing.contains(torch.zeros(4))


def test_several_inputs_are_joined() -> None:
    box = join(Box(torch.zeros(2, 2), torch.ones(2, 2)), Box.exactly(["0.1"], ["0.2"]))
    assert box.shape == (5,) and box.inner is not None and box.lower[4].item() < Fraction("0.1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(f64([0.0]), f64([0.0, 1.0])), "lower has shape"),
        (lambda: Box(f64([math.nan]), f64([0.0])), "lower holds NaN"),
        (lambda: Box(f64([0.0]), f64([math.inf])), "upper holds NaN or infinite"),
        (lambda: Box("a", f64([0.0])), "must be a tensor"),  # type: ignore[arg-type]
        (lambda: Box.exactly(["a"], [1]), "lower holds 'a'"),
        (lambda: Box.exactly([1], [1, 2]), "1 numbers and upper 2"),
        (lambda: Ball(f64([0.0]), -1.0), "negative"),
        (lambda: Ball(f64([0.0]), f64([1.0, 1.0])), "radius has shape"),
        (lambda: Ball(f64([0.0]), 1.0, "l3"), "norm is 'l3'"),  # type: ignore[arg-type]
        (lambda: Ball(f64([0.0]), 1.0, clip=Box(f64([0.0, 0.0]), f64([1.0, 1.0]))), "clip must be a Box"),
        (lambda: Box(f64([0.0]), f64([1.0])).split(1), "entry 1 does not lie"),
        (lambda: Box(f64([0.0]), f64([1.0])).split(0, 2.0), r"at=2.0 lies outside"),
        (lambda: Box(f64([0.0]), f64([1.0])).contains(f64([0.0, 1.0])), "points of the region's shape"),
        (lambda: Box(f64([0.0]), f64([1.0])).project(f64([0.0]), dtype=torch.int32), "dtype is torch.int32"),
        (lambda: Union.of([]), "at least one box"),
        (lambda: join(), "one Box per input"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_sums_that_float64_gets_wrong_are_decided_exactly(norm: str) -> None:
    rng, wrong = random.Random(1), 0
    for _ in range(300):
        x = f64([rng.random() for _ in range(3)])
        radius = float(torch.linalg.vector_norm(x, 2 if norm == "l2" else 1))
        ball = Ball(torch.zeros(3), radius, norm)  # type: ignore[arg-type]
        assert bool(ball.contains(x)) == in_ball(x, ball)
        wrong += bool(torch.linalg.vector_norm(x / radius, 2 if norm == "l2" else 1) <= 1) != in_ball(x, ball)
    assert wrong > 20
