"""Optimised bounds: never worse than where they began, along true gradients, up to the optimum of the relaxation."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from tests.bounds.test_batch import MADE, TOLERANCE, boxes, escape, points, program_of
from torch import Tensor

from soundly.bounds import optimise as module
from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, Side, Split, Start
from soundly.bounds.lines import kink
from soundly.bounds.optimise import raised, refine
from soundly.bounds.program import Affine, Function, Matrix, Program, Variable
from soundly.graph.elementwise import ABS, RELU, Elementwise, leaky_relu

F64 = torch.float64


def chain(sizes: tuple[int, ...], op: Elementwise, seed: int) -> Program:
    """A multilayer perceptron as a program: variable, affine, function, ..., affine."""
    source = torch.Generator().manual_seed(seed)
    steps: list = [Variable(sizes[0])]
    for k, (n, m) in enumerate(pairwise(sizes)):
        weight = torch.randn(m, n, generator=source, dtype=F64) * (2 / n) ** 0.5
        steps.append(Affine(((Matrix(weight), len(steps) - 1),), 0.3 * torch.randn(m, generator=source, dtype=F64)))
        if k < len(sizes) - 2:
            steps.append(Function(len(steps) - 1, op, m))
    return Program(tuple(steps))


@dataclass
class Scene:
    """A bounder with one box, rows of the last step, first slopes, and constraints of their own for every row."""

    bounder: Bounder
    frame: Frame
    start: Start
    slopes: dict[Side, Tensor]
    splits: dict[int, Split]


def scene(program: Program, seed: int, *, width: float = 1.0, rows: int = 5, split: int = 0) -> Scene:
    """`split` neurons of every layer are halved at zero, a random side per row; one box serves all rows if none are."""
    source = torch.Generator().manual_seed(seed)
    bounder = Bounder(program)
    centre = 0.3 * torch.randn(1, program.inputs, generator=source, dtype=F64)
    frame = bounder.refresh(centre - width, centre + width)
    y = torch.randn(rows, program.outputs, generator=source, dtype=F64)
    start = Start({len(program.steps) - 1: y}, torch.randn(rows, generator=source, dtype=F64))
    splits = {}
    if split:
        lower, upper = ([v.repeat(rows, 1) for v in side] for side in (frame.lower, frame.upper))
        for step in program.steps:
            if isinstance(step, Function):
                i = step.source
                reach = torch.minimum(-lower[i], upper[i])
                chosen = reach + torch.rand(reach.shape, generator=source, dtype=F64)
                chosen = chosen.masked_fill(reach <= 0, -1).topk(split, 1).indices
                side = torch.randint(2, chosen.shape, generator=source).double() * 2 - 1
                sign = torch.zeros_like(reach).scatter_(1, chosen, side) * (reach > 0)
                multiplier = torch.rand(reach.shape, generator=source, dtype=F64) * (sign != 0)
                splits[i] = Split(sign, torch.zeros_like(sign), multiplier)
                lower[i] = torch.where(sign > 0, 0.0, lower[i])
                upper[i] = torch.where(sign < 0, 0.0, upper[i])
        frame = Frame(lower, upper, torch.zeros(rows, dtype=torch.bool))
    slopes = {}
    for j, step in enumerate(program.steps):
        if isinstance(step, Function) and (ends := kink(step.op)) is not None:
            share = 0.1 + 0.8 * torch.rand(rows, step.size, generator=source, dtype=F64)
            slopes[j, int(ends[1] < ends[0])] = min(ends) + abs(ends[1] - ends[0]) * share
    return Scene(bounder, frame, start, slopes, splits)


def bound(s: Scene, slopes: dict[Side, Tensor], splits: dict[int, Split]) -> Tensor:
    lines = s.bounder.lines(s.frame, slopes)
    found = s.bounder.backward(s.frame, lines, s.start, splits=splits)
    return found.least(s.frame.lower[0], s.frame.upper[0])


def lift(s: Scene, rounds: int, **options: float) -> module.Raised:
    goal = torch.full_like(s.start.d, math.inf)
    return raised(s.bounder, s.frame, s.start, s.slopes, rounds=rounds, goal=goal, splits=s.splits, **options)


SCENES = {
    "relu": lambda seed: scene(chain((3, 6, 6, 2), RELU, seed), seed),
    "relu, split": lambda seed: scene(chain((3, 6, 6, 2), RELU, seed), seed, split=2),
    "leaky, split": lambda seed: scene(chain((4, 5, 5, 3), leaky_relu(0.25), seed), seed, split=1),
    "concave, split": lambda seed: scene(chain((4, 5, 5, 3), leaky_relu(2.0), seed), seed, split=1),
    "abs": lambda seed: scene(chain((3, 5, 5, 2), ABS, seed), seed),
    "kinks": lambda seed: scene(program_of("kinks"), seed, width=0.4),
    "residual": lambda seed: scene(program_of("residual"), seed, width=0.1, rows=3),
    "pools": lambda seed: scene(program_of("pools"), seed, width=0.1, rows=3),
    "gradient": lambda seed: scene(program_of("gradient of relu"), seed, width=0.6, rows=3),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCENES)
def test_bounds_rise_and_are_those_of_the_numbers_returned(name, seed):
    s = SCENES[name](seed)
    before = bound(s, s.slopes, s.splits)
    first = {i: split.multiplier.clone() for i, split in s.splits.items()}
    found = lift(s, 20)
    assert bool((found.bound >= before - 1e-12).all())
    splits = {i: replace(split, multiplier=found.multipliers[i]) for i, split in s.splits.items()}
    again = bound(s, found.slopes, splits)
    assert torch.allclose(again, found.bound, rtol=1e-9, atol=1e-9)
    for i, split in s.splits.items():
        assert torch.equal(split.multiplier, first[i])  # the caller's are left alone
        assert bool((found.multipliers[i] >= 0).all()) and not found.multipliers[i][split.sign == 0].any()
    for (j, _), v in found.slopes.items():
        ends = kink(s.bounder.steps[j].op)
        assert ends is not None and bool(((v >= min(ends)) & (v <= max(ends))).all())


@pytest.mark.parametrize("name", SCENES)
def test_raised_bounds_hold(name):
    """Wherever the constraints do, at samples and corners."""
    s = SCENES[name](0)
    found = lift(s, 20)
    low, high = s.frame.lower[0][:1], s.frame.upper[0][:1]
    values = s.bounder.program.evaluate(points(low, high, 4000))
    truth = values[-1][:, 0] @ s.start.a[len(s.bounder.steps) - 1].T + s.start.d
    inside = torch.ones_like(truth, dtype=torch.bool)
    for i, split in s.splits.items():
        inside &= (split.sign * (values[i] - split.at) >= 0).all(-1)
    assert inside.any(0).sum() >= 1
    assert float((found.bound - truth)[inside].max()) < TOLERANCE


def test_rows_stop_at_their_goals():
    """No round follows once every row is above its goal."""
    s = SCENES["relu"](0)
    before = bound(s, s.slopes, s.splits)
    found = raised(s.bounder, s.frame, s.start, s.slopes, rounds=50, goal=before - 1)
    assert torch.equal(found.bound, before)
    assert all(torch.equal(v, s.slopes[j]) for j, v in found.slopes.items())


# -- gradients


class Recorder:
    """Stands in for the ascent: keeps the first gradients, and moves nothing."""

    seen: dict[Side, Tensor]

    def __init__(self) -> None:
        Recorder.seen = {}

    def step(self, key: Side, gradient: Tensor, t: int) -> Tensor:
        Recorder.seen.setdefault(key, gradient)
        return torch.zeros_like(gradient)


def gradients(monkeypatch: pytest.MonkeyPatch, s: Scene) -> dict[Side, Tensor]:
    monkeypatch.setattr(module, "_Adam", Recorder)
    lift(s, 1)
    return Recorder.seen


def reference(s: Scene, slopes: dict[Side, Tensor], force: dict[int, Tensor]) -> Tensor:
    """The textbook's bound of a chain with a convex kink, written down anew, row by row; differentiable."""
    result = []
    for r in range(len(s.start.d)):
        k = min(r, len(s.frame) - 1)
        a, d = s.start.a[len(s.bounder.steps) - 1][r], s.start.d[r]
        for i in range(len(s.bounder.steps) - 1, 0, -1):
            step = s.bounder.steps[i]
            if i in s.splits:
                pull = s.splits[i].sign[r] * force[i][r]
                a, d = a - pull, d + pull @ s.splits[i].at[r]
            if isinstance(step, Affine):
                ((part, _),) = step.parts
                d = d + a @ step.bias
                a = a @ part.weight
            else:
                left, right = kink(step.op)
                next_a, extra = [], 0.0
                for n in range(step.size):
                    low, high = float(s.frame.lower[step.source][k, n]), float(s.frame.upper[step.source][k, n])
                    if high <= 0 or low >= 0:
                        next_a.append(a[n] * (right if low >= 0 else left))
                    elif a[n] >= 0:
                        next_a.append(a[n] * slopes[i, 0][r, n])
                    else:
                        chord = (right * high - left * low) / (high - low)
                        next_a.append(a[n] * chord)
                        extra = extra + a[n] * (left - chord) * low
                a, d = torch.stack(next_a), d + extra
        low, high = s.frame.lower[0][k], s.frame.upper[0][k]
        result.append(d + (a.clamp(min=0) * low + a.clamp(max=0) * high).sum())
    return torch.stack(result)


def across(s: Scene, key: Side) -> Tensor:
    i = s.bounder.steps[key[0]].source
    return ((s.frame.lower[i] < 0) & (s.frame.upper[i] > 0)).expand_as(s.slopes[key])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["relu", "relu, split", "leaky, split", "abs"])
def test_gradients_are_those_of_autograd(monkeypatch, name, seed):
    s = SCENES[name](seed)
    slopes = {j: v.clone().requires_grad_() for j, v in s.slopes.items()}
    force = {i: split.multiplier.clone().requires_grad_() for i, split in s.splits.items()}
    value = reference(s, slopes, force)
    assert torch.allclose(value, bound(s, s.slopes, s.splits), rtol=1e-10, atol=1e-10)
    true = torch.autograd.grad(value.sum(), [*slopes.values(), *force.values()])
    found = gradients(monkeypatch, s)
    for j, g in zip(slopes, true, strict=False):
        mask = across(s, j)
        assert torch.allclose(found[j][mask], g[mask], rtol=1e-9, atol=1e-9) and bool(g[mask].any())
    for (i, _), g in zip(force.items(), true[len(slopes) :], strict=True):
        mask = s.splits[i].sign != 0
        assert torch.allclose(found[i, -1][mask], g[mask], rtol=1e-9, atol=1e-9) and bool(g[mask].any())


@pytest.mark.parametrize("name", SCENES)
def test_gradients_are_differences(monkeypatch, name):
    """Of any program's bound, along random directions."""
    s = SCENES[name](1)
    found = gradients(monkeypatch, s)
    source, h, some = torch.Generator().manual_seed(5), 1e-6, 0.0
    for j, v in s.slopes.items():
        way = torch.randn(v.shape, generator=source, dtype=F64) * across(s, j)
        up, down = (bound(s, {**s.slopes, j: v + e * way}, s.splits) for e in (h, -h))
        assert torch.allclose((up - down) / (2 * h), (found[j] * way).sum(-1), rtol=1e-4, atol=1e-5)
        some += float((up - down).abs().sum())
    for i, split in s.splits.items():
        way = torch.randn(split.sign.shape, generator=source, dtype=F64) * (split.sign != 0)
        up, down = (
            bound(s, s.slopes, {**s.splits, i: replace(split, multiplier=split.multiplier + e * way)}) for e in (h, -h)
        )
        assert torch.allclose((up - down) / (2 * h), (found[i, -1] * way).sum(-1), rtol=1e-4, atol=1e-5)
    assert some > 0


@pytest.mark.parametrize("wrong", ["sign", "planes"])
def test_wrong_gradients_are_caught(monkeypatch, wrong):
    """Following the exact function, or a point of the wrong corner, gives other numbers."""
    s = SCENES["relu, split"](1)
    follow = Bounder.follow

    def faulty(self, lines, found, x):
        if wrong == "sign":
            x = s.frame.lower[0] + s.frame.upper[0] - x
        values = follow(self, lines, found, x)
        return values if wrong == "sign" else self.program.evaluate(x)

    monkeypatch.setattr(Bounder, "follow", faulty)
    found = gradients(monkeypatch, s)
    slopes = {j: v.clone().requires_grad_() for j, v in s.slopes.items()}
    force = {i: split.multiplier.clone() for i, split in s.splits.items()}
    true = torch.autograd.grad(reference(s, slopes, force).sum(), list(slopes.values()))
    seen = [float((found[j] - g)[across(s, j)].abs().max()) for j, g in zip(slopes, true, strict=True)]
    assert max(seen) > 1e-2


# -- the optimum


def relaxed_optimum(s: Scene, r: int) -> float:
    """The least of row r over the relaxation of a ReLU network with the frame's intervals: triangles and constraints,
    one variable per value, by scipy's LP solver."""
    k = min(r, len(s.frame) - 1)
    steps = s.bounder.steps
    first = np.cumsum([0, *(step.size for step in steps)])
    total = int(first[-1])
    equal, equal_to, least, at_most = [], [], [], []
    limits: list[tuple[float | None, float | None]] = []
    for i, step in enumerate(steps):
        low, high = s.frame.lower[i][k], s.frame.upper[i][k]
        for n in range(step.size):
            limits.append((float(low[n]), float(high[n])) if i == 0 else (None, None))
            row = np.zeros(total)
            row[first[i] + n] = 1
            if isinstance(step, Affine):
                ((part, source),) = step.parts
                row[first[source] : first[source] + part.weight.shape[1]] = -part.weight[n].numpy()
                equal.append(row)
                equal_to.append(float(step.bias[n]))
                if i in s.splits and s.splits[i].sign[r, n]:
                    # sign (v - at) >= 0
                    sign, at = float(s.splits[i].sign[r, n]), float(s.splits[i].at[r, n])
                    row = np.zeros(total)
                    row[first[i] + n] = -sign
                    least.append(row)
                    at_most.append(-sign * at)
            elif isinstance(step, Function):
                source = first[step.source] + n
                a, b = float(s.frame.lower[step.source][k, n]), float(s.frame.upper[step.source][k, n])
                if b <= 0 or a >= 0:
                    row[source] = 0 if b <= 0 else -1
                    equal.append(row)
                    equal_to.append(0.0)
                else:
                    for slope, offset in ((0.0, 0.0), (1.0, 0.0)):  # above both
                        below = np.zeros(total)
                        below[first[i] + n], below[source] = -1, slope
                        least.append(below)
                        at_most.append(-offset)
                    row[source] = -b / (b - a)
                    least.append(row)
                    at_most.append(-a * b / (b - a))
    goal = np.zeros(total)
    goal[first[-2] :] = s.start.a[len(steps) - 1][r].numpy()
    found = linprog(goal, np.array(least) if least else None, at_most or None, np.array(equal), equal_to, bounds=limits)
    if found.status == 2:
        return math.inf
    assert found.status == 0
    return float(found.fun) + float(s.start.d[r])


@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_the_relaxation_is_reached(seed, split):
    s = scene(chain((3, 8, 8, 2), RELU, seed), seed, rows=4, split=split)
    before = bound(s, s.slopes, s.splits)
    found = lift(s, 1000, rate=0.3, decay=0.995)
    best = torch.tensor([relaxed_optimum(s, r) for r in range(4)], dtype=F64)
    assert bool((found.bound <= best + 1e-7 * (1 + best.abs())).all())
    filled = torch.isfinite(best)  # the constraints may leave nothing
    gap = (best - found.bound)[filled]
    assert len(gap) >= 2
    assert bool((gap <= 2e-3 * best[filled].abs().clamp(min=1)).all())
    assert bool((best - before)[filled].max() > 0.1)  # there was something to gain


# -- refining


@pytest.mark.parametrize("name", [n for n in MADE if n not in ("attention", "gradient of attention")])
def test_refined_intervals_are_narrower_and_hold(name):
    program = program_of(name)
    bounder = Bounder(program)
    low, high = (v[2:3] for v in boxes(program.inputs, 1))
    frame = bounder.refresh(low, high)
    before = frame.pick(torch.tensor([0]))
    found = refine(bounder, frame, rounds=10)
    assert escape(program, frame, points(low, high, 2000)) < TOLERANCE
    for i in range(len(program.steps)):
        assert bool((frame.lower[i] >= before.lower[i]).all() and (frame.upper[i] <= before.upper[i]).all())
    assert all(bool((r.side < 2).all()) and len(r.which) == len(r.entry) for r in found.values())


def test_refined_intervals_are_those_of_their_slopes():
    """Whoever repeats the rows with the slopes that are returned finds the same intervals."""
    program = chain((3, 8, 8, 8, 2), RELU, 3)
    bounder = Bounder(program)
    low, high = torch.full((1, 3), -1.0, dtype=F64), torch.full((1, 3), 1.0, dtype=F64)
    frame = bounder.refresh(low, high)
    before = frame.pick(torch.tensor([0]))
    found = refine(bounder, frame, rounds=20)
    assert sorted(found) == [3, 5]
    for i, refined in found.items():
        sign = (1.0 - 2.0 * refined.side).double()
        rows = torch.zeros(len(sign), program.steps[i].size, dtype=F64)
        rows[torch.arange(len(sign)), refined.entry] = sign
        lines = bounder.lines(frame, {key: v[refined.which] for key, v in refined.slopes.items()}, upto=i)
        bound = bounder.backward(frame, lines, Start({i: rows}, torch.zeros_like(sign))).least(low, high)
        for b, entry, side in zip(bound.tolist(), refined.entry.tolist(), refined.side.tolist(), strict=True):
            end, old = (v.lower[i] if side == 0 else -v.upper[i] for v in (frame, before))
            assert float(end[0, entry]) == pytest.approx(max(b, float(old[0, entry])), abs=1e-9)
    width = sum(float((f.upper[5] - f.lower[5]).sum()) * sign for f, sign in ((before, 1), (frame, -1)))
    assert width > 0.1
