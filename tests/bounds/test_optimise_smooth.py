"""Slopes of smooth functions and shares of products: any are sound, gradients are true, ascent gains."""

import math

import pytest
import torch
from tests.bounds.test_batch import MADE, TOLERANCE, boxes, escape, points, program_of, rows, shortfall
from torch import Tensor

from soundly.bounds import optimise as module
from soundly.bounds.batch import Bounder, planes
from soundly.bounds.frame import Frame, Side, Start
from soundly.bounds.lines import Samples
from soundly.bounds.optimise import first, raised, refine
from soundly.bounds.program import Function, Times
from soundly.graph import elementwise as ew

F64 = torch.float64
NAMES = [name for name in ("smooth", "lstm", "attention", "gradient of tanh") if name in MADE]


def scene(name: str, seed: int) -> tuple[Bounder, Frame, Start]:
    """One box, and some rows of the last step."""
    program = program_of(name)
    bounder = Bounder(program)
    centre = 0.3 * torch.randn(1, program.inputs, generator=torch.Generator().manual_seed(seed), dtype=F64)
    frame = bounder.refresh(centre - 0.2, centre + 0.2)
    y = torch.randn(4, program.outputs, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    return bounder, frame, Start({len(program.steps) - 1: y}, torch.zeros(4, dtype=F64))


def drawn(bounder: Bounder, frame: Frame, count: int, seed: int) -> dict[Side, Tensor]:
    """Slopes between the least and the greatest derivative of each interval, shares between 0 and 1."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for j, side in bounder.free(frame):
        step = bounder.steps[j]
        share = 0.1 + 0.8 * torch.rand(count, step.size, generator=source, dtype=F64)
        found[j, side] = share
        if isinstance(step, Function):
            slope = Samples(step.op, frame.lower[step.source], frame.upper[step.source]).slope
            least, greatest = slope.amin(0), slope.amax(0)
            found[j, side] = least + share * (greatest - least)
    return found


def bound(bounder: Bounder, frame: Frame, start: Start, slopes: dict[Side, Tensor]) -> Tensor:
    found = bounder.backward(frame, bounder.lines(frame, slopes), start)
    return found.least(frame.lower[0], frame.upper[0])


@pytest.mark.parametrize("name", NAMES)
def test_any_choice_is_sound(name):
    bounder, frame, _ = scene(name, 0)
    x = points(frame.lower[0], frame.upper[0], 2000)
    for seed in range(6):
        start = rows(bounder.program, 20, 1, seed)
        slopes = drawn(bounder, frame, 20, seed)
        found = bounder.backward(frame, bounder.lines(frame, slopes), start)
        assert shortfall(bounder.program, start, found, frame, x) < TOLERANCE


def test_shares_outside_of_zero_and_one_are_caught():
    xl, xu, yl, yu = torch.tensor([-1.0, 1.0, -2.0, 3.0], dtype=F64)[:, None]
    share = torch.linspace(0, 1, 41, dtype=F64)
    x, y = torch.meshgrid(xl + share * (xu - xl), yl + share * (yu - yl), indexing="ij")
    worst = {}
    for r in (-0.3, 0.0, 0.5, 1.0, 1.3):
        p = planes(xl, xu, yl, yu, torch.tensor([r]), torch.tensor([r]))
        below, above = p.x_low * x + p.y_low * y + p.c_low, p.x_high * x + p.y_high * y + p.c_high
        worst[r] = float(torch.maximum(below - x * y, x * y - above).max())
    assert max(worst[r] for r in (0.0, 0.5, 1.0)) < 1e-12
    assert min(worst[r] for r in (-0.3, 1.3)) > 0.1


def test_both_corners_are_reached():
    """McCormick's planes touch the product at the corners that name them."""
    ends = torch.tensor([-1.0, 1.0, -2.0, 3.0], dtype=F64)[:, None]
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    for r, low_at, high_at in ((one, (-1.0, -2.0), (-1.0, 3.0)), (zero, (1.0, 3.0), (1.0, -2.0))):
        p = planes(*ends, r, r)
        assert float(p.x_low * low_at[0] + p.y_low * low_at[1] + p.c_low) == pytest.approx(low_at[0] * low_at[1])
        assert float(p.x_high * high_at[0] + p.y_high * high_at[1] + p.c_high) == pytest.approx(high_at[0] * high_at[1])


class Recorder:
    """Stands in for the ascent: keeps the first gradients, and moves nothing."""

    seen: dict[Side, Tensor]

    def __init__(self) -> None:
        Recorder.seen = {}

    def step(self, key: Side, gradient: Tensor, t: int) -> Tensor:
        Recorder.seen.setdefault(key, gradient)
        return torch.zeros_like(gradient)


def disagreement(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[float, set[type]]:
    """By how much gradients, along random directions and relative to the largest, differ from differences of bounds.
    A line touches its function at one sample until it touches it at the next one, so differences exist."""
    bounder, frame, start = scene(name, 1)
    slopes = drawn(bounder, frame, 4, 7)
    monkeypatch.setattr(module, "_Adam", Recorder)
    raised(bounder, frame, start, slopes, rounds=1, goal=torch.full((4,), math.inf, dtype=F64))
    source, h, worst, kinds = torch.Generator().manual_seed(5), 1e-7, 0.0, set()
    for (j, side), v in slopes.items():
        if (j, side) not in Recorder.seen:
            continue
        step = bounder.steps[j]
        gradient = Recorder.seen[j, side]
        if isinstance(step, Function):  # the ascent is told the derivative in log slope where slopes have one sign
            slope = Samples(step.op, frame.lower[step.source], frame.upper[step.source]).slope
            signed = slope.amin(0) * slope.amax(0) > 0
            gradient = torch.where(signed, gradient / v, gradient)
        way = torch.randn(v.shape, generator=source, dtype=F64) * bounder.free(frame)[j, side]
        up, down = (bound(bounder, frame, start, {**slopes, (j, side): v + e * way}) for e in (h, -h))
        true, found = (up - down) / (2 * h), (gradient * way).sum(-1)
        worst = max(worst, float(((true - found).abs() / (1e-3 + true.abs().max())).max()))
        kinds.add(type(step))
    return worst, kinds


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_differences(monkeypatch, name):
    worst, kinds = disagreement(monkeypatch, name)
    assert worst < 1e-3 and (kinds == {Function, Times} or name == "gradient of tanh")


@pytest.mark.parametrize("wrong", ["touching", "sides", "planes"])
def test_wrong_gradients_are_caught(monkeypatch, wrong):
    right = module.Freedom.gradient

    def faulty(self, key, found, values):
        if wrong == "touching" and key in self.touching:
            self.touching[key] = torch.zeros_like(self.touching[key])
        if wrong == "sides":
            key = (key[0], 1 - key[1]) if (key[0], 1 - key[1]) in self.touching else key
        if wrong == "planes":
            values = self.bounder.program.evaluate(values[0])
        return right(self, key, found, values)

    monkeypatch.setattr(module.Freedom, "gradient", faulty)
    assert any(disagreement(monkeypatch, name)[0] > 1e-2 for name in ("smooth", "lstm"))


@pytest.mark.parametrize("name", NAMES)
def test_bounds_rise_and_hold(name):
    bounder, frame, start = scene(name, 2)
    slopes = {key: v.expand(4, -1) for key, v in first(bounder, frame).items()}
    before = bound(bounder, frame, start, {})
    assert torch.allclose(bound(bounder, frame, start, slopes), before, rtol=1e-9, atol=1e-9)
    found = raised(bounder, frame, start, slopes, rounds=30, goal=torch.full((4,), math.inf, dtype=F64))
    assert bool((found.bound >= before - 1e-12).all()) and float((found.bound - before).max()) > 1e-3
    assert torch.allclose(bound(bounder, frame, start, found.slopes), found.bound, rtol=1e-9, atol=1e-9)
    values = bounder.program.evaluate(points(frame.lower[0], frame.upper[0], 3000)[:, 0])[-1]
    truth = values @ start.a[len(bounder.steps) - 1].T
    assert bool((found.bound <= truth.amin(0) + TOLERANCE).all())


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_refined_intervals_are_narrower_and_hold(name, together):
    program = program_of(name)
    bounder = Bounder(program)
    low, high = (v[3:4] for v in boxes(program.inputs, 1))
    frame = bounder.refresh(low, high)
    before = frame.pick(torch.tensor([0]))
    found = refine(bounder, frame, rounds=5, together=together)
    assert escape(program, frame, points(low, high, 2000)) < TOLERANCE
    width = [sum(float((f.upper[i] - f.lower[i]).sum()) for i in found) for f in (before, frame)]
    assert width[1] < width[0]
    for i, refined in found.items():
        rows_of = 1 - 2 * refined.side.double()
        a = torch.zeros(len(refined.entry), program.steps[i].size, dtype=F64)
        a[torch.arange(len(a)), refined.entry] = rows_of
        slopes = {key: v[refined.which] for key, v in refined.slopes.items()}
        least = bound(bounder, frame, Start({i: a}, torch.zeros(len(a), dtype=F64)), slopes)
        end = torch.where(refined.side == 0, frame.lower[i][0, refined.entry], -frame.upper[i][0, refined.entry])
        assert bool((least <= end + 1e-7).all()) and bool(torch.isfinite(least).all())


def test_samples_have_the_least_and_the_greatest():
    """Against a fine grid, for slopes of any size; over many magnitudes too."""
    source = torch.Generator().manual_seed(3)
    for f, low, high in (
        (ew.EXP, -3.0, 2.0), (ew.RECIPROCAL, 0.5, 4e3), (ew.TANH, -2.0, 3.0), (ew.SIGMOID, -4.0, 4.0),
        (ew.SQUARE, -1.0, 2.0), (ew.LOG, 1e-3, 50.0), (ew.SIN, -1.0, 2.0),
    ):  # fmt: skip
        ends = torch.tensor([low], dtype=F64), torch.tensor([high], dtype=F64)
        samples = Samples(f, *ends)
        near = ends[0] + (high - low) * 1e-4 ** torch.rand(2000, generator=source, dtype=F64)
        grid = torch.cat([torch.linspace(low, high, 20001, dtype=F64), near])
        for k in torch.linspace(float(samples.slope.min()) - 1, float(samples.slope.max()) + 1, 23, dtype=F64):
            value = f.apply(grid) - k * grid
            least, greatest = (samples.extreme(k[None, None], side)[0].item() for side in (0, 1))
            room = 1e-3 * (1 + float(value.max() - value.min()))
            assert least <= float(value.min()) + room and greatest >= float(value.max()) - room
