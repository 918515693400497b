"""Batched bounds: no value of any program leaves its interval, no row falls below its plane, whatever the batch.

All checks measure by how much the truth escapes a bound; the same checks must catch faults planted in the bounds.
"""

import math
import time
from dataclasses import replace

import pytest
import torch
from tests.bounds.samples import NETWORKS, made
from torch import Tensor, nn

from soundly.bounds import batch as module
from soundly.bounds.batch import Bounder, Planes
from soundly.bounds.frame import Frame, OutOfTime, Side, Split, Start
from soundly.bounds.lines import kink, lines, lines_of
from soundly.bounds.lower import lower
from soundly.bounds.program import Affine, Function, Program, Times
from soundly.bounds.relaxation import Lines
from soundly.graph import elementwise as ew
from soundly.graph.elementwise import Elementwise

F64 = torch.float64


class Smooth(nn.Module):
    """Products of smooth functions, read several times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.sin(self.a(x)), nn.functional.gelu(self.b(x))
        w = torch.sigmoid(u * v) + u.square()
        return self.c(w * v) * torch.exp(-self.c(u))


class Kinks(nn.Module):
    """Functions with kinks of several kinds, convex and concave ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.leaky_relu(self.a(x), 0.2)
        z = nn.functional.leaky_relu(self.b(y), 1.7).abs() + nn.functional.hardtanh(self.b(torch.relu(-y)))
        return nn.functional.relu6(3 * self.c(z))


MADE = {**NETWORKS, "smooth": lambda: made(Smooth(), 3, seed=1), "kinks": lambda: made(Kinks(), 4, seed=2)}
PROGRAMS: dict[str, Program] = {}


def program_of(name: str) -> Program:
    if name not in PROGRAMS:
        PROGRAMS[name] = lower(MADE[name]())
    return PROGRAMS[name]


def boxes(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four boxes [4, n]: a point, a small and a large one, one with some constant entries."""
    source = torch.Generator().manual_seed(seed)
    centre = 0.7 * torch.randn(4, n, generator=source, dtype=F64)
    radius = torch.rand(4, n, generator=source, dtype=F64) * torch.tensor([0, 0.02, 0.8, 0.3], dtype=F64)[:, None]
    radius[3, ::2] = 0
    return centre - radius, centre + radius


def points(low: Tensor, high: Tensor, count: int = 60, seed: int = 0) -> Tensor:
    """Centres, corners and uniform points [count, batch, n]."""
    share = torch.rand((count, *low.shape), generator=torch.Generator().manual_seed(seed), dtype=F64)
    share[: count // 2] = share[: count // 2].round()
    share[0] = 0.5
    return low + share * (high - low)


def escape(program: Program, frame: Frame, x: Tensor) -> float:
    """By how much values at points [m, batch, n] leave the frame's intervals, relative to their size."""
    worst = -math.inf
    for value, low, high in zip(program.evaluate(x), frame.lower, frame.upper, strict=True):
        away = torch.maximum(low - value, value - high) / (1 + value.abs())
        worst = max(worst, float(away.max()))
    return worst


def rows(program: Program, count: int, batch: int, seed: int = 0) -> Start:
    """Random rows on several steps, the input among them, each of a random subproblem."""
    source = torch.Generator().manual_seed(seed)
    last = len(program.steps) - 1
    a = {
        i: torch.randn(count, program.steps[i].size, generator=source, dtype=F64)
        for i in {0, last, last // 2, max(last - 1, 0)}
    }
    owner = torch.randperm(count, generator=source) % batch
    return Start(a, torch.randn(count, generator=source, dtype=F64), owner)


def truth(program: Program, start: Start, x: Tensor) -> Tensor:
    """The rows [m, rows] at points [m, batch, n]."""
    values = program.evaluate(x)
    owner = torch.arange(len(start.d)) if start.owner is None else start.owner
    return start.d + sum((values[i][:, owner] * a).sum(-1) for i, a in start.a.items())


def shortfall(program: Program, start: Start, found: module.Pass, frame: Frame, x: Tensor) -> float:
    """By how much rows at points fall below their planes or their bounds."""
    owner = torch.arange(len(start.d)) if start.owner is None else start.owner
    value = truth(program, start, x)
    plane = (x[:, owner] * found.a).sum(-1) + found.d
    bound = found.least(frame.lower[0][owner], frame.upper[0][owner])
    size = 1 + value.abs() + plane.abs().nan_to_num(0, 0, 0)
    finite = torch.isfinite(bound)
    return float((torch.maximum(plane, bound.expand_as(plane)) - value)[:, finite].div(size[:, finite]).max())


TOLERANCE = 1e-9
"""Of sums in float64; the bounds account for no rounding."""


@pytest.mark.parametrize("name", MADE)
def test_no_value_leaves_its_interval_and_no_row_its_plane(name):
    program = program_of(name)
    bounder = Bounder(program)
    for seed in range(3):
        low, high = boxes(program.inputs, seed)
        frame = bounder.refresh(low, high)
        x = points(low, high, seed=seed)
        assert not frame.infeasible.any()
        assert escape(program, frame, x) < TOLERANCE
        start = rows(program, 40, len(frame), seed)
        found = bounder.backward(frame, bounder.lines(frame), start)
        assert shortfall(program, start, found, frame, x) < TOLERANCE


@pytest.mark.parametrize("name", MADE)
def test_a_point_has_intervals_of_no_width(name):
    program = program_of(name)
    x = 0.5 * torch.randn(5, program.inputs, generator=torch.Generator().manual_seed(1), dtype=F64)
    frame = Bounder(program).refresh(x, x)
    for value, low, high in zip(program.evaluate(x), frame.lower, frame.upper, strict=True):
        assert bool((high - low <= 1e-8 * (1 + value.abs())).all())
        assert bool(((value - low).abs() <= 1e-8 * (1 + value.abs())).all())


@pytest.mark.parametrize("name", ["mlp", "kinks", "smooth", "lstm", "pools", "gradient of tanh"])
def test_bounds_converge_as_boxes_shrink(name):
    """Widths fall at least in proportion, so that splitting inputs ends."""
    program = program_of(name)
    centre = 0.4 * torch.randn(program.inputs, generator=torch.Generator().manual_seed(3), dtype=F64)
    radius = torch.tensor([0.01, 0.001], dtype=F64)[:, None]
    frame = Bounder(program).refresh(centre - radius, centre + radius)
    wide, narrow = (frame.upper[-1] - frame.lower[-1]).amax(1).tolist()
    assert 0 < narrow <= wide / 5


@pytest.mark.parametrize("name", MADE)
def test_owners_change_nothing(name):
    """Ragged rows of a batch have the bounds that each has alone; so has every portion of a long list."""
    program = program_of(name)
    bounder, short = Bounder(program), Bounder(program, chunk=1)
    low, high = boxes(program.inputs, 5)
    high = high + 0.01  # how many entries vary in a batch decides on the method
    frame, portioned = bounder.refresh(low, high), short.refresh(low, high)
    straight = all(kink(s.op) is not None for s in program.steps if isinstance(s, Function))
    start = rows(program, 17, len(frame), 5)
    found = bounder.backward(frame, bounder.lines(frame), start)
    least = found.least(low[start.owner], high[start.owner])
    for k in range(len(frame)):
        one = bounder.refresh(low[k : k + 1], high[k : k + 1])
        for i in range(len(program.steps)):
            for side in ("lower", "upper"):
                many = getattr(frame, side)[i][k]
                # Of slopes that are equally good for a smooth function rounding chooses one.
                near = 1e-9 + (0.0 if straight else 0.1) * (frame.upper[i][k] - frame.lower[i][k])
                for other in (getattr(one, side)[i][0], getattr(portioned, side)[i][k]):
                    assert bool(((other == many) | ((other - many).abs() <= near)).all())
        mine = (start.owner == k).nonzero()[:, 0]
        part = replace(start.part(mine), owner=torch.zeros(len(mine), dtype=torch.int64))
        same = frame.pick(torch.tensor([k]))
        own = {j: type(line)(*(v[k : k + 1] for v in line)) for j, line in bounder.lines(frame).items()}
        alone = bounder.backward(same, own, part).least(low[k], high[k])
        assert torch.allclose(alone, least[mine], rtol=1e-7, atol=1e-7)
        assert torch.equal(same.lower[-1][0], frame.lower[-1][k]) and len(same) == 1


@pytest.mark.parametrize("name", MADE)
def test_inherited_intervals_are_kept(name):
    program = program_of(name)
    bounder = Bounder(program)
    low, high = boxes(program.inputs, 7)
    parent = bounder.refresh(low, high)
    middle = low + 0.5 * (high - low)
    child_high = torch.where(torch.arange(low.shape[1]) == 1, middle, high)
    child = bounder.refresh(low, child_high, inherited=parent)
    x = points(low, child_high)
    assert escape(program, child, x) < TOLERANCE
    for i in range(len(program.steps)):
        assert bool((child.lower[i] >= parent.lower[i]).all() and (child.upper[i] <= parent.upper[i]).all())
    assert not child.infeasible.any()


def test_inherited_clamps_describe_a_part():
    """A neuron clamped to one half: its interval and all that follow hold where the neuron is in that half."""
    program = program_of("kinks")
    bounder = Bounder(program)
    low, high = boxes(program.inputs, 3)
    low, high = low[2:3], high[2:3]
    root = bounder.refresh(low, high)
    step = next(s.source for s in program.steps if isinstance(s, Function) and kink(s.op) is not None)
    x = points(low, high, 4000)
    values = program.evaluate(x)
    entry = int((root.upper[step][0].minimum(-root.lower[step][0])).argmax())
    assert root.lower[step][0, entry] < 0 < root.upper[step][0, entry]
    for side in (1, -1):
        half = Frame([v.clone() for v in root.lower], [v.clone() for v in root.upper], root.infeasible)
        (half.lower if side > 0 else half.upper)[step][0, entry] = 0.0
        frame = bounder.refresh(low, high, inherited=half)
        kept = (side * values[step][:, 0, entry] >= 0).nonzero()[:, 0]
        other = (side * values[step][:, 0, entry] < 0).nonzero()[:, 0]
        assert len(kept) > 100 and len(other) > 100
        assert escape(program, frame, x[kept]) < TOLERANCE
        # The clamp was not forgotten: the other half lies outside.
        assert escape(program, frame, x[other]) > 1e-3
        assert bool((half.lower[step] <= frame.lower[step]).all() and (frame.upper[step] <= half.upper[step]).all())


def test_parts_without_points_are_infeasible():
    program = program_of("mlp")
    bounder = Bounder(program)
    low, high = boxes(program.inputs, 4)
    low[1, 2], high[1, 2] = 1.0, 0.0
    frame = bounder.refresh(low, high)
    assert frame.infeasible.tolist() == [False, True, False, False]
    assert all(bool((a <= b).all()) for a, b in zip(frame.lower, frame.upper, strict=True))
    low, high = boxes(program.inputs, 4)
    root = bounder.refresh(low, high)
    root.lower[1][2] = root.upper[1][2] + 1.0
    assert bounder.refresh(low, high, inherited=root).infeasible.tolist() == [False, False, True, False]


def constrained(program: Program, seed: int, *, clamp: bool) -> tuple[Bounder, Frame, dict[int, Split], Tensor]:
    """One box under random halves of inner values and inputs, with points [m, 1, n] that satisfy all of them."""
    source = torch.Generator().manual_seed(seed)
    bounder = Bounder(program)
    low, high = (v[2:3] for v in boxes(program.inputs, seed))
    frame = bounder.refresh(low, high)
    x = points(low, high, 3000, seed)
    values = program.evaluate(x)
    splits = {}
    inside = torch.ones(len(x), dtype=torch.bool)
    read = [i for i in range(len(program.steps)) if bounder.read[i] or i == 0]
    for i in read:
        size = program.steps[i].size
        sign = torch.zeros(1, size, dtype=F64)
        chosen = torch.randperm(size, generator=source)[:1]
        sign[0, chosen] = float(torch.randint(2, (1,), generator=source)) * 2 - 1
        at = torch.where(sign != 0, values[i][inside, 0].quantile(0.5, 0), 0.0)  # half of the points go
        multiplier = torch.rand(1, size, generator=source, dtype=F64) * 2
        splits[i] = Split(sign, at, multiplier * (sign != 0))
        inside &= (sign * (values[i] - at) >= 0).all(-1)[:, 0]
        if clamp and i:
            frame.lower[i] = torch.where(sign > 0, torch.maximum(frame.lower[i], at), frame.lower[i])
            frame.upper[i] = torch.where(sign < 0, torch.minimum(frame.upper[i], at), frame.upper[i])
        if int(inside.sum()) < 20:
            break
    return bounder, frame, splits, x[inside]


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("name", ["mlp", "kinks", "smooth", "residual", "pools", "gradient of tanh"])
def test_multipliers_are_lagrangian(name, clamp):
    """With any multipliers a row's bound holds wherever the constraints do."""
    program, tried = program_of(name), 0
    for seed in range(4):
        bounder, frame, splits, x = constrained(program, seed, clamp=clamp)
        tried += len(x) > 0
        assert escape(program, frame, x) < TOLERANCE
        start = rows(program, 20, 1, seed)
        found = bounder.backward(frame, bounder.lines(frame), start, splits=splits)
        assert shortfall(program, start, found, frame, x) < TOLERANCE
    assert tried == 4


def drawn(bounder: Bounder, frame: Frame, seed: int) -> dict[Side, Tensor]:
    """Any slopes of functions, shares in [0, 1] of products; in half of the cases only below."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for j, step in enumerate(bounder.steps):
        for side in (0, 1) if seed % 2 else (0,):
            shape = len(frame), step.size
            if isinstance(step, Function):
                found[j, side] = 3 * torch.randn(shape, generator=source, dtype=F64)
            elif isinstance(step, Times):
                found[j, side] = torch.rand(shape, generator=source, dtype=F64)
    return found


@pytest.mark.parametrize("name", MADE)
def test_any_slopes_are_sound(name):
    program = program_of(name)
    bounder = Bounder(program)
    low, high = boxes(program.inputs, 9)
    frame = bounder.refresh(low, high)
    x = points(low, high)
    for seed in range(4):
        slopes = drawn(bounder, frame, seed)
        start = rows(program, 30, len(frame), seed)
        found = bounder.backward(frame, bounder.lines(frame, slopes), start)
        assert shortfall(program, start, found, frame, x) < 1e-6
        chosen = {i: slopes for i in range(len(program.steps))}
        assert escape(program, bounder.refresh(low, high, slopes=chosen), x) < 1e-6


def test_following_a_point_reaches_the_bound():
    """The planes that a pass chose, evaluated forwards at the worst corner, give the bound again."""
    for name in ("mlp", "kinks", "smooth", "residual", "lstm"):
        program = program_of(name)
        bounder = Bounder(program)
        low, high = boxes(program.inputs, 2)
        frame = bounder.refresh(low, high)
        lines = bounder.lines(frame)
        start = replace(rows(program, len(frame), len(frame), 2), owner=None)
        found = bounder.backward(frame, lines, start, keep=True)
        values = bounder.follow(lines, found, torch.where(found.a > 0, low, high))
        again = start.d + sum((values[i] * a).sum(-1) for i, a in start.a.items())
        assert torch.allclose(again, found.least(low, high), rtol=1e-8, atol=1e-8)


def test_nothing_is_known_from_nothing():
    """NaN and infinite coefficients end in minus infinity, never in a bound."""
    found = module.Pass(torch.tensor([[math.nan], [math.inf], [1.0]]), torch.tensor([0.0, 0.0, math.inf]))
    assert found.least(torch.tensor([[-1.0]]), torch.tensor([[1.0]])).tolist() == [-math.inf] * 3
    program = program_of("mlp")
    bad = torch.full_like(program.steps[1].bias, math.nan)
    steps = (program.steps[0], replace(program.steps[1], bias=bad), *program.steps[2:])
    bounder = Bounder(Program(steps))
    low, high = boxes(program.inputs)
    frame = bounder.refresh(low, high)
    start = Start({len(steps) - 1: torch.eye(program.outputs, dtype=F64)[:1].expand(4, -1)}, torch.zeros(4, dtype=F64))
    least = bounder.backward(frame, bounder.lines(frame), start).least(low, high)
    assert not (least > -math.inf).any()


def test_a_deadline_ends_a_long_pass():
    program = program_of("mlp")
    low, high = boxes(program.inputs)
    with pytest.raises(OutOfTime):
        Bounder(program, deadline=time.monotonic() - 1).refresh(low, high)


# -- planted faults: the same checks must see them


def _swapped(f: Elementwise, low: Tensor, high: Tensor) -> Lines:
    a, b, c, d = lines(f, low, high)
    return Lines(c, d, a, b)


def _steeper(f: Elementwise, low: Tensor, high: Tensor) -> Lines:
    a, b, c, d = lines(f, low, high)
    return Lines(a + 0.2, b, c + 0.2, d)


def _lifted(f: Elementwise, low: Tensor, high: Tensor) -> Lines:
    a, b, c, _ = lines(f, low, high)
    return Lines(a, b, c, b)


@pytest.mark.parametrize("wrong", [_swapped, _lifted, _steeper])
@pytest.mark.parametrize("name", ["mlp", "kinks", "smooth", "lstm", "residual", "pools"])
def test_wrong_lines_are_caught(monkeypatch, name, wrong):
    program = program_of(name)
    monkeypatch.setattr(module, "lines", wrong)
    monkeypatch.setattr("soundly.bounds.lines.lines", wrong)
    bounder = Bounder(program)
    worst = -math.inf
    for seed in range(3):
        low, high = boxes(program.inputs, seed)
        frame = bounder.refresh(low, high)
        start = rows(program, 40, len(frame), seed)
        found = bounder.backward(frame, bounder.lines(frame), start)
        worst = max(worst, shortfall(program, start, found, frame, points(low, high, seed=seed)))
    assert worst > 1e-3


@pytest.mark.parametrize("name", ["mlp", "smooth", "residual"])
def test_a_lost_bias_is_caught(name):
    program = program_of(name)
    last = max(i for i, s in enumerate(program.steps) if isinstance(s, Affine) and bool(s.bias.any()))
    step = program.steps[last]
    steps = [*program.steps[:last], replace(step, bias=step.bias * 0), *program.steps[last + 1 :]]
    bounder = Bounder(Program(tuple(steps)))
    low, high = boxes(program.inputs)
    frame = bounder.refresh(low, high)
    start = rows(program, 40, 4)
    found = bounder.backward(frame, bounder.lines(frame), start)
    assert shortfall(program, start, found, frame, points(low, high)) > 1e-3
    assert escape(program, frame, points(low, high)) > 1e-3


def _negated(split: Split) -> Split:
    return replace(split, sign=-split.sign)


def _unlifted(split: Split) -> Split:
    return replace(split, at=split.at - 5.0)


def _forced(split: Split) -> Split:
    return replace(split, multiplier=-split.multiplier)


@pytest.mark.parametrize("wrong", [_negated, _forced, _unlifted], ids=lambda f: f.__name__)
def test_a_wrong_multiplier_is_caught(wrong):
    program, worst = program_of("mlp"), -math.inf
    for seed in range(6):
        bounder, frame, splits, x = constrained(program, seed, clamp=True)
        start = rows(program, 20, 1, seed)
        # A shift of `at` errs to the safe side where the sign is positive: only negative ones are shifted.
        faulty = {i: wrong(s) if wrong is not _unlifted or bool((s.sign < 0).any()) else s for i, s in splits.items()}
        found = bounder.backward(frame, bounder.lines(frame), start, splits=faulty)
        worst = max(worst, shortfall(program, start, found, frame, x))
    assert worst > 1e-3


def test_a_clamp_of_another_part_is_caught():
    program = program_of("kinks")
    low, high = boxes(program.inputs, 3)
    bounder = Bounder(program)
    frame = bounder.refresh(low, high)
    moved = bounder.refresh(low, high, inherited=frame.pick(torch.tensor([1, 1, 2, 3])))
    assert bool(moved.infeasible[0]) or escape(program, moved, points(low, high)) > 1e-3


@pytest.mark.parametrize("name", ["smooth", "lstm"])
def test_wrong_planes_of_products_are_caught(monkeypatch, name):
    right = module.planes

    def wrong(*ends: Tensor) -> Planes:
        p = right(*ends)
        return p._replace(c_low=p.c_high, c_high=p.c_low)

    monkeypatch.setattr(module, "planes", wrong)
    program = program_of(name)
    bounder, worst = Bounder(program), -math.inf
    for seed in range(3):
        low, high = boxes(program.inputs, seed)
        frame = bounder.refresh(low, high)
        start = rows(program, 40, len(frame), seed)
        found = bounder.backward(frame, bounder.lines(frame), start)
        worst = max(worst, shortfall(program, start, found, frame, points(low, high, seed=seed)))
    assert worst > 1e-4


# -- lines


def functions() -> dict[str, Elementwise]:
    """Every elementwise function, its derivative and second derivative."""
    plain = [f for f in vars(ew).values() if isinstance(f, Elementwise)]
    plain += [ew.leaky_relu(0.1), ew.leaky_relu(2.0), ew.leaky_relu(-0.5), ew.clip(-1.0, 2.0), ew.clip(0.0, math.inf)]
    plain += [ew.power(3), ew.power(4), ew.power(-1), ew.power(1.5), ew.power(-0.5), ew.elu(1.0), ew.elu(1.67, 1.05)]
    first = [f.derivative for f in plain]
    return {f.name: f for f in [*plain, *first, *(f.derivative for f in first)] if not f.is_zero}


FUNCTIONS = functions()


def intervals(f: Elementwise, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Intervals of many widths near and around everything special."""
    source = torch.Generator().manual_seed(seed)
    width = 10.0 ** (torch.rand(count, generator=source, dtype=F64) * 4 - 3)
    special = torch.tensor([0.0, *(t for t, _, _ in f.special_points if abs(t) < 10)], dtype=F64)
    at = special[torch.randint(len(special), (count,), generator=source)]
    at = at + torch.randn(count, generator=source, dtype=F64) * width * 0.7
    at[::7] = torch.randn(len(at[::7]), generator=source, dtype=F64) * 4
    low, high = at - width / 2, at + width / 2
    ring = f.ring
    if math.isfinite(ring.lower):
        low, high = low.clamp(min=ring.lower + 1e-3), high.clamp(min=ring.lower + 2e-3)
    if ring.pole is not None:
        away = (low <= ring.pole + 1e-2) & (high >= ring.pole - 1e-2)
        low = torch.where(away, ring.pole + 1e-2, low)
        high = torch.where(away, low + width, high)
    return low, high


def above_or_below(f: Elementwise, found: Lines, low: Tensor, high: Tensor) -> float:
    """By how much the function crosses its lines on the intervals, relative to its size there."""
    share = torch.linspace(0, 1, 401, dtype=F64)[:, None]
    t = (low + share * (high - low)).clamp(low, high)
    t = torch.cat([t, *(torch.full_like(low, p)[None].clamp(low, high) for p in f.breaks)])
    y = f.apply(t)
    size = 1 + y.abs().amax(0) + (found.slope_low * t).abs().amax(0) + (found.slope_high * t).abs().amax(0)
    below = found.slope_low * t + found.offset_low - y
    above = y - found.slope_high * t - found.offset_high
    return float((torch.maximum(below, above) / size).nan_to_num(nan=math.inf).max())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lines_enclose_their_function(name):
    f = FUNCTIONS[name]
    low, high = intervals(f, 300, 0)
    assert above_or_below(f, lines(f, low, high), low, high) < 1e-6
    source = torch.Generator().manual_seed(1)
    slopes = [2 * torch.randn(len(low), generator=source, dtype=F64) for _ in range(2)]
    for pair in (slopes, (slopes[0], None), (None, slopes[1])):
        assert above_or_below(f, lines_of(f, low, high, *pair), low, high) < 1e-6


def test_lines_of_relu_are_the_triangle():
    """Against the textbook: the chord above; below, the side that leaves less area, or the slope that is given."""
    low, high = torch.tensor([-1.0, -3.0, 1.0, -2.0]), torch.tensor([3.0, 1.0, 2.0, -1.0])
    found = lines(ew.RELU, low, high)
    assert found.slope_high.tolist() == [0.75, 0.25, 1.0, 0.0] and found.offset_high.tolist() == [0.75, 0.75, 0.0, 0.0]
    assert found.slope_low.tolist() == [1.0, 0.0, 1.0, 0.0] and not found.offset_low.any()
    given = lines_of(ew.RELU, low, high, torch.tensor([0.3, 1.7, 0.3, 0.3]), None)
    assert given.slope_low.tolist() == pytest.approx([0.3, 1.0, 1.0, 0.0]) and not given.offset_low.any()


def test_swapped_lines_of_functions_are_caught():
    for f in FUNCTIONS.values():
        low, high = intervals(f, 300, 0)
        exact = all(len(p) <= 1 and all(e[0] <= 1 and not any(e[1:]) for e, _ in p) for p in f.pieces)
        if not exact or f.breaks:  # where it is straight both lines are one
            assert above_or_below(f, _swapped(f, low, high), low, high) > 1e-3, f
